"""Sequences cut along time: which of them begin, go on and end in which piece."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Positions `begin` to `end`, with sequences `first` to `stop`. The first `carried_in` of them began in an earlier
    piece, the last `carried_out` continue in the next."""

    begin: int
    end: int
    first: int
    stop: int
    carried_in: int
    carried_out: int

    @property
    def entering(self) -> slice:
        """The sequences that begin here."""
        return slice(self.first + self.carried_in, self.stop)

    @property
    def finished(self) -> int:
        """How many of its sequences end here; these come first."""
        return self.stop - self.first - self.carried_out


def cut(cuts: Sequence[int], batch: int, bounds: Sequence[int] | None = None) -> list[Piece]:
    """The pieces between neighbouring cuts (from 0 to the length) of `batch` rows, or of one row of packed sequences.

    bounds: the starts of the packed sequences, and the length. Every sequence, also an empty one, begins in one piece
        and ends in one.
    """
    pieces: list[Piece] = []
    first = carried = 0
    for begin, end in itertools.pairwise(cuts):
        last = end == cuts[-1]
        if bounds is None:
            stop, out = batch, 0 if last else batch
        else:
            stop = first
            while stop < len(bounds) - 1 and (last or bounds[stop] < end):
                stop += 1
            out = int(bounds[stop] > end)
        pieces.append(Piece(begin, end, first, stop, carried, out))
        first, carried = stop - out, out
    return pieces
