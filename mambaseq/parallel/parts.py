"""What a rank has of sequences that are split along time."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.parallel.pieces import Piece

if TYPE_CHECKING:
    from mambaseq.parallel.context import Context

_CURRENT: contextvars.ContextVar[Part | None] = contextvars.ContextVar("part", default=None)


def current() -> Part | None:
    """The part that the calls of this thread are for: that of the innermost `with part:`. None in graphs that are
    compiled, which are of whole sequences."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


class Part:
    """A rank's positions of split sequences, made by `Context.split`. Within `with part:` a model takes them for its
    whole input, and returns what belongs to them.

    Piece n belongs to rank n modulo the number of ranks; a rank's pieces lie one after the other in its row. States
    given to a model are those of the sequences that begin on this rank (`entering`), and states returned those of the
    sequences that end on it (`finished`).
    """

    def __init__(self, context: Context, pieces: list[Piece], batch: int, bounds: list[int] | None) -> None:
        self.context, self.pieces, self.batch, self.bounds = context, pieces, batch, bounds
        self.mine = list(range(context.rank, len(pieces), context.size))
        self._tokens: list[contextvars.Token[Part | None]] = []

    @property
    def length(self) -> int:
        """Positions on this rank."""
        return sum(self.pieces[n].end - self.pieces[n].begin for n in self.mine)

    @property
    def n_sequences(self) -> int:
        """All sequences, on whichever rank."""
        return self.batch if self.bounds is None else len(self.bounds) - 1

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of x, whose dimension `dim` is time."""
        parts = [x.narrow(dim, self.pieces[n].begin, self.pieces[n].end - self.pieces[n].begin) for n in self.mine]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def share(self, whole: Batch) -> Batch:
        """This rank's part of a batch. Targets of sequences are on every rank; units are counted on the first."""
        condition, units = whole.condition, whole.n_units
        if condition is not None and self.bounds is not None:
            condition = condition[torch.tensor(self.segments, device=condition.device)]
        if units is not None and self.context.rank:
            units = torch.zeros_like(units)
        return dataclasses.replace(
            whole,
            inputs=self.take(whole.inputs),
            targets=whole.targets if whole.targets is None or not whole.per_token else self.take(whole.targets),
            mask=None if whole.mask is None else self.take(whole.mask),
            cu_seqlens=self.cu_seqlens(whole.inputs.device),
            condition=condition,
            n_units=units,
        )

    def positions(self, device: torch.device | None = None) -> Tensor:
        """`(length,)` int64, rising: where in its whole row each position of this rank stands."""
        pieces = [self.pieces[n] for n in self.mine]
        return torch.cat([torch.arange(piece.begin, piece.end, device=device) for piece in pieces])

    @functools.cached_property
    def segments(self) -> list[int]:
        """The sequence of each stretch of this rank's row, in order; a packed one once for each piece that it is in."""
        if self.bounds is None:
            return list(range(self.batch))
        return [number for n in self.mine for number in range(self.pieces[n].first, self.pieces[n].stop)]

    @functools.cached_property
    def segment_bounds(self) -> list[int] | None:
        """`cu_seqlens` of this rank's row, a sequence for each of `segments`; None if nothing is packed."""
        if self.bounds is None:
            return None
        found, at = [], 0
        for n in self.mine:
            begin, end, first, stop, *_ = self.pieces[n]
            found += [at + min(max(self.bounds[s], begin), end) - begin for s in range(first, stop)]
            at += end - begin
        return [*found, at]

    def cu_seqlens(self, device: torch.device | str | None = None) -> Tensor | None:
        """`segment_bounds` as int32, or None."""
        bounds = self.segment_bounds
        return None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)

    @functools.cached_property
    def entering(self) -> list[int]:
        """The sequences that begin here, in order."""
        return [s for n in self.mine for s in range(self.pieces[n].stop)[self.pieces[n].entering]]

    @functools.cached_property
    def finished(self) -> list[int]:
        """The sequences that end here, in order."""
        return [
            s for n in self.mine for s in range(self.pieces[n].first, self.pieces[n].first + self.pieces[n].finished)
        ]

    def __enter__(self) -> Part:
        self.context.finish()
        self._tokens.append(_CURRENT.set(self))
        return self

    def __exit__(self, *error: Any) -> None:
        _CURRENT.reset(self._tokens.pop())
