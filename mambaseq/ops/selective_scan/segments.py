"""How a scan on a GPU is cut along time, so that short batches fill the machine too."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences

# Steps between two checkpoints of the state; segments are multiples of it.
EVERY = 16
# Blocks that a multiprocessor takes side by side, forward and backward; the shortest segment that is worth two passes.
_FORWARD, _BACKWARD, _SHORTEST = 3, 2, 128
# What a summary of a segment takes of the time of its outputs (the first segment, whose outputs are made beside the
# summaries of the others, is so much shorter) and of its gradients.
_SUMMARY, _SUMMARY_BACKWARD = 0.8, 0.27


class Segments(NamedTuple):
    """Tables on the device, a row a segment, in the order of processing; sequences one after the other."""

    row0: Tensor  # (segments,) int64: first row
    length: Tensor  # (segments,) int32; 0 for one that is not used
    sequence: Tensor  # (segments,) int32
    flags: Tensor  # (segments,) int32: 1 for the first of its sequence, 2 for the last
    checkpoint: Tensor  # (segments,) int64: number of its first checkpoint, wherever sequences are cut
    begin: Tensor  # (sequences,) int64: first segment
    pieces: Tensor  # (sequences,) int64: how many of them


def steps_of(
    n_sequences: int,
    length: int,
    channel_blocks: int,
    processors: int,
    packed: bool,
    leads: bool = False,
    wide: bool = False,
) -> tuple[int, int]:
    """Steps of a sequence's first segment and of its others, for sequences of `length` (or packed into one row of it).

    leads: forward, where the outputs of the first are made in another pass than those of the others. wide: blocks have
    twice as many threads, so that half as many have room.
    """
    blocks = n_sequences * channel_blocks
    wanted = (_FORWARD if leads else _BACKWARD) * processors // (1 + wide)
    if packed:
        # A sequence takes at least one segment, however short: segments must not be much longer than sequences.
        longest = max(_SHORTEST, -(-length // max(1, n_sequences)) * 2)
        steps = first = min(longest, max(_SHORTEST, length * channel_blocks // (4 * processors)))
    elif length <= 2 * _SHORTEST or (leads and blocks >= processors):
        steps = first = length
    elif leads:
        steps = max(_SHORTEST, math.ceil(length / (wanted // blocks + _SUMMARY)))
        first = math.ceil(_SUMMARY * steps)
    else:
        steps = first = math.ceil(length / _pieces(blocks, wanted, length // _SHORTEST))
    return _whole(first), _whole(steps)


def narrow_states(of_two: int, of_four: int, blocks: int, length: int, processors: int) -> int:
    """States of a thread where whole sequences in blocks of few channels take less time, forward, than what `steps_of`
    cuts them into; 0 where they do not.

    of_two, of_four: how many blocks there are if threads have two states, and if they have four.

    Two were measured on an H100, in nanoseconds a step: 17 for each block that a multiprocessor has and 2.5, against 23
    for as many channels in every one of them, the passes over summaries included, and 12 microseconds. With four, a
    block has twice the channels and a multiprocessor room for one, which reads shared memory three quarters as often as
    two blocks of two would: they are taken where they fill the GPU once (1 x 2048 x 4096 on an H200: 68 against 76 us).
    """
    if blocks >= processors:  # not cut
        return 0
    if 17 * -(-of_two // processors) + 2.5 >= 23 * of_two / processors + 12_000 / max(1, length):
        return 0
    return 4 if of_four <= processors < of_two else 2


@functools.cache
def _pieces(blocks: int, places: int, most: int) -> int:
    """Into how many pieces to cut sequences, backward, so that blocks fill the places of the GPU evenly; a piece costs
    its summary too."""

    def time(count: int) -> float:
        return -(-blocks * count // places) / count * (1 + _SUMMARY_BACKWARD * (count - 1) / count)

    counts = range(1, max(1, min(most, 4 * places // blocks + 1, 64)) + 1)
    best = min(time(count) for count in counts)
    return next(count for count in counts if time(count) <= 1.04 * best)


def _whole(steps: int) -> int:
    return max(EVERY, -(-steps // EVERY) * EVERY)


def n_segments(n_sequences: int, length: int, first: int, steps: int, packed: bool) -> int:
    """Rows of the tables; enough for any packing."""
    if packed:
        return length // steps + n_sequences
    return n_sequences * (1 + -(-max(0, length - first) // steps))


def n_checkpoints(n_sequences: int, length: int, packed: bool) -> int:
    """Of all sequences: one before every `EVERY`-th step of each, wherever it is cut."""
    return length // EVERY + n_sequences if packed else n_sequences * -(-length // EVERY)


def of_packed(cu_seqlens: Tensor, length: int, steps: int, reverse: bool) -> Segments:
    """For packed sequences, without waiting for the device: the tables are as long as they might have to be."""
    bounds = cu_seqlens.long()
    n_sequences = bounds.shape[0] - 1
    lengths = bounds[1:] - bounds[:-1]
    count = (lengths + steps - 1) // steps
    ends = count.cumsum(0)
    begin = ends - count
    numbers = torch.arange(n_segments(n_sequences, length, steps, steps, True), device=bounds.device)
    sequence = torch.searchsorted(ends, numbers, right=True)
    used = sequence < n_sequences
    sequence = sequence.clamp(max=n_sequences - 1)
    k = numbers - begin[sequence]
    first = k * steps
    row0 = bounds[sequence + 1] - 1 - first if reverse else bounds[sequence] + first
    left = (lengths[sequence] - first).clamp(min=0, max=steps)
    flags = (k == 0).int() + 2 * (k == count[sequence] - 1).int()
    # sequence s begins at checkpoint cu_seqlens[s] // EVERY + s: room for each one's, started ones included
    checkpoint = bounds[sequence] // EVERY + sequence + first // EVERY
    return Segments(
        row0,
        torch.where(used, left, 0).int(),
        sequence.int(),
        flags.int(),
        checkpoint,
        begin,
        count,
    )


class Cut(NamedTuple):
    """How sequences are cut: tables of segments where they are packed, else four numbers."""

    table: Segments | None
    whole: int
    first: int
    steps: int
    pieces: int  # of a sequence
    total: int  # of all sequences

    @property
    def is_cut(self) -> bool:
        return self.table is not None or self.pieces > 1

    def arguments(self) -> tuple[Any, ...]:
        """As the kernels take them."""
        tables = (None,) * 5 if self.table is None else self.table[:5]
        return (*tables, self.whole, self.first, self.steps, self.pieces)


def cut(n_sequences: int, length: int, first: int, steps: int, cu_seqlens: Tensor | None, reverse: bool) -> Cut:
    """Sequences of `length`, or packed into one row of it, cut into segments of `steps`, the first of `first`."""
    total = n_segments(n_sequences, length, first, steps, cu_seqlens is not None)
    table = None if cu_seqlens is None else sequences.shared(of_packed, cu_seqlens, length, steps, reverse)
    return Cut(table, length, first, steps, total // n_sequences if n_sequences else 0, total)


def room_for_states(
    like: Tensor,
    n_sequences: int,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Where a kernel writes a state `(sequences, channels, d_state)` for each sequence, of a dtype, or that of `like`
    `(channels, d_state)`. What it leaves there is that of packed sequences of length 0, which keep theirs."""
    shape = (n_sequences, *like.shape)
    if cu_seqlens is None:
        return like.new_empty(shape, dtype=dtype)
    return like.new_zeros(shape, dtype=dtype) if state is None else state.clone()
