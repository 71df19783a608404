"""Prompts of any length, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_PART = 1 << 16  # positions at a time where no number of them is asked for


class Row(Protocol):
    """A sequence that gives parts of itself: an array, or `mambaseq.data.spooled.Spooled`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def parts(row: Row, size: int = _PART) -> Iterator[np.ndarray]:
    """A sequence, `(length, ...)`, in parts of at most `size` positions."""
    for start in range(0, len(row), size):
        yield row[start : start + size]


class Prompts:
    """Prompts: `(length,)` or `(length, codes)` whole numbers each, or `(length, channels)` float32.

    device: of the parts that are read. lengths: of each.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows: Sequence[Row] | None = rows
        self._whole: Tensor | None = None  # of all, where they are given so
        self.device = device
        self.lengths = [len(row) for row in rows]

    @classmethod
    def of(cls, values: Tensor | Sequence[Tensor]) -> Prompts:
        """Of `(batch, length)` int64, or `(batch, length, ...)`, or of one tensor each; parts are on its device. One
        tensor stays where it is, and is looked at by the host if `rows` are."""
        if not isinstance(values, Tensor):
            return cls([one.cpu().numpy() for one in values], values[0].device if values else torch.device("cpu"))
        made = cls([], values.device)
        made._rows, made._whole, made.lengths = None, values.detach(), [values.shape[1]] * len(values)
        return made

    @property
    def rows(self) -> Sequence[Row]:
        """Each of them, for the host."""
        if self._rows is None:
            assert self._whole is not None
            self._rows = list(self._whole.cpu().numpy())
        return self._rows

    def __len__(self) -> int:
        return len(self.lengths)

    def only(self, numbers: Sequence[int]) -> Prompts:
        """Some of them."""
        if self._whole is not None:
            return Prompts.of(self._whole[list(numbers)])
        return Prompts([self.rows[number] for number in numbers], self.device)

    def read(self, start: int, stop: int) -> Tensor:
        """Positions `[start, stop)` of all, which have one length, int64 or float32."""
        if self._whole is not None:
            part = self._whole[:, start:stop].contiguous()
        else:
            part = torch.from_numpy(np.stack([row[start:stop] for row in self.rows])).to(self.device)
        return part.float() if part.is_floating_point() else part.long()
