"""States that grow: one row for each past position, for mixers that look back at all of them.

The tensors have spare room (their capacity), and the host keeps a bound on the lengths, so a step with room left
neither waits for a GPU nor allocates.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mambaseq.mixers.base import State
from mambaseq.ops import sequences

_FIRST_ROOM = 16


@dataclasses.dataclass
class GrowingState(State):
    """length `(sequences,)` int64: positions that each sequence has seen. longest: a number on the host that no length
    exceeds. The tensors named in `rows` are `(sequences, capacity, ...)`; past a sequence's length they hold finite,
    meaningless values.

    Code that replays steps from a CUDA graph must make room first (`reserve_`), and add the replayed steps to
    `longest`.
    """

    rows: ClassVar[tuple[str, ...]]

    length: Tensor
    longest: int

    @property
    def capacity(self) -> int:
        """The number of positions that there is room for."""
        return getattr(self, self.rows[0]).shape[1]

    def reserve_(self, length: int) -> None:
        """Make room for this many positions; replaces the tensors if they are too small."""
        for name in self.rows:
            tensor = getattr(self, name)
            if tensor.shape[1] < length:
                room = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
                setattr(self, name, torch.cat([tensor, room], 1))  # (sequences, length, ...)

    def make_room_(self) -> None:
        """Make room for one more position; doubles the capacity if it is used up."""
        if self.longest >= self.capacity:
            self.reserve_(max(2 * self.capacity, _FIRST_ROOM))


class Places(NamedTuple):
    """The places of the rows of one call `(batch, length)`, as indices that broadcast to that.

    sequence: which sequence; offset: which position of this call; position: which position since the sequence began.
        n_sequences; new `(n_sequences,)` int64: positions that this call adds to each.
    """

    sequence: Tensor
    offset: Tensor
    position: Tensor
    n_sequences: int
    new: Tensor

    @classmethod
    def of(cls, x: Tensor, state: GrowingState | None, cu_seqlens: Tensor | None) -> Places:
        """The places of x `(batch, length, ...)`, which continues from the state's lengths."""
        batch, length = x.shape[:2]
        offset = torch.arange(length, device=x.device)[None]  # (1, length)
        if cu_seqlens is None:
            sequence = torch.arange(batch, device=x.device)[:, None]  # (batch, 1)
            new = torch.full((batch,), length, dtype=torch.int64, device=x.device)
        else:
            sequences.check(cu_seqlens, batch, length)
            sequence = sequences.of_positions(cu_seqlens, length)[None]  # (1, length)
            offset = offset - cu_seqlens.long()[sequence]
            new = cu_seqlens.diff().long()
            batch = cu_seqlens.shape[0] - 1
        position = offset if state is None or not state.longest else offset + state.length[sequence]
        return cls(sequence, offset, position, batch, new)


def longest_new(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """The length of the longest sequence in x `(batch, length, ...)`. For packed sequences it is read on the host,
    which waits for the GPU; in a graph being compiled it is the row's length, an upper bound."""
    length = x.shape[1]
    if cu_seqlens is None or torch.compiler.is_compiling():
        return length
    bounds = sequences.offsets(cu_seqlens, length)
    return max((end - begin for begin, end in itertools.pairwise(bounds)), default=0)


def written(old: Tensor | None, rows: Tensor, places: Places, at: Tensor, capacity: int) -> Tensor:
    """A copy of old `(sequences, n, ...)`, with this capacity or its own if larger, and with the rows of a call
    `(batch, length, ...)` at the positions `at` of their sequences. Without an old one this pads packed rows."""
    if old is None:
        old = rows.new_zeros(places.n_sequences, 0, *rows.shape[2:])
    room = old.new_zeros(old.shape[0], max(capacity - old.shape[1], 0), *old.shape[2:])
    # (sequences, capacity or more, ...)
    return torch.cat([old, room], 1).index_put_((places.sequence, at), rows.to(old.dtype))


def gathered(padded: Tensor, places: Places, at: Tensor) -> Tensor:
    """The rows `(batch, length, ...)` of a call from `(sequences, n, ...)`: what `written` put there."""
    # (batch * length, ...)
    rows = padded.flatten(0, 1).index_select(0, (places.sequence * padded.shape[1] + at).flatten())
    return rows.unflatten(0, at.shape)  # (batch, length, ...)
