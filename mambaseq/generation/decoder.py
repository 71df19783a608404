"""A model's step together with its state. On a GPU it is replayed from a CUDA graph, since launching the many small
kernels of a token takes longer than running them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.backbones.unet import UNet
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer, State
from mambaseq.mixers.growing import GrowingState
from mambaseq.models import SequenceModel
from mambaseq.models.modules import modules_of
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import capture

# Fewest new tokens for which a CUDA graph is worth its capture.
WORTH_A_GRAPH = 16


class Decoder:
    """Decodes one position after the other: takes a token of each sequence, gives its logits.

    On a CUDA device the first step runs normally and the second is captured in a CUDA graph, which all later steps
    replay. A `unet` whose sequences are all at one place has a graph for each number of windows that a step completes,
    so only tiers that are due run. Without capture steps run normally: on other devices, under autocast, with hooks,
    and with mixers whose state grows, is not changed in place, or that wait for the GPU (a RuntimeWarning names the
    last).

    Args:
        model: its weights may change in place while it is decoded, but must not be replaced or moved.
        state: one for each layer, from `model.init_state` or a prefill; it is changed in place, and nothing else may
            change it.
        condition: `(batch,)` int64 (see `Batch`) for conditional models.
        cuda_graph: False never captures.
        greedy: a step gives the likeliest tokens and their logits, both `(batch,)`, in place of all logits, for heads
            of one pick a position; if that token is the next step's, nothing but the graph is run.
    """

    def __init__(
        self,
        model: SequenceModel,
        state: list[Any],
        condition: Tensor | None = None,
        *,
        cuda_graph: bool = True,
        greedy: bool = False,
    ) -> None:
        self.model, self.state, self.condition, self.greedy = model, state, condition, greedy
        self._chosen: Tensor | None = None  # what the last replayed graph has put into `_token` already
        self._may_capture = cuda_graph
        self._token: Tensor | None = None
        # by the number of windows that a step completes
        self._graphs: dict[int | None, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._seen: set[int | None] = set()
        self._places: list[tuple[int, int]] | None = None
        backbone = model.backbone
        on_gpu = isinstance(backbone, UNet) and backbone.norm_f.weight.is_cuda
        # the first step reports what is wrong with a state
        if cuda_graph and on_gpu and isinstance(backbone, UNet) and len(state) == backbone.n_states:
            self._places = backbone.places(state)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a graph."""
        return bool(self._graphs)

    @torch.no_grad()
    def step(self, token: Tensor) -> Any:
        """token `(batch,)` or `(batch, codes)` int64 to logits `(batch, vocab_size)` fp32, or what else the head tells,
        or with `greedy` (tokens, logits); the next step may overwrite it. Raises ConfigError for another shape."""
        codes = getattr(self.model.head, "codes", 0)
        if not token.is_floating_point() and token.shape[1:] != ((codes,) if codes else ()):  # else values
            shape = "(batch, codes)" if codes else "(batch,)"
            raise ConfigError(f"A step takes one token a sequence, {shape}, not {tuple(token.shape)}.")
        whole = self._go_on()
        if self._token is None and self._may_capture:
            self._may_capture = can_capture(self.model, self.state, token)
        if self._may_capture and whole not in self._graphs:
            if whole not in self._seen:
                self._seen.add(whole)
                return self._first(token, whole)
            self._capture(whole)
        if not self._may_capture or self._token is None:
            return self._run(token, whole)
        graph, told = self._graphs[whole]
        if token is not self._chosen:
            self._token.copy_(token)
        graph.replay()
        self._chosen = told[0] if self.greedy else None
        return told

    @torch.no_grad()
    def take(self, state: list[Any]) -> None:
        """Go on from another state of as many sequences; on a GPU it is copied where it fits."""
        own, others = tensors_of(self.state), tensors_of(state)
        grows = any(isinstance(layer, GrowingState) for layer in state)  # whose length the host knows, too
        fits = not grows and [one.shape for one in own] == [one.shape for one in others]
        if self._graphs or (fits and own and own[0].is_cuda):
            torch._foreach_copy_(own, others)
        else:
            self.state = [layer.map(Tensor.contiguous) if isinstance(layer, State) else layer for layer in state]
        if self._places is not None and isinstance(self.model.backbone, UNet):
            self._places = self.model.backbone.places(self.state)

    def _go_on(self) -> int | None:
        """How many windows the next step completes, if known; moves the places of all one position on."""
        if self._places is None:
            return None
        whole = 0
        for number, (count, size) in enumerate(self._places):
            if whole < number:  # the window above is not complete
                break
            self._places[number] = ((count + 1) % size, size)
            whole += count + 1 == size
        return whole

    def _run(self, token: Tensor, whole: int | None) -> Any:
        step: Any = self.model.greedy_step_ if self.greedy else self.model.step_
        return step(token, self.state, self.condition, *(() if whole is None else (whole,)))

    def _run_on(self, token: Tensor, whole: int | None) -> Any:
        """The same, with the chosen token where the next step reads it."""
        told = self._run(token, whole)
        if self.greedy:
            token.copy_(told[0])
        return told

    def _first(self, token: Tensor, whole: int | None) -> Any:
        """Run the step on a side stream, as PyTorch requires before a capture, and see whether a capture is
        possible."""
        before = tensors_of(self.state)
        with torch.cuda.device(token.device), capture.capturing:
            told, waits = capture.warm_up(lambda: self._run(token, whole), torch.cuda.Stream())
            for tensor in told if self.greedy else (told,):
                tensor.record_stream(torch.cuda.current_stream())
        if self._token is None:
            self._token = token.clone()
        if any(one is not other for one, other in itertools.zip_longest(before, tensors_of(self.state))):
            self._may_capture = False
        elif waits:
            self._give_up("a step of the model waits for the GPU")
        return told

    def _capture(self, whole: int | None) -> None:
        token = self._token
        assert token is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(token.device), capture.capturing:
                told = capture.capture(graph, lambda: self._run_on(token, whole))
            self._graphs[whole] = graph, told
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self._may_capture = False
        warnings.warn(f"Decoding without a CUDA graph: {reason}.", RuntimeWarning, stacklevel=5)


def tensors_of(state: list[Any]) -> list[Tensor]:
    """All tensors of a state, in their order."""
    return [tensor for layer in state for tensor in layer.tensors().values()]


def can_replay(token: Tensor) -> bool:
    """Whether graphs are used here, whatever the model: on a CUDA device, without autocast, and none being captured."""
    return token.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


def can_capture(
    model: SequenceModel, state: list[Any], token: Tensor, modules: Sequence[nn.Module] | None = None
) -> bool:
    """Whether replaying the GPU's work of one step equals the step: nothing else changes between steps, and there are
    no hooks. modules: the model's, where they are at hand: walking through them takes time."""
    if not can_replay(token):
        return False
    modules = modules_of(model) if modules is None else modules
    if _has_any_global_hook() or any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return False
    if not all(module.bounded_state for module in modules if isinstance(module, Mixer)):
        return False
    if not isinstance(state, list) or not all(isinstance(layer, State) for layer in state):
        return False
    held = [tensor for m in modules for tensor in (*m._parameters.values(), *m._buffers.values())]
    tensors = [*tensors_of(state), *(tensor for tensor in held if tensor is not None)]
    return is_eager(*tensors) and all(isinstance(v, Tensor) and v.device == token.device for v in tensors)
