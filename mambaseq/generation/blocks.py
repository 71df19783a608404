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
from mambaseq.ops import sequences
from mambaseq.ops.gpu import capture

# Guesses of a call at most.
MOST_GUESSES = 15
# Positions of packed calls: the second has room for as many guesses behind as many positions that are read again.
PACKS = (16, 3 * (MOST_GUESSES + 1))


class Blocks:
    """Reads positions of one sequence behind the state of a `Decoder`, which stays as it is until `keep`: first what is
    known (`unread`, one position or more), then guesses.

    The state is then had behind those guesses that were right, in one of three ways. Where every mixer gives its states
    after each position (see `Mixer.positions`) or has one that grows, it is there. In packed calls two copies of the
    state go on side by side, over what is known, and over that and the guesses: so what was right is known at the next
    call, and read again with it. Elsewhere the same is read again until all of a call's guesses are right.

    condition: as the model takes it, of the one sequence. cuda_graph: on a CUDA device calls are packed, to one of a
        few lengths, and replayed from CUDA graphs; False never captures. packed: of the tests, packed on any device.

    Attributes:
        captures: whether calls are, or will be, replayed; they are for the next sequence, too (see `Decoder.take`).
    """

    def __init__(
        self,
        model: SequenceModel,
        decoder: Decoder,
        condition: Tensor | None,
        cuda_graph: bool = True,
        packed: bool = False,
    ) -> None:
        self.model, self.decoder, self.condition = model, decoder, condition
        self.captures = cuda_graph and can_capture(model, decoder.state, next(model.parameters()))
        self.packed = packed or self.captures
        self._graphs: dict[int, _Graph] = {}
        self._warm: set[int] = set()
        self._has_positions = type(model.backbone) is ResidualStack
        # of the last call
        self._unread = self._guesses = 0
        self._each: list[Any] | None = None  # states after each position
        self._packs: list[Any] | None = None  # after what was known, after all
        self._last: list[Any] | None = None  # after all

    def size(self, unread: int, guesses: int) -> int:
        """What decides how long a call takes."""
        if self.packed:
            return next((size for size in PACKS if size >= 2 * unread + guesses), 0)
        return 1 << (unread + guesses - 1).bit_length()

    @torch.no_grad()
    def run(self, unread: Tensor, guesses: Tensor) -> Tensor:
        """unread `(u,)`, guesses `(n,)` int64 to what the head tells after the last unread position and after each
        guess, `(n + 1, ...)`, which the next call may overwrite."""
        self._each = self._packs = self._last = None
        self._unread, self._guesses = len(unread), len(guesses)
        if self.packed and (size := self.size(len(unread), len(guesses))):
            told = self._run_packed(unread, guesses, size)
            return told[2 * len(unread) - 1 :][: len(guesses) + 1]
        tokens = torch.cat([unread, guesses])
        told_each = self._run_positions(tokens) if self._has_positions else None
        if told_each is None:
            model = self.model
            x = model.encoder(tokens[None], self.condition)
            hidden, self._last = model.backbone(x, state=self.decoder.state, return_state=True)
            told_each = model.told(hidden[:, len(unread) - 1 :])[0]
        else:
            told_each = told_each[len(unread) - 1 :]
        return told_each

    def keep(self, right: int) -> int:
        """Let the decoder go on, where so many guesses were right. Returns behind how many of the unread positions and
        right guesses it is."""
        n = self._unread + right
        if self._each is not None:
            self._take(self._each, n - 1)
            return n
        if self._packs is not None:
            whole = right == self._guesses
            self._take(self._packs, int(whole))
            return n if whole else self._unread
        if self._last is None:
            return 0
        if right < self._guesses:
            cut = [_shorter(layer, self._guesses - right) for layer in self._last]
            if None in cut:
                return 0
            self._last = cut
        self.decoder.take(self._last)
        self._last = None
        return n

    def advance(self, tokens: Tensor) -> None:
        """Let the decoder go on behind all tokens `(n,)`, at least one."""
        if len(tokens) == 1:
            self.decoder.step(tokens)
            return
        self.run(tokens, tokens[:0])
        self.keep(0)

    def _take(self, states: list[Any], number: int) -> None:
        """Go on from one of several, which nothing else uses."""
        if any(isinstance(layer, GrowingState) for layer in states):
            at = torch.tensor([number], device=next(self.model.parameters()).device)
            self.decoder.take([layer.select(at) for layer in states])
        else:  # a GPU copies all of them by one kernel, and waits for nothing
            self.decoder.take([layer.map(lambda tensor: tensor[number : number + 1]) for layer in states])

    def _run_positions(self, tokens: Tensor) -> Tensor | None:
        backbone: Any = self.model.backbone
        found = backbone.positions(self.model.encoder(tokens[None], self.condition), self.decoder.state)
        if found is None:
            self._has_positions = False
            return None
        hidden, self._each = found
        return self.model.told(hidden)[0]

    def _run_packed(self, unread: Tensor, guesses: Tensor, size: int) -> Tensor:
        """What is known, the same with the guesses, and padding; what the head tells of all, `(size, ...)`. The first
        call of a size on a GPU runs as usual, the second is captured."""
        u, n = len(unread), len(guesses)
        row = torch.cat([unread, unread, guesses, unread.new_zeros(size - 2 * u - n)])
        bounds = torch.tensor([0, u, 2 * u + n, size], dtype=torch.int32).to(row.device)
        if not self.captures:
            told, self._packs = self._read(row, bounds)
        elif size not in self._warm:
            self._warm.add(size)
            with torch.cuda.device(row.device), capture.capturing:
                (told, self._packs), waits = capture.warm_up(lambda: self._read(row, bounds), torch.cuda.Stream())
                for tensor in (told, *tensors_of(self._packs or [])):
                    tensor.record_stream(torch.cuda.current_stream())
            if waits:
                self._give_up("a call of the model waits for the GPU")
        elif size not in self._graphs and (reason := self._capture(row, bounds, size)) is not None:
            self._give_up(reason)
            told, self._packs = self._read(row, bounds)
        else:
            graph = self._graphs[size]
            graph.row.copy_(row)
            graph.bounds.copy_(bounds)
            graph.graph.replay()
            told, self._packs = graph.told, graph.states
        return told

    def _read(self, row: Tensor, bounds: Tensor) -> tuple[Tensor, list[Any]]:
        """Three packed sequences, from the state each; what the head tells of all, and the states of all."""
        model, fork = self.model, torch.zeros(3, dtype=torch.int64, device=row.device)
        state = [layer.select(fork) for layer in self.decoder.state]
        x = model.encoder(row[None], self.condition)  # the same for all, and each position by itself
        with sequences.shared_tables():  # each layer would make them anew, by more kernels than all else takes
            hidden, new = model.backbone(x, state=state, cu_seqlens=bounds, return_state=True)
        return model.told(hidden)[0], new

    def _capture(self, row: Tensor, bounds: Tensor, size: int) -> str | None:
        """Returns why it cannot be done."""
        graph, row, bounds = torch.cuda.CUDAGraph(), row.clone(), bounds.clone()
        try:
            with torch.cuda.device(row.device), capture.capturing:
                told, states = capture.capture(graph, lambda: self._read(row, bounds))
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        self._graphs[size] = _Graph(graph, row, bounds, told, states)
        return None

    def _give_up(self, reason: str) -> None:
        self.packed = self.captures = False
        warnings.warn(f"Drafts are checked without a CUDA graph: {reason}.", RuntimeWarning, stacklevel=5)


@dataclasses.dataclass
class _Graph:
    """What it reads from and writes to, in memory of its own."""

    graph: torch.cuda.CUDAGraph
    row: Tensor
    bounds: Tensor
    told: Tensor
    states: list[Any]


def _shorter(state: Any, less: int) -> Any:
    """A state without its last positions; None where it does not tell them apart."""
    if isinstance(state, GrowingState) and not set(state.tensors()) - {*state.rows, "length"}:
        return dataclasses.replace(state, length=state.length - less, longest=state.longest - less)
    return state if isinstance(state, State) and not state.tensors() else None
