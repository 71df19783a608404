"""Packed sequences: `cu_seqlens` (int32, `(sequences + 1,)`), where each begins in the one packed row."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mambaseq.ops.eager import is_eager

_T = TypeVar("_T")


class _Held(threading.local):
    """What this thread has made of `cu_seqlens` in a call; None outside of one."""

    tables: dict[tuple[Any, ...], tuple[Tensor, Any]] | None = None


_held = _Held()


@contextlib.contextmanager
def shared_tables() -> Iterator[None]:
    """Around one call of a model: what its layers make of the same `cu_seqlens` by `shared` is made once, and none of
    it outlives the call. Within, `cu_seqlens` stays as it is, and all is on one stream and in one capture at most."""
    before, _held.tables = _held.tables, {}
    try:
        yield
    finally:
        _held.tables = before


def shared(make: Callable[..., _T], cu_seqlens: Tensor, *arguments: Any) -> _T:
    """`make(cu_seqlens, *arguments)`, which nobody changes; made once in `shared_tables`."""
    tables = _held.tables
    if tables is None:
        return make(cu_seqlens, *arguments)
    key = (make, id(cu_seqlens), *arguments)
    if key not in tables:
        tables[key] = cu_seqlens, make(cu_seqlens, *arguments)  # held, so that no other tensor has its id
    found: _T = tables[key][1]
    return found


def count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences x `(batch, ...)` holds."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `cu_seqlens` packs one row of this length.

    Its values are looked at where that costs nothing: not on a GPU, nor in a graph being compiled.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of int32, not {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (sequences + 1,), not {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row, but the batch is {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets(cu_seqlens, length)


def offsets(cu_seqlens: Tensor, length: int) -> list[int]:
    """The values of `cu_seqlens`, `(sequences + 1,)`, on the host (a GPU waits). Raises ValueError unless they rise, or
    stay, from 0 to `length`."""
    values: list[int] = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != length or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {_shortened(values)}")
    return values


def flipped(cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens`, `(sequences + 1,)`, of the row read backwards: the last sequence comes first."""
    return (cu_seqlens[-1] - cu_seqlens).flip(0)


def of_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """`(length,)` int64: which sequence each position belongs to."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def spoilt(bad: Tensor, begin: Tensor, axis: int) -> Tensor | None:
    """Where a recurrence has met what is bad in the same sequence, in the shape of `bad`; None where nothing is, as far
    as a CPU knows without waiting.

    Scans over a whole row multiply what is another sequence's by 0, and 0 times NaN or infinity is NaN. So what is not
    finite is left out of them, and put back there.

    bad: `(..., n, ...)` bool, n along `axis`. begin: `(n,)`, where each one's sequence begins, 0 at least.
    """
    if bad.is_cpu and is_eager(bad) and not bool(bad.any()):
        return None
    along = [-1 if place == axis % bad.ndim else 1 for place in range(bad.ndim)]
    index = torch.arange(bad.shape[axis], device=bad.device).view(along)
    return torch.where(bad, index, -1).cummax(axis).values >= begin.view(along)


class Chunks(NamedTuple):
    """Packed sequences laid out in chunks of `size` positions, each of one sequence, whose last one is padded."""

    n: int  # as many as any packing may take, so that nothing waits for the device
    counts: Tensor  # (sequences,) chunks of each
    begin: Tensor  # (sequences,) the first of them
    last: Tensor  # (sequences,) and the last; of an empty sequence some other's, or 0
    owner: Tensor  # (n,) the sequence of each chunk; chunks that are left over are the last sequence's
    place: Tensor  # (length,) where each position is among the n * size


def in_chunks(cu_seqlens: Tensor, length: int, size: int) -> Chunks:
    """Where packed sequences go that are cut into chunks of `size` positions."""
    n_sequences, bounds, device = cu_seqlens.shape[0] - 1, cu_seqlens.long(), cu_seqlens.device
    n = length // size + n_sequences  # each sequence fills all but its last
    counts = (bounds.diff() + size - 1) // size
    end = counts.cumsum(0)
    begin = end - counts
    owner = torch.searchsorted(end, torch.arange(n, device=device), right=True).clamp(max=max(0, n_sequences - 1))
    place = torch.arange(length, device=device) + (begin * size - bounds[:-1])[of_positions(bounds, length)]
    return Chunks(n, counts, begin, (end - 1).clamp(min=0), owner, place)


def reversal(batch: int, length: int, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor | None:
    """`(batch * length,)` int64: which position of the rows, laid end to end, stands where once every sequence is
    reversed; its own inverse. None where that is each row from its end to its beginning.

    Packed sequences are reversed within their bounds; with a mask `(batch, length)` of real positions, those of a row
    (which come first) change places and the padding stays.
    """
    if cu_seqlens is not None:
        check(cu_seqlens, batch, length)
        bounds, owner = cu_seqlens.long(), of_positions(cu_seqlens, length)
        return bounds[owner] + bounds[owner + 1] - 1 - torch.arange(length, device=cu_seqlens.device)
    if mask is None:
        return None
    positions = torch.arange(length, device=mask.device)
    real = mask.sum(1, keepdim=True)
    order = torch.where(positions < real, real - 1 - positions, positions)
    return (order + length * torch.arange(batch, device=mask.device)[:, None]).flatten()  # (batch * length,)


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"{values[:6]} … {values[-3:]}"
