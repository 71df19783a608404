"""How a scan on a GPU is cut along time, so that short batches fill the machine too."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Steps between two checkpoints of the state; segments are multiples of it.
EVERY = 16
# Blocks a multiprocessor that sequences are cut for where there would be less than one, and the shortest segment that
# is worth its two passes.
_BLOCKS, _SHORTEST = 4, 128


class Segments(NamedTuple):
    """Tables on the device, a row a segment, in the order of processing; sequences one after the other."""

    row0: Tensor  # (segments,) int64: first row
    length: Tensor  # (segments,) int32; 0 for one that is not used
    sequence: Tensor  # (segments,) int32
    flags: Tensor  # (segments,) int32: 1 for the first of its sequence, 2 for the last
    checkpoint: Tensor  # (segments,) int64: number of its first checkpoint
    begin: Tensor  # (sequences,) int64: first segment
    pieces: Tensor  # (sequences,) int64: how many of them
    cut: bool  # whether a sequence may have several


def steps_of(n_sequences: int, length: int, channel_blocks: int, processors: int, packed: bool) -> int:
    """Steps of a segment, for sequences of `length` (or packed into one row of it)."""
    blocks = n_sequences * channel_blocks
    wanted = _BLOCKS * processors
    if packed:
        # A sequence takes at least one segment, however short: segments must not be much longer than sequences.
        longest = max(_SHORTEST, -(-length // max(1, n_sequences)) * 2)
        steps = min(longest, max(_SHORTEST, length * channel_blocks // wanted))
    elif blocks >= processors or length <= 2 * _SHORTEST:
        steps = length
    else:
        steps = max(_SHORTEST, length * blocks // wanted)
    return max(EVERY, -(-steps // EVERY) * EVERY)


def n_segments(n_sequences: int, length: int, steps: int, packed: bool) -> int:
    """Rows of the tables; enough for any packing."""
    return length // steps + n_sequences if packed else n_sequences * -(-length // steps)


@functools.lru_cache(maxsize=64)
def of_batch(batch: int, length: int, steps: int, reverse: bool, device: torch.device) -> Segments:
    """For `batch` sequences of one length, whose rows follow each other."""
    count = -(-length // steps)
    k = torch.arange(count, device=device).repeat(batch)
    sequence = torch.arange(batch, device=device).repeat_interleave(count)
    first = k * steps
    row0 = sequence * length + (length - 1 - first if reverse else first)
    flags = (k == 0).int() + 2 * (k == count - 1).int()
    numbers = torch.arange(batch * count, device=device)
    return Segments(
        row0,
        (length - first).clamp(max=steps).int(),
        sequence.int(),
        flags.int(),
        numbers * (steps // EVERY),
        torch.arange(batch, device=device) * count,
        torch.full((batch,), count, device=device, dtype=torch.int64),
        count > 1,
    )


def of_packed(cu_seqlens: Tensor, length: int, steps: int, reverse: bool) -> Segments:
    """For packed sequences, without waiting for the device: the tables are as long as they might have to be."""
    bounds = cu_seqlens.long()
    n_sequences = bounds.shape[0] - 1
    lengths = bounds[1:] - bounds[:-1]
    count = (lengths + steps - 1) // steps
    ends = count.cumsum(0)
    begin = ends - count
    numbers = torch.arange(n_segments(n_sequences, length, steps, True), device=bounds.device)
    sequence = torch.searchsorted(ends, numbers, right=True)
    used = sequence < n_sequences
    sequence = sequence.clamp(max=n_sequences - 1)
    k = numbers - begin[sequence]
    first = k * steps
    row0 = bounds[sequence + 1] - 1 - first if reverse else bounds[sequence] + first
    left = (lengths[sequence] - first).clamp(min=0, max=steps)
    flags = (k == 0).int() + 2 * (k == count[sequence] - 1).int()
    return Segments(
        row0,
        torch.where(used, left, 0).int(),
        sequence.int(),
        flags.int(),
        numbers * (steps // EVERY),
        begin,
        count,
        True,
    )
