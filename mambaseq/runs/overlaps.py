"""Answers for positions from windows that overlap, or from both strands, as one answer a position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from mambaseq.errors import ConfigError, shown
from mambaseq.runs.answers import Found, Span

Merge = Literal["mean", "centre"]


class Merger:
    """A weighted mean for each position, or bin of positions, of one record.

    how: "mean" weighs all windows alike; "centre" by the distance to the window's nearer end, in positions or bins: 1,
        2, 3, ... from either end, so that answers with little around them count little.
    Only what may still change is kept. Raises ConfigError for another way.
    """

    def __init__(self, how: Merge = "mean") -> None:
        if how not in get_args(Merge):
            raise ConfigError(f"--merge is mean or centre, not {shown(how)}.")
        self.how = how
        self._reset()

    def _reset(self) -> None:
        self._start = self._stop = 0
        self._step = 1
        self._total: np.ndarray | None = None
        self._weight = np.zeros(0)
        self._covered = np.zeros(0, dtype=bool)

    def _room(self, found: Found) -> np.ndarray:
        if self._total is None:
            self._start, self._stop, self._step = found.start, found.stop, found.step
            self._total = np.zeros((0, found.values.shape[1]))
        self._stop = max(self._stop, found.stop)
        more = -(-(self._stop - self._start) // self._step) - len(self._weight)
        if more > 0:
            self._total = np.concatenate([self._total, np.zeros((more, self._total.shape[1]))])
            self._weight = np.concatenate([self._weight, np.zeros(more)])
            self._covered = np.concatenate([self._covered, np.zeros(more, dtype=bool)])
        return self._total

    def add(self, found: Found, window: Span | None = None) -> None:
        """found: begins at or behind what `before` gave last, with whole steps between. window: what it was read in."""
        total = self._room(found)
        first = (found.start - self._start) // self._step
        place = slice(first, first + len(found.values))
        weights = np.ones(len(found.values))
        if self.how == "centre" and window is not None:
            bins = -(-(window.stop - window.start) // self._step)
            number = (found.start - window.start) // self._step + np.arange(len(found.values))
            weights = np.minimum(number + 1, bins - number).astype(np.float64)
        if found.known is not None:
            weights = weights * found.known
        total[place] += weights[:, None] * found.values
        self._weight[place] += weights
        self._covered[place] = True

    def before(self, place: int | None = None) -> Iterator[Found]:
        """What lies before a position, or all of it, in order; it is forgotten."""
        if self._total is None:
            return
        count = len(self._weight)
        if place is not None:
            count = min(max((place - self._start) // self._step, 0), count)
        covered, weight, total = self._covered[:count], self._weight[:count], self._total[:count]
        edges = np.flatnonzero(np.diff(covered, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            known = weight[first:last] > 0
            values = total[first:last] / np.where(known, weight[first:last], 1)[:, None]
            start = self._start + first * self._step
            stop = min(self._start + last * self._step, self._stop)
            yield Found(start, stop, self._step, values.astype(np.float32), None if known.all() else known)
        if count == len(self._weight):
            self._reset()
            return
        self._start += count * self._step
        self._total, self._weight, self._covered = self._total[count:], self._weight[count:], self._covered[count:]
