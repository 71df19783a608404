"""Labelled sequences as batches: read from token stores, cut or padded, from either strand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.orders import Balanced, Shuffled, random_words
from mambaseq.data.store import TokenStore
from mambaseq_dna.tokenizer import N, complement, fold_case

Align = Literal["centre", "start", "end"]
_TOGETHER = 1 << 18  # bases that are read by one index; longer sequences are quicker one by one
_STRANDS = 1  # added to the seed of the order, so that strands are drawn by other numbers


def fitted(places: np.ndarray, length: int, align: Align, pad: bool) -> np.ndarray:
    """Places, `(records, 5)` int64, with at most `length` bases, or, with `pad`, exactly as many: what is outside of a
    record is N.

    places: see `Source`. align: the part that is kept, or where the sequence stands between N, in reading order of its
        own strand.
    """
    fit = places.copy()
    start, stop, minus = places[:, 2], places[:, 3], places[:, 4]
    size = stop - start
    wanted = np.full_like(size, length) if pad else np.minimum(size, length)
    if align == "centre":
        first = start + (size - wanted) // 2
    else:
        first = np.where((minus == 1) == (align == "start"), stop - wanted, start)
    fit[:, 2], fit[:, 3] = first, first + wanted
    return fit


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Places in token stores. stores, places: see `Source`."""

    stores: Sequence[TokenStore]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def lengths(self) -> np.ndarray:
        """`(sequences,)` int64."""
        return self.places[:, 3] - self.places[:, 2]

    def where(self, rows: np.ndarray) -> Sequences:
        """Those with these numbers, or with True."""
        return Sequences(self.stores, self.places[rows])

    def read(self, row: int) -> np.ndarray:
        """The ids of `BaseTokenizer("keep")` of one, on its own strand, `(length,)` uint8."""
        number, record, start, stop, minus = self.places[row].tolist()
        store = self.stores[number]
        ids = _inside(store, record, start, stop)
        if not minus:
            return ids
        lower = ids >= N + 1
        return (complement(fold_case(ids)) + np.uint8(N + 1) * lower)[::-1]

    def matrix(self, rows: np.ndarray, turned: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids 0 to 4 of several sequences, `(rows, longest)` uint8, 0 behind their ends, and their lengths. turned:
        `(rows,)` bool, which are read from the other strand."""
        places = self.places[rows]
        number, record, start, stop, minus = places.T
        lengths = stop - start
        flipped = minus == 1 if turned is None else (minus == 1) ^ turned
        longest = int(lengths.max(initial=0))
        ids = np.zeros((len(rows), longest), dtype=np.uint8)
        if longest * len(rows) <= _TOGETHER:
            along = np.arange(longest)
            place = np.where(flipped[:, None], stop[:, None] - 1 - along, start[:, None] + along)
            for one in np.unique(number).tolist():
                store, mine = self.stores[one], number == one
                inside = (place[mine] >= 0) & (place[mine] < store.lengths[record[mine], None])
                at = np.where(inside, store.starts[record[mine], None] + place[mine], 0)
                ids[mine] = np.where(inside, fold_case(np.asarray(store.tokens)[at]), np.uint8(N))
            ids[flipped] = complement(ids[flipped])
            ids[along >= lengths[:, None]] = 0
            return ids, lengths
        for row, length in enumerate(lengths.tolist()):
            part = _inside(self.stores[number[row]], int(record[row]), int(start[row]), int(stop[row]))
            ids[row, :length] = complement(fold_case(part))[::-1] if flipped[row] else fold_case(part)
        return ids, lengths


def _inside(store: TokenStore, record: int, start: int, stop: int) -> np.ndarray:
    """Tokens of a record as they are in the store, N outside of it."""
    begin, length = int(store.starts[record]), int(store.lengths[record])
    if start >= 0 and stop <= length:
        return store.tokens[begin + start : begin + stop]
    ids = np.full(stop - start, N, dtype=np.uint8)
    first, last = min(max(start, 0), length), max(min(stop, length), 0)
    if last > first:
        ids[first - start : last - start] = store.tokens[begin + first : begin + last]
    return ids


class LabelledItems:
    """Sequences with their targets. Items are batches of one; `__getitems__` gives a batch of several at once.

    targets: `(sequences, ...)`. order: which sequence item i is, for training, without end; None keeps them in order.
    groups: the group of each sequence, which those that evaluate read (see `ItemDataset`); only without an order.
    seed, augment: read item i from the other strand if a number drawn by (seed, i) is odd.
    """

    def __init__(
        self,
        sequences: Sequences,
        targets: np.ndarray,
        order: Shuffled | Balanced | None = None,
        *,
        seed: int = 0,
        augment: bool = False,
        groups: Sequence[str] | None = None,
    ) -> None:
        if groups is not None:
            self.groups = groups
        self.sequences, self.targets, self.order = sequences, torch.from_numpy(np.ascontiguousarray(targets)), order
        self.seed, self.augment = seed, augment
        self.endless = order is not None

    def __len__(self) -> int:
        return len(self.sequences) if self.order is None else len(self.order)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < (len(self) if self.order is None else 2**62):
            raise IndexError(index)
        return self._batch(np.array([index], dtype=np.int64))

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        return [self._batch(np.array(indices, dtype=np.int64))]

    def _batch(self, items: np.ndarray) -> Batch:
        rows = items if self.order is None else self.order.records(items)
        turned = None
        if self.augment:
            turned = (random_words(self.seed + _STRANDS, items, 1)[:, 0] & 1) == 1
        ids, lengths = self.sequences.matrix(rows, turned)
        longest = ids.shape[1]
        mask = None
        if len(rows) > 1 and int(lengths.min()) < longest:
            mask = torch.from_numpy(np.arange(longest) < lengths[:, None])
        return Batch(
            inputs=torch.from_numpy(ids.astype(np.int64)),
            targets=self.targets[torch.from_numpy(rows)],
            mask=mask,
            target_of="sequence",
        )
