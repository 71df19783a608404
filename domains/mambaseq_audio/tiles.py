"""Sets in which every sample is a target exactly once, and next-sample batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.windows import Interval

MakeItem = Callable[[Interval, int, int, Any], Batch]
"""An interval, the place and the number of tokens of it, and a condition or None, to a batch of one."""


def next_sample(previous: int, levels: np.ndarray, condition: int | tuple[int, ...] | None = None) -> Batch:
    """A batch whose targets are `levels`, `(length,)`; inputs are the same shifted by one, starting with `previous`."""
    targets = torch.from_numpy(levels.astype(np.int64))
    inputs = torch.cat([torch.tensor([previous]), targets[:-1]])
    return Batch(
        inputs=inputs[None],
        targets=targets[None],
        condition=None if condition is None else torch.tensor([condition]),
    )


class Tiles:
    """Intervals cut into pieces of at most `length` targets; the last piece of an interval may be shorter.

    first: the input before an interval's first sample, which is then predicted too; None makes that sample an input
        only, for intervals that begin within a recording.
    conditions: one for each interval, an id or a row (see `mambaseq.conditions`). make: makes items of something else
        than samples.
    """

    def __init__(
        self,
        intervals: Sequence[Interval],
        length: int,
        *,
        first: int | None = None,
        conditions: Sequence[int] | Sequence[tuple[int, ...]] | None = None,
        make: MakeItem | None = None,
    ) -> None:
        self.intervals, self.first, self.conditions, self.make = intervals, first, conditions, make
        skipped = 1 if first is None else 0
        self._pieces = [
            (which, start, min(start + length, interval.stop))
            for which, interval in enumerate(intervals)
            for start in range(interval.start + skipped, interval.stop, length)
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def beginnings(self) -> list[int]:
        """The first piece of each interval."""
        return [i for i, (which, _, _) in enumerate(self._pieces) if not i or which != self._pieces[i - 1][0]]

    def levels(self, index: int, most: int) -> np.ndarray:
        """The levels of an interval from a piece on, at most so many: `(length,)`."""
        which, start, _ = self._pieces[index]
        interval = self.intervals[which]
        return interval.read(start, min(interval.stop - start, most))

    def __getitem__(self, index: int) -> Batch:
        which, start, stop = self._pieces[index]
        interval = self.intervals[which]
        condition = None if self.conditions is None else self.conditions[which]
        if self.make is not None:
            return self.make(interval, start, stop - start, condition)
        if start == interval.start:
            assert self.first is not None
            return next_sample(self.first, interval.read(start, stop - start), condition)
        levels = interval.read(start - 1, stop - start + 1)
        return next_sample(int(levels[0]), levels[1:], condition)
