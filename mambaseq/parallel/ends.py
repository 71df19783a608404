"""All ranks run a layer at once: what a layer says of the ends of a rank's piece of the sequences, and what it hears.

Where a state is a sum over positions, each decayed by a known factor, a rank need not wait for the state that the one
before it leaves. It knows what its own positions add to it and by how much they decay what comes in (a summary), all
ranks gather these, and each makes the state that enters its piece of them. Then the layer runs as on one device. In the
backward pass a rank knows what its positions add to the gradient of the state before them, and the same is done the
other way round. So each rank's recurrence has its true first state, and its last one its true gradient: nothing is
corrected afterwards.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.parallel.context import Context, Gathering
from mambaseq.parallel.parts import Part
from mambaseq.parallel.pieces import Piece

_ENDS: contextvars.ContextVar[Ends | None] = contextvars.ContextVar("ends", default=None)


def current() -> Ends | None:
    """The ends of the layer that is being run; None where it has whole sequences, or its states are handed on."""
    return None if torch.compiler.is_compiling() else _ENDS.get()


def _goes_through(piece: Piece, packed: bool) -> bool:
    """Whether what enters a piece is of the sequences that leave it."""
    return bool(piece.carried_in and piece.carried_out) and (not packed or piece.stop - piece.first == 1)


class Ends:
    """One layer over this rank's one piece.

    rows: sequences that may lie across ranks: all of a batch, one of a packed row. arriving, leaving: which of the
        piece's sequences come from another rank, and go on to one. begin, end: where in this rank's row the arriving
        ones end, and the leaving ones begin. length: of it. goes_through: they are the same.

    All ranks ask the same of theirs, in the same order. What was heard is kept, so that the layer may be run again
    (checkpoints) without a word.
    """

    def __init__(self, part: Part) -> None:
        (index,) = part.mine
        pieces, packed, rank = part.pieces, part.bounds is not None, part.context.rank
        piece, length = pieces[index], part.length
        self.length = length
        self.context: Context = part.context
        self.rows = 1 if packed else part.batch
        n = self.n = piece.stop - piece.first
        self.arriving, self.leaving = slice(0, piece.carried_in), slice(n - piece.carried_out, n)
        bounds = part.segment_bounds
        self.begin, self.end = (length, 0) if bounds is None else (bounds[1], bounds[-2])
        self.goes_through = _goes_through(piece, packed)
        # the ranks whose summaries make what enters this piece, and the gradient of what leaves it; the nearest first
        self.before = self._reach(pieces, packed, range(rank - 1, -1, -1)) if piece.carried_in else []
        self.after = self._reach(pieces, packed, range(rank + 1, len(pieces))) if piece.carried_out else []
        self._counts = [self._positions(part, n) for n in range(len(pieces))]
        self._heard: list[list[list[Tensor]]] = []
        self._again = 0
        self._ran = False

    @staticmethod
    def _reach(pieces: Sequence[Piece], packed: bool, ranks: range) -> list[int]:
        found = []
        for rank in ranks:
            found.append(rank)
            if not _goes_through(pieces[rank], packed):
                break
        return found

    @staticmethod
    def _positions(part: Part, index: int) -> int | None:
        """How many positions a piece has of what leaves it; None if this begins there."""
        piece = part.pieces[index]
        return piece.end - piece.begin if _goes_through(piece, part.bounds is not None) else None

    @property
    def arrives(self) -> bool:
        return self.arriving.stop > self.arriving.start

    @property
    def leaves(self) -> bool:
        return self.leaving.stop > self.leaving.start

    def call(self, layer: Callable[..., Any], *arguments: Any) -> Any:
        """Run the layer, the first time or again."""
        self._again, again = 0, self._ran
        token = _ENDS.set(self)
        try:
            found = layer(*arguments)
        finally:
            _ENDS.reset(token)
            self._ran = True
        assert not again or self._again == len(self._heard)
        return found

    def with_rows(self, given: Tensor | None, arriving: Tensor | None) -> Tensor | None:
        """States `(sequences, ...)` of which those that arrive are others; without gradients."""
        if arriving is None:
            return given
        state = arriving.new_zeros(self.n, *arriving.shape[1:])
        if given is not None:
            state.copy_(given.detach())
        state[self.arriving] = arriving
        return state

    def begin_gather(self, tensors: Sequence[Tensor]) -> Gathering | None:
        """Send every rank these tensors, of the same kinds on all. Does not wait."""
        return None if self._ran else self.context.begin_gather(tensors)

    @property
    def replays(self) -> bool:
        """Whether the layer is run again."""
        return self._ran

    def gathered(self, gathering: Gathering | None) -> list[list[Tensor]]:
        """The tensors of each rank."""
        if gathering is not None:
            self._heard.append(gathering.wait())
        self._again += 1
        return self._heard[self._again - 1]

    # the state of a recurrence

    def entering(self, everyone: list[list[Tensor]]) -> Tensor | None:
        """The state `(rows, ...)` that enters this piece. everyone: what each rank's positions make of no state, or of
        a given one where the sequence begins there, and the factors that they decay a state by."""
        return self._chained(self.before, [(local, decay) for local, decay in everyone])

    def gradient_of_leaving(self, everyone: list[Tensor], decays: list[Tensor]) -> Tensor | None:
        """The gradient `(rows, ...)` of the state that leaves this piece. everyone: of each rank, that of the state
        that enters it, as far as its own positions make it."""
        return self._chained(self.after, [(g, d.conj()) for g, d in zip(everyone, decays, strict=True)])

    @staticmethod
    def _chained(ranks: list[int], of: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        total = None
        for rank in reversed(ranks):
            more, decay = of[rank]
            total = more if total is None else more + decay * total
        return total

    # the last inputs of a convolution

    def halo(self, everyone: list[Tensor]) -> Tensor | None:
        """The inputs `(rows, channels, width)` before this piece. everyone: of each rank, the last inputs of what
        leaves it, as many, those before its own positions left empty."""
        if not self.before:
            return None
        width = everyone[0].shape[-1]
        return torch.cat([everyone[rank][..., width - n :] for rank, n in self._taken(self.context.rank, width)], -1)

    def gradient_of_tail(self, everyone: list[Tensor]) -> Tensor | None:
        """The gradient of what this rank gave to `halo`. everyone: of each rank, that of its halo."""
        if not self.after:
            return None
        width, rank = everyone[0].shape[-1], self.context.rank
        total = torch.zeros_like(everyone[0])
        for other in self._reaching(width):
            at = 0
            for source, n in self._taken(other, width):
                if source == rank:
                    total[..., width - n :] += everyone[other][..., at : at + n]
                at += n
        return total

    def _taken(self, rank: int, width: int) -> list[tuple[int, int]]:
        """Which ranks' inputs, and how many, the halo of a rank is made of; the earliest first."""
        found: list[tuple[int, int]] = []
        for source in range(rank - 1, -1, -1):
            have = self._counts[source]
            n = width if have is None else min(width, have)
            found.append((source, n))
            width -= n
            if not width:
                break
        return found[::-1]

    def _reaching(self, width: int) -> list[int]:
        """The ranks whose halo may have some of this rank's inputs."""
        return [other for other in self.after if any(s == self.context.rank for s, _ in self._taken(other, width))]


