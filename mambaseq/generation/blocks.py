"""Several known positions of one sequence in one call of the model: what its head tells after each, and the state after
as many of them as turn out to be right."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from mambaseq.backbones.residual import ResidualStack
from mambaseq.generation.decoder import Decoder, can_capture, tensors_of
from mambaseq.mixers.base import State
from mambaseq.mixers.growing import GrowingState
from mambaseq.models import SequenceModel
from mambaseq.ops.gpu import capture

# Positions of a call that CUDA graphs are captured for.
LENGTHS = (2, 4, 8, 16, 32)


class Blocks:
    """Reads positions of one sequence behind the state of a `Decoder`, which stays as it is until `keep`.

    Where every mixer gives its states after each position (see `Mixer.positions`), or has one that grows, any number of
    them can be kept; elsewhere all of a call or none, so that those which turn out to be right are read again with the
    next call. On a CUDA device calls of a few lengths are replayed from CUDA graphs, shorter ones padded.

    condition: as the model takes it, of the one sequence. cuda_graph: False never captures.
    """

    def __init__(self, model: SequenceModel, decoder: Decoder, condition: Tensor | None, cuda_graph: bool) -> None:
        self.model, self.decoder, self.condition = model, decoder, condition
        self._may_capture = cuda_graph and can_capture(model, decoder.state, next(model.parameters()))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, list[Any]]] = {}
        self._warm: set[int] = set()
        self._each: list[Any] | None = None  # states after each position
        self._last: list[Any] | None = None  # the state after the last one
        self._count = 0
        self._has_positions = type(model.backbone) is ResidualStack

    @property
    def has_lengths(self) -> bool:
        """Whether calls have one of `LENGTHS`, and shorter ones take as long."""
        return self._may_capture

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """tokens `(n,)` int64 to what the head tells after each, `(n, ...)`, which the next call may overwrite."""
        self._each = self._last = None
        self._count = n = len(tokens)
        length = next((length for length in LENGTHS if length >= n), 0)
        if self._may_capture and length:
            return self._captured(tokens, length)
        if self._has_positions and (told := self._run_positions(tokens)) is not None:
            return told
        told, self._last = self._run(tokens)
        return told

    def keep(self, n: int) -> int:
        """Let the decoder go on behind as many of the call's first `n` positions as is possible. Returns how many."""
        if self._each is not None:
            if n:
                at = torch.tensor([n - 1], device=tensors_of(self._each)[0].device)
                self.decoder.take([layer.select(at) for layer in self._each])
            return n
        if self._last is None or not n:
            return 0
        if n < self._count:
            cut = [_shorter(layer, self._count - n) for layer in self._last]
            if None in cut:
                return 0
            self._last = cut
        self.decoder.take([layer.map(Tensor.contiguous) if isinstance(layer, State) else layer for layer in self._last])
        self._last = None
        return n

    def advance(self, tokens: Tensor) -> None:
        """Let the decoder go on behind all tokens `(n,)`."""
        while len(tokens):
            n = len(tokens)
            if self.has_lengths:
                n = max((length for length in LENGTHS if length <= n), default=1)
            if n == 1:
                self.decoder.step(tokens[:1])
            else:
                self.run(tokens[:n])
                self.keep(n)
            tokens = tokens[n:]

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        model = self.model
        hidden, state = model.backbone(
            model.encoder(tokens[None], self.condition), state=self.decoder.state, return_state=True
        )
        return model.told(hidden)[0], state

    def _run_positions(self, tokens: Tensor) -> Tensor | None:
        backbone: Any = self.model.backbone
        found = backbone.positions(self.model.encoder(tokens[None], self.condition), self.decoder.state)
        if found is None:
            self._has_positions = False
            return None
        hidden, self._each = found
        return self.model.told(hidden)[0]

    def _captured(self, tokens: Tensor, length: int) -> Tensor:
        """From a graph: the first call of a length runs as usual, the second is captured."""
        n = len(tokens)
        padded = tokens if n == length else torch.cat([tokens, tokens.new_zeros(length - n)])
        if length not in self._warm:
            self._warm.add(length)
            with torch.cuda.device(tokens.device), capture.capturing:
                (told, state), waits = capture.warm_up(lambda: self._run(padded), torch.cuda.Stream())
                for tensor in (told, *tensors_of(state)):
                    tensor.record_stream(torch.cuda.current_stream())
            if waits:
                self._give_up("a call of the model waits for the GPU")
        elif length not in self._graphs and not self._capture(padded, length):
            told, state = self._run(padded)
        else:
            graph, held, told, state = self._graphs[length]
            held.copy_(padded)
            graph.replay()
        self._last = state if n == length else None
        return told[:n]

    def _capture(self, tokens: Tensor, length: int) -> bool:
        graph, held = torch.cuda.CUDAGraph(), tokens.clone()
        try:
            with torch.cuda.device(tokens.device), capture.capturing:
                told, state = capture.capture(graph, lambda: self._run(held))
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])
            return False
        self._graphs[length] = graph, held, told, state
        return True

    def _give_up(self, reason: str) -> None:
        self._may_capture = False
        warnings.warn(f"Drafts are checked without a CUDA graph: {reason}.", RuntimeWarning, stacklevel=4)


def _shorter(state: Any, less: int) -> Any:
    """A state without its last positions; None where it does not tell them apart."""
    if isinstance(state, GrowingState) and not _others(state):
        return dataclasses.replace(state, length=state.length - less, longest=state.longest - less)
    return state if isinstance(state, State) and not state.tensors() else None


def _others(state: GrowingState) -> bool:
    """Whether it holds more than rows of positions."""
    return bool(set(state.tensors()) - {*state.rows, "length"})
