"""How kernels that are vectorised over channels cut their work into tasks.

Only shapes decide, so results never depend on the number of threads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops import sequences

# Tasks to aim at: enough for many threads, few enough that their partial sums stay small.
_TASKS = 64


class Blocks(NamedTuple):
    """Channels cut into blocks of at most `width`, none across two groups."""

    first: np.ndarray  # (blocks,) int64
    width: np.ndarray  # (blocks,) int64
    group: np.ndarray  # (blocks,) int64
    channel: Tensor  # (blocks, width) int64, `channels` where there is none
    real: Tensor  # (blocks, width) bool, whether there is one

    def spread(self, value: Tensor) -> Tensor:
        """`(channels, …)` → `(blocks, width, …)`, zero where there is no channel."""
        return torch.cat([value, torch.zeros_like(value[:1])])[self.channel]

    def gather(self, value: Tensor) -> Tensor:
        """`(blocks, width, …)` → `(channels, …)`."""
        return value[self.real]


@functools.cache
def of_channels(channels: int, groups: int, width: int) -> Blocks:
    """Cut `channels` into blocks of at most `width`, each inside of one group of `channels / groups`. Cached."""
    per_group = channels // groups
    starts = np.arange(0, per_group, width)
    first = (np.arange(groups)[:, None] * per_group + starts).reshape(-1)  # (blocks,)
    group = np.repeat(np.arange(groups), len(starts))
    widths = np.minimum(width, (group + 1) * per_group - first)
    column = np.arange(width)
    real = column < widths[:, None]  # (blocks, width)
    channel = np.where(real, first[:, None] + column, channels)  # (blocks, width)
    return Blocks(first, widths, group, torch.from_numpy(channel), torch.from_numpy(real))


def bounds_of(cu_seqlens: Tensor | None, batch: int, length: int) -> np.ndarray:
    """`(sequences + 1,)` int64: the rows of each sequence among `batch · length`."""
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * length
    return np.array(sequences.offsets(cu_seqlens, length), dtype=np.int64)


def tasks_of(blocks: Blocks, bounds: np.ndarray) -> np.ndarray:
    """`(tasks, 6)` int64: block, first channel, width, group, first and end sequence; blocks run fastest."""
    n_blocks, n_sequences = len(blocks.first), len(bounds) - 1
    n_parts = max(1, min(n_sequences, -(-_TASKS // max(1, n_blocks))))
    cuts = np.searchsorted(bounds, np.linspace(0, bounds[-1], n_parts + 1))
    cuts[0], cuts[-1] = 0, n_sequences
    tasks = np.empty((n_parts, n_blocks, 6), dtype=np.int64)
    tasks[..., 0] = np.arange(n_blocks)
    tasks[..., 1], tasks[..., 2], tasks[..., 3] = blocks.first, blocks.width, blocks.group
    tasks[..., 4], tasks[..., 5] = cuts[:-1, None], cuts[1:, None]
    return tasks.reshape(-1, 6)
