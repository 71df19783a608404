"""Intervals of records: the parts of a token store that belong to a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from mambaseq.data.store import TokenStore
from mambaseq.errors import cut_list, shown


@dataclasses.dataclass(frozen=True)
class Interval:
    """Tokens `[start, stop)` of a store's record. No window crosses the borders of its interval."""

    store: TokenStore
    record: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def source(self) -> str:
        """File and record, for messages."""
        files = [source.get("name") for source in self.store.meta.get("sources", [])]
        name = shown(self.store.names[self.record])
        return f"record {name} of {cut_list(files, most=3) if files else self.store.folder}"

    def read(self, start: int, length: int) -> np.ndarray:
        """A copy of `length` tokens from `start` on, counted from the record's beginning."""
        if start < self.start or start + length > self.stop:
            raise IndexError(f"[{start}, {start + length}) leaves the interval [{self.start}, {self.stop})")
        return np.array(self.store[self.record][start : start + length])


class Intervals(Sequence[Interval]):
    """Intervals in an array, for millions of them.

    stores: the stores they belong to. table: `(intervals, 4)` int64; a row is the number of the store, record, start,
        stop.
    """

    def __init__(self, stores: Sequence[TokenStore], table: np.ndarray) -> None:
        self.stores, self.table = list(stores), table

    @classmethod
    def of(cls, intervals: Iterable[Interval]) -> Intervals:
        """The same intervals, in the same order."""
        if isinstance(intervals, Intervals):
            return intervals
        numbers: dict[str, int] = {}
        stores: list[TokenStore] = []
        rows = []
        for interval in intervals:
            number = numbers.setdefault(str(interval.store.folder), len(stores))
            if number == len(stores):
                stores.append(interval.store)
            rows.append((number, interval.record, interval.start, interval.stop))
        return cls(stores, np.array(rows, dtype=np.int64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Intervals(self.stores, self.table[index])
        store, record, start, stop = self.table[index].tolist()
        return Interval(self.stores[store], record, start, stop)

    @property
    def lengths(self) -> np.ndarray:
        """`(intervals,)` int64."""
        return self.table[:, 3] - self.table[:, 2]

    def where(self, chosen: np.ndarray) -> Intervals:
        """Those with True in `chosen`, `(intervals,)` bool."""
        return Intervals(self.stores, self.table[chosen])

    def records(self) -> np.ndarray:
        """The number of each interval's record, `(intervals,)` int64, counted from 0 in the order in which records
        appear."""
        store, record = self.table[:, 0], self.table[:, 1]
        _, first, of = np.unique(
            store * (int(record.max(initial=0)) + 1) + record, return_index=True, return_inverse=True
        )
        return np.argsort(np.argsort(first))[of.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Group:
    """Intervals that are drawn as often as those of any other group, such as the sequences of one species."""

    name: str
    intervals: Sequence[Interval]
