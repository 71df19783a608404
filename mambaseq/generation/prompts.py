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
    """A sequence in parts of at most `size` positions."""
    for start in range(0, len(row), size):
        yield row[start : start + size]


class Prompts:
    """Prompts of one length: `(length,)` or `(length, codes)` whole numbers each, or `(length, channels)` float32.

    device: of the parts that are read.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.length = len(rows[0]) if len(rows) else 0

    @classmethod
    def of(cls, values: Tensor) -> Prompts:
        """Of `(batch, length)` int64, or `(batch, length, ...)`; parts are on its device."""
        return cls(list(values.cpu().numpy()), values.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's: `(batch, length)`, or with codes or channels."""
        more = np.shape(self.rows[0][:1])[1:] if len(self.rows) else ()
        return (len(self.rows), self.length, *more)

    def read(self, start: int, stop: int) -> Tensor:
        """Positions `[start, stop)` of all, int64 or float32."""
        part = torch.from_numpy(np.stack([row[start:stop] for row in self.rows])).to(self.device)
        return part.float() if part.is_floating_point() else part.long()
