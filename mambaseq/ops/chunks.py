"""Time cut into chunks: matrices inside of them, states handed from each to the next. Rows are one sequence each, or
packed, where each sequence is padded to whole chunks; how many there might be follows from the shapes alone, so that
nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences

# chunks are of at least so many positions: many short packed sequences need no shorter ones
_FEWEST = 16
FORGOTTEN = -1000.0
"""Log-decays below it are summed as it: the decay is 0 in every precision either way, but differences of sums stay
numbers where a log-decay is -inf, and keep their digits."""


def padded(value: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros behind it along an axis, `size` long there; itself where nothing is missing, of which
    `F.pad` would make a copy."""
    missing = size - value.shape[axis]
    if not missing:
        return value
    behind = -axis - 1 if axis < 0 else value.ndim - 1 - axis
    return F.pad(value, (*(0, 0) * behind, 0, missing))


class Chunks(NamedTuple):
    """Where everything is: `n` chunks a row, of `size` positions, a power of two."""

    length: int
    size: int
    n: int
    place: Tensor | None = None  # (length,) where a position goes in the padded row; None where padding follows the row
    begins: Tensor | None = None  # (n, 1, 1, 1) bool: the first chunk of a sequence
    owner: Tensor | None = None  # (n,) the sequence of each
    last: Tensor | None = None  # (sequences,) the last chunk of each
    filled: Tensor | None = None  # (sequences, 1, 1, 1) bool, False for an empty sequence

    @classmethod
    def of(cls, length: int, cu_seqlens: Tensor | None, most: int) -> Chunks:
        """Of at most `most` positions."""
        n_sequences = 1 if cu_seqlens is None else max(1, cu_seqlens.shape[0] - 1)
        size = 1 << (min(most, max(_FEWEST, -(-length // n_sequences))).bit_length() - 1)
        if cu_seqlens is None:
            return cls(length, size, max(1, -(-length // size)))
        # those left over go on with the last sequence, where they change nothing
        cut = sequences.in_chunks(cu_seqlens, length, size)
        begins = torch.arange(cut.n, device=cu_seqlens.device) == cut.begin.index_select(0, cut.owner)
        begins, filled = (value[:, None, None, None] for value in (begins, cut.counts > 0))
        return cls(length, size, cut.n, cut.place, begins, cut.owner, cut.last, filled)

    def cut(self, value: Tensor) -> Tensor:
        """`(batch, length, ...)` to `(batch, chunks, size, ...)`, zeros where nothing is."""
        size = self.n * self.size
        if self.place is not None:
            value = value.new_zeros(value.shape[0], size, *value.shape[2:]).index_copy(1, self.place, value)
        return padded(value, 1, size).unflatten(1, (self.n, self.size))

    def join(self, value: Tensor) -> Tensor:
        """`(batch, chunks, size, ...)` to `(batch, length, ...)`."""
        value = value.flatten(1, 2)
        return value[:, : self.length] if self.place is None else value.index_select(1, self.place)

    def pass_on(self, initial: Tensor, step: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The states that enter the chunks `(batch, chunks, ...)`, and the final ones.

        initial: `(batch, a, b, c)`, or `(sequences, ...)`, at least one, of packed ones. step: from a chunk's number
            and what enters it to what leaves it.
        """
        state = initial if self.owner is None else torch.zeros_like(initial[:1])
        entering, leaving = [], []
        for number in range(self.n):
            if self.owner is not None and self.begins is not None:
                own = initial.index_select(0, self.owner[number : number + 1])
                state = torch.where(self.begins[number], own, state)
            entering.append(state)
            state = step(number, state)
            leaving.append(state)
        if self.last is not None and self.filled is not None:
            state = torch.where(self.filled, torch.cat(leaving).index_select(0, self.last), initial)
        return torch.stack(entering, dim=1), state


def forward_in_time(arguments: Any, over_time: tuple[str, ...], of_sequences: tuple[str, ...]) -> Any:
    """An op's arguments, the same with time running forward.

    over_time, of_sequences: names of those `(batch, length, ...)`, and of states `(sequences, ...)`, which may be None.
    """
    if not arguments.reverse:
        return arguments

    def flipped(names: tuple[str, ...], dim: int) -> dict[str, Any]:
        values = {name: getattr(arguments, name) for name in names}
        return {name: value.flip(dim) for name, value in values.items() if value is not None}

    turned = arguments._replace(**flipped(over_time, 1))
    if turned.cu_seqlens is None:
        return turned
    return turned._replace(cu_seqlens=sequences.flipped(turned.cu_seqlens), **flipped(of_sequences, 0))


def sums(values: Tensor) -> Tensor:
    """Those up to each one of the last axis but one, in the shape and dtype of the values. (`cumsum` on a GPU is
    refused where results must repeat.)"""
    n, width = values.shape[-2], 64
    if n <= width:
        return torch.ones(n, n, dtype=values.dtype, device=values.device).tril() @ values
    # so many at a time as if nothing came before, then what does, by the same
    own = sums(padded(values, -2, n + -n % width).unflatten(-2, (-1, width)))  # (..., pieces, width, features)
    before = F.pad(sums(own[..., -1, :]), (0, 0, 1, 0))[..., :-1, :]
    return (own + before[..., None, :]).flatten(-3, -2)[..., :n, :]
