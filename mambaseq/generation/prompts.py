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
        self.rows, self.device = rows, device
        self.lengths = [len(row) for row in rows]

    @classmethod
    def of(cls, values: Tensor | Sequence[Tensor]) -> Prompts:
        """Of `(batch, length)` int64, or `(batch, length, ...)`, or of one tensor each; parts are on its device."""
        return cls([one.cpu().numpy() for one in values], values[0].device if len(values) else torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, numbers: Sequence[int]) -> Prompts:
        """Some of them."""
        return Prompts([self.rows[number] for number in numbers], self.device)

    def read(self, start: int, stop: int) -> Tensor:
        """Positions `[start, stop)` of all, which have one length, int64 or float32."""
        part = torch.from_numpy(np.stack([row[start:stop] for row in self.rows])).to(self.device)
        return part.float() if part.is_floating_point() else part.long()
