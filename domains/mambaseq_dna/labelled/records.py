"""The records of a labelled data set: those of all its sources, and what a split knows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mambaseq.data.audited import AuditedSequence
from mambaseq.data.store import TokenStore
from mambaseq_dna.labelled.items import Sequences
from mambaseq_dna.labelled.sources import Source
from mambaseq_dna.labelled.splitting import UNKNOWN, split_numbers
from mambaseq_dna.splits import SPLITS


@dataclasses.dataclass(frozen=True)
class Records:
    """All records of all sources, in order. first: the number of each source's first record, `(sources,)` int64."""

    sources: list[Source]
    sequences: Sequences
    first: np.ndarray

    def where(self, number: int) -> str:
        """File and place of a record, for messages."""
        source, inside = self.of(number)
        return source.where(inside)

    def of(self, number: int) -> tuple[Source, int]:
        """The source of a record, and its number there."""
        which = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.sources[which], number - int(self.first[which])

    def splits(self, places: Sequence[str | None]) -> np.ndarray:
        """`(records,)` int64, places in `SPLITS`, or UNKNOWN: the split that a record's folder or file gives, or else
        what stands at its source's place of splits. places: of each source, None where it has none.

        Raises DataError for a word that names no split.
        """
        sources = self.sources
        splits = np.concatenate(
            [
                np.full(len(source), SPLITS.index(source.part.split) if source.part.split else UNKNOWN)
                for source in sources
            ]
        )
        if not any(places):
            return splits
        told = [
            list(source.fields[place]) if place else ["train"] * len(source)
            for source, place in zip(sources, places, strict=True)
        ]
        has = np.concatenate(
            [np.full(len(source), place is not None) for source, place in zip(sources, places, strict=True)]
        )
        named = split_numbers([text for texts in told for text in texts], self.where)
        return np.where((splits == UNKNOWN) & has, named, splits)

    def intervals(self) -> np.ndarray:
        """`(records,)` bool: which are intervals of an assembly."""
        return np.concatenate([np.full(len(source), source.groups is not None) for source in self.sources])

    @classmethod
    def of_sources(cls, sources: list[Source]) -> Records:
        """The records of sources, one after the other; stores that several have are one."""
        stores: list[TokenStore] = []
        numbers: dict[str, int] = {}
        tables = []
        for source in sources:
            of = []
            for store in source.stores:
                key = str(store.folder)
                if key not in numbers:
                    numbers[key] = len(stores)
                    stores.append(store)
                of.append(numbers[key])
            table = source.places.copy()
            table[:, 0] = np.array(of)[table[:, 0]]
            tables.append(table)
        first = np.cumsum([0, *(len(source) for source in sources)])[:-1]
        return cls(sources, Sequences(stores, np.concatenate(tables)), first)


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """Records with what is known of them.

    numbers: of the records that are left, `(kept,)` int64. splits, targets: of those, `(kept,)` places in `SPLITS`, and
    `(kept,)` or `(kept, labels)`. class_names: none of values.
    """

    numbers: np.ndarray
    splits: np.ndarray
    targets: np.ndarray
    class_names: list[str]


class AuditedRecords(Sequence[AuditedSequence]):
    """Records of one split, each made when it is asked for."""

    def __init__(self, records: Records, fitted: Sequences, found: SplitRecords, mine: np.ndarray) -> None:
        self._records, self._fitted, self._found, self._mine = records, fitted, found, mine

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[AuditedSequence]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
        mine = self._mine[index]
        number, target = int(self._found.numbers[mine]), self._found.targets[mine]
        label = self._found.class_names[int(target)] if target.ndim == 0 else None
        source, inside = self._records.of(number)
        start = max(int(self._fitted.places[number, 2]), 0)
        return AuditedSequence(self._fitted.read(number), label, str(source.part.path), source.place(inside), start)


def class_counts(targets: np.ndarray) -> list[tuple[int, int]]:
    """Of each class or label, how many training targets are of it, and how many are not.

    targets: `(records,)` whole numbers, or `(records, labels)` of 0, 1 and, where it is not known, others.
    """
    if targets.ndim == 1:
        of = np.bincount(targets)
        return [(int(one), int(len(targets) - one)) for one in of]
    return [(int((column == 1).sum()), int((column == 0).sum())) for column in targets.T]
