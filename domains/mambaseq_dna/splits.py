"""FASTA files to disjoint training, validation and test intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from mambaseq.data.cache import locate
from mambaseq.data.store import TokenStore
from mambaseq.data.windows import Group, Interval, check_disjoint
from mambaseq.errors import ConfigError, DataError
from mambaseq_dna.fasta import fasta_store
from mambaseq_dna.tokenizer import N, fold_case

_CHUNK = 1 << 24


def stretches_without_n(ids: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The longest stretches of `ids[start:stop]` without N, as `(stretches, 2)` int64 of begin and end."""
    edges = []
    previous = True
    for first in range(start, stop, _CHUNK):
        is_n = fold_case(ids[first : min(first + _CHUNK, stop)]) == N
        edges.append(np.flatnonzero(np.diff(is_n, prepend=previous)) + first)
        previous = bool(is_n[-1])
    if not previous:
        edges.append(np.array([stop]))
    return np.concatenate(edges).astype(np.int64).reshape(-1, 2) if edges else np.zeros((0, 2), np.int64)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The same groups, in the same order, in each split; validation and test are empty when there is none."""

    train: list[Group]
    validation: list[Group]
    test: list[Group]


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """Which part of which record goes where.

    test_records, validation_records: patterns (`*`, `?`) for the names of records or files. The rest is
        training data. validation_fraction: without validation_records, the last part of each training record
            is held out.
    drop_n: leave out N and what is too short between two of them; windows then hold no N.
    """

    test_records: Sequence[str] = ()
    validation_records: Sequence[str] = ()
    validation_fraction: float = 0.1
    drop_n: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction must be in [0, 1), not {self.validation_fraction}.")

    def apply(self, files: Mapping[str, Sequence[str]], cache: str | Path | None = None) -> Splits:
        """Read the files of each group (building their token stores at first use) and split them.

        Raises DataError when a file cannot be used, when a pattern matches nothing, or when a sequence is in
        two splits or two groups.
        """
        groups: dict[str, dict[str, list[Interval]]] = {}
        names: list[str] = []
        for name, patterns in files.items():
            parts: dict[str, list[Interval]] = {"train": [], "validation": [], "test": []}
            for path in dict.fromkeys(path for pattern in patterns for path in locate(pattern)):
                store = fasta_store(path, cache)
                for record, record_name in enumerate(store.names):
                    names += [path.name, record_name]
                    for split, start, stop in self._parts(path.name, record_name, int(store.lengths[record])):
                        parts[split].extend(self._intervals(store, record, start, stop))
            groups[name] = parts
        for pattern in (*self.test_records, *self.validation_records):
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(sorted(set(names))[:8])
                raise DataError(f"The pattern {pattern!r} matches no record and no file. There are: {shown}, ...")
        splits = {
            split: [Group(name, parts[split]) for name, parts in groups.items()]
            for split in ("train", "validation", "test")
        }
        check_disjoint(**splits)
        return Splits(**{split: found if any(g.intervals for g in found) else [] for split, found in splits.items()})

    def _parts(self, file: str, record: str, length: int) -> Iterator[tuple[str, int, int]]:
        def named(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns for name in (file, record))

        if named(self.test_records):
            yield "test", 0, length
        elif named(self.validation_records):
            yield "validation", 0, length
        else:
            cut = length if self.validation_records else length - int(length * self.validation_fraction)
            yield "train", 0, cut
            if cut < length:
                yield "validation", cut, length

    def _intervals(self, store: TokenStore, record: int, start: int, stop: int) -> list[Interval]:
        if not self.drop_n:
            return [Interval(store, record, start, stop)]
        found = stretches_without_n(store[record], start, stop)
        return [Interval(store, record, int(begin), int(end)) for begin, end in found]
