"""A model's step together with its state; on a GPU replayed from a CUDA graph, since launching a token's many small
kernels one by one takes longer than they run."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel
from mambaseq.ops import capture
from mambaseq.ops.eager import is_eager


class Decoder:
    """One position after the other: a token of each sequence in, its logits out.

    On a CUDA device the first step runs as it is and the second is captured in a CUDA graph, which every later step
    replays. What cannot be captured runs step by step: on other devices, under autocast, with hooks, with mixers
    whose state grows or is not changed in place, or that wait for the GPU (a RuntimeWarning names those).

    Args:
        model: its weights may change in place while it is decoded, but must not be replaced or moved.
        state: one a layer, of `model.init_state` or a prefill; changed in place.
        condition: `(batch,)` int64 for conditional models.
        cuda_graph: False never captures.
    """

    def __init__(
        self, model: SequenceModel, state: list[Any], condition: Tensor | None = None, *, cuda_graph: bool = True
    ) -> None:
        self.model, self.state, self.condition = model, state, condition
        self._may_capture = cuda_graph
        self._token: Tensor | None = None
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a graph."""
        return self._graph is not None

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """token `(batch,)` int64 to logits `(batch, vocab_size)` fp32, which the next step may overwrite."""
        if self._graph is None and self._may_capture:
            if self._token is None:
                self._may_capture = _can_capture(self.model, self.state, token)
                if self._may_capture:
                    return self._first(token)
            else:
                self._capture()
        if self._graph is None:
            return self._run(token)
        assert self._token is not None
        assert self._logits is not None
        self._token.copy_(token)
        self._graph.replay()
        return self._logits

    def _run(self, token: Tensor) -> Tensor:
        return self.model.step_(token, self.state, self.condition)

    def _first(self, token: Tensor) -> Tensor:
        """Takes the step on a side stream, as PyTorch asks for before a capture, and looks whether there can be one."""
        before = _tensors(self.state)
        with torch.cuda.device(token.device), capture.capturing:
            logits, waits = capture.warm_up(lambda: self._run(token), torch.cuda.Stream())
            logits.record_stream(torch.cuda.current_stream())
        self._token = token.clone()
        if any(one is not other for one, other in itertools.zip_longest(before, _tensors(self.state))):
            self._may_capture = False
        elif waits:
            self._give_up("a step of the model waits for the GPU")
        return logits

    def _capture(self) -> None:
        token = self._token
        assert token is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(token.device), capture.capturing:
                self._logits = capture.capture(graph, lambda: self._run(token))
            self._graph = graph
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self._may_capture = False
        warnings.warn(f"Decoding without a CUDA graph: {reason}.", RuntimeWarning, stacklevel=5)


def _tensors(state: list[Any]) -> list[Tensor]:
    return [tensor for layer in state for tensor in layer.tensors().values()]


def _can_capture(model: SequenceModel, state: list[Any], token: Tensor) -> bool:
    """Whether replaying what the GPU did in one step may stand for the step: nothing else changes from one to the next,
    and nobody watches."""
    if not token.is_cuda or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return False
    if _has_any_global_hook() or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    if not all(module.bounded_state for module in model.modules() if isinstance(module, Mixer)):
        return False
    if not isinstance(state, list) or not all(isinstance(layer, State) for layer in state):
        return False
    tensors = [*_tensors(state), *model.parameters(), *model.buffers()]
    return is_eager(*tensors) and all(isinstance(v, Tensor) and v.device == token.device for v in tensors)