class Enter(torch.autograd.Function):
    """States `(sequences, ...)` of which those that arrive are replaced. What these have for a gradient the rank before
    has been told already."""

    @staticmethod
    def forward(ctx: Any, ends: Ends, given: Tensor, entering: Tensor) -> Tensor:
        ctx.rows = ends.arriving
        state = given.to(torch.promote_types(given.dtype, entering.dtype), copy=True)
        ctx.dtype = given.dtype
        state[ends.arriving] = entering
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor, None]:
        d = d.to(ctx.dtype, copy=True)
        d[ctx.rows] = 0
        return None, d, None


class Halo(torch.autograd.Function):
    """The inputs of a convolution, and those before them. What passes through makes every rank's backward pass come by,
    also that of one to which nothing arrives."""

    @staticmethod
    def forward(ctx: Any, ends: Ends, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ends, ctx.like = ends, tail.new_empty(0)
        ctx.shape = tail.shape
        found = ends.halo([tail for (tail,) in ends.gathered(ends.begin_gather([tail]))])
        ctx.set_materialize_grads(False)
        return x.view_as(x), tail.new_zeros(tail.shape) if found is None else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, d: Tensor | None) -> tuple[None, Tensor | None, Tensor | None]:
        d = ctx.like.new_zeros(ctx.shape) if d is None else d.contiguous()
        everyone = ctx.ends.context.begin_gather([d]).wait()
        return None, dx, ctx.ends.gradient_of_tail([one for (one,) in everyone])
