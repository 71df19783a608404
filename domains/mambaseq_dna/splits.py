"""Splits FASTA files into disjoint training, validation and test intervals."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mambaseq.data.cache import fingerprint, locate
from mambaseq.data.intervals import Group, Intervals
from mambaseq.data.leakage import check_disjoint, without_copies
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.fasta import fasta_stores
from mambaseq_dna.ranges import intersection
from mambaseq_dna.split_intervals import PUBLISHED, SPLITS, Extend, SplitIntervals
from mambaseq_dna.tokenizer import N

Duplicates = Literal["refuse", "drop"]

_SETS = {"train": "training", "validation": "validation", "test": "test"}
_CHUNK = 1 << 18
_N, _LOWER_N = N, N + 5  # see BaseTokenizer("keep")
_N_BYTE, _LOWER_N_BYTE = bytes([_N]), bytes([_LOWER_N])

logger = logging.getLogger(__name__)


def stretches_without_n(ids: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The maximal stretches of `ids[start:stop]` without N, `(stretches, 2)` int64: start and end."""
    edges = []
    previous = True
    for first in range(start, stop, _CHUNK):
        chunk = np.asarray(ids[first : min(first + _CHUNK, stop)])
        letters = chunk.tobytes()
        if not previous and _N_BYTE not in letters and _LOWER_N_BYTE not in letters:  # nearly always, and much quicker
            continue
        is_n = (chunk == _N) | (chunk == _LOWER_N)
        edges.append(np.flatnonzero(np.diff(is_n, prepend=previous)) + first)
        previous = bool(is_n[-1])
    if not previous:
        edges.append(np.array([stop]))
    return np.concatenate(edges).astype(np.int64).reshape(-1, 2) if edges else np.zeros((0, 2), np.int64)


def known_stretches(store: TokenStore) -> np.ndarray:
    """`stretches_without_n` of all tokens of a store, `(stretches, 2)` int64, found at first use and kept with it."""
    return store.kept("stretches-without-n", lambda: stretches_without_n(store.tokens, 0, len(store.tokens))).reshape(
        -1, 2
    )


@dataclasses.dataclass(frozen=True)
class Splits:
    """The same groups, in the same order, in each split; validation and test are empty if there is none.

    sources: name of each file to the sha256 of its contents.
    """

    train: list[Group]
    validation: list[Group]
    test: list[Group]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


def _halves(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Chromosome 2 → its halves among these names: it is one chromosome in humans, and 2A and 2B in the other great
    apes. Not so where there is a 2D, as in wheat, whose 2A, 2B and 2D come from three genomes."""
    found = {}
    for two in ("chr2", "2"):
        for letters in ("ABD", "abd"):
            a, b, d = (f"{two}{letter}" for letter in letters)
            if a in names and b in names and d not in names and two not in names:
                found[two] = (a, b)
    return found


class _Patterns:
    """Names and patterns of one setting, and which of them matched. `chr2` and `2` mean 2A and 2B as well."""

    def __init__(self, key: str, patterns: Iterable[str]) -> None:
        self.key = key
        self.exact = {pattern for pattern in patterns if not set(pattern) & set("*?[")}
        self.globs = {pattern: re.compile(translate(pattern)) for pattern in patterns if pattern not in self.exact}
        self.missing = set(patterns)

    def _meant(self, names: Sequence[str]) -> np.ndarray:
        found = np.fromiter((name in self.exact for name in names), dtype=bool, count=len(names))
        self.missing -= self.exact.intersection(names)
        for pattern, compiled in self.globs.items():
            match = compiled.match
            fits = np.fromiter((match(name) is not None for name in names), dtype=bool, count=len(names))
            if fits.any():
                self.missing.discard(pattern)
            found |= fits
        return found

    def records(self, file: str, store: TokenStore) -> np.ndarray:
        """The records of a file that match, by their names or the file's; `(records,)` bool."""
        found = self._meant(store.names) | self._meant([file])
        wanted = self.exact & {"chr2", "2"}
        for two, halves in _halves(set(store.names)).items() if wanted else ():
            if two in wanted:
                found |= np.isin(store.names, halves)
                self.missing.discard(two)
        return found


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """Rules for which part of which record goes into which split.

    test_records, validation_records: patterns (`*`, `?`) for the names of records or files. The rest is training data.
        validation_fraction: without validation_records, the last part of each training record is held out.
    train_records: patterns for those of the rest that are training data; the others are not used. All, if empty.
    intervals: a BED file that says it instead (see `SplitIntervals`). extend: what windows may read beside its
        intervals. span: tokens that a window reads, for a published rule.
    drop_n: leave out N and stretches between them that are too short; windows then contain no N.
    duplicates: copies of a record in two splits or groups are refused, or left out of the less protected split (see
        `mambaseq.data.leakage`).
    """

    test_records: Sequence[str] = ()
    validation_records: Sequence[str] = ()
    validation_fraction: float = 0.1
    drop_n: bool = True
    duplicates: Duplicates = "refuse"
    train_records: Sequence[str] = ()
    intervals: str | None = None
    extend: Extend = "none"
    span: int = 1

    def __post_init__(self) -> None:
        if self.extend not in get_args(Extend):
            raise ConfigError(f"data.extend must be one of {', '.join(get_args(Extend))}, not {shown(self.extend)}.")
        if self.intervals is None and self.extend != "none":
            raise ConfigError("data.extend says what windows may read beside data.intervals, which is not set.")
        by_name = ("test_records", "validation_records", "train_records")
        if self.intervals is not None and (both := [key for key in by_name if getattr(self, key)]):
            raise ConfigError(
                f"data.intervals and data.{both[0]} both say which data are for what. Leave one of them out."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction must be in [0, 1), not {self.validation_fraction}.")
        if self.duplicates not in ("refuse", "drop"):
            raise ConfigError(f"data.duplicates must be 'refuse' or 'drop', not {shown(self.duplicates)}.")

    def apply(
        self, files: Mapping[str, Sequence[str]], cache: str | Path | None = None, *, refuse_copies: bool = True
    ) -> Splits:
        """Read the files of each group (building their token stores at first use) and split them.

        refuse_copies: False keeps what is in two splits or groups, for an audit (unless such copies are dropped).
        Raises DataError if a file cannot be used, a pattern matches nothing, a record is named for two splits, a
        sequence is in two splits or groups, or a requested split is empty.
        """
        test = _Patterns("test_records", self.test_records)
        validation = _Patterns("validation_records", self.validation_records)
        train = _Patterns("train_records", self.train_records)
        listed = None if self.intervals is None else _listed(self.intervals)
        splits: dict[str, list[Group]] = {split: [] for split in SPLITS}
        of_groups = {
            name: list(dict.fromkeys(path for pattern in patterns for path in locate(pattern)))
            for name, patterns in files.items()
        }
        every = list(dict.fromkeys(path for paths in of_groups.values() for path in paths))
        stores = dict(zip(every, fasta_stores(every, cache), strict=True))
        for name, paths in of_groups.items():
            own = [stores[path] for path in paths]
            if listed is not None:
                of_files = self._rows_of(listed, Assembly(paths, stores=stores))
            else:
                of_files = [self._rows(path.name, stores[path], test, validation, train) for path in paths]
            rows = [np.insert(found, 0, number, axis=1) for number, found in enumerate(of_files)]
            table = np.concatenate(rows) if rows else np.zeros((0, 5), np.int64)
            for split, label in enumerate(SPLITS):
                splits[label].append(Group(name, Intervals(own, np.delete(table[table[:, 1] == split], 1, axis=1))))
        if not stores:
            raise ConfigError("The data have no FASTA file. Name some in data.fasta or data.species.")
        for used in (test, validation, train):
            if used.missing:
                raise _matches_nothing(used, stores)
        if self.extend in PUBLISHED:
            pass  # windows overlap each other, and those of other splits: that is the rule
        elif self.duplicates == "drop":
            splits = self._without_copies(splits)
        elif refuse_copies:
            check_disjoint(remedy=", or set data.duplicates to drop, which keeps such copies in one split", **splits)
        self._refuse_empty(splits, stores, listed)
        kept = {split: of if any(len(group.intervals) for group in of) else [] for split, of in splits.items()}
        sources = _sources(stores)
        if listed is not None:
            sources |= {listed.path.name: fingerprint(listed.path, cache)["sha256"]}
        return Splits(**kept, sources=sources)

    def _rows_of(self, listed: SplitIntervals, assembly: Assembly) -> list[np.ndarray]:
        """What `_rows` gives, for each file of an assembly, by a file of intervals."""
        lengths = np.array(list(assembly.lengths.values()), dtype=np.int64)
        placed = listed.placed(assembly)
        if self.extend in PUBLISHED:
            for leak in placed.leaks(self.span, self.extend):
                if leak.leaked:
                    logger.warning("data.extend: %s: %s.", self.extend, leak)
            table = placed.windows(self.span, self.extend, lengths)
        else:
            table = placed.stretches(lengths, self.extend, refuse=self.duplicates == "refuse")
        files, records = assembly.number(table[:, 1])
        found = []
        for number, store in enumerate(assembly.stores):
            own = files == number
            rows = np.stack((table[own, 0], records[own], table[own, 2], table[own, 3]), axis=1)
            if self.extend not in PUBLISHED:
                rows = rows[np.lexsort((rows[:, 2], rows[:, 1]))]
                rows = _without_n(store, rows) if self.drop_n else rows
            found.append(rows)
        return found

    def _rows(
        self, file: str, store: TokenStore, test: _Patterns, validation: _Patterns, train: _Patterns
    ) -> np.ndarray:
        """`(intervals, 4)` int64: split (index in SPLITS), record, start, stop; in order."""
        for_test, for_validation = test.records(file, store), validation.records(file, store)
        if len(both := np.flatnonzero(for_test & for_validation)):
            more = f" (and {len(both) - 1:,} more)" if len(both) > 1 else ""
            name = shown(store.names[both[0]])
            raise DataError(
                f"The record {name} of {file}{more} matches both data.test_records and data.validation_records. Name "
                "each record in only one."
            )
        split = np.where(for_test, 2, np.where(for_validation, 1, 0))
        lengths = store.lengths
        cut = lengths.copy()
        if not self.validation_records:
            cut -= np.where(for_test, 0, (lengths * self.validation_fraction).astype(np.int64))
        records = np.arange(len(store))
        parts = np.concatenate(
            (
                np.stack((split, records, np.zeros_like(cut), cut), axis=1),
                np.stack((np.ones_like(cut), records, cut, lengths), axis=1),
            )
        )
        wanted = for_test | for_validation | train.records(file, store) if self.train_records else np.True_
        parts = parts[(parts[:, 3] > parts[:, 2]) & np.broadcast_to(wanted, len(store))[parts[:, 1]]]
        parts = parts[np.lexsort((parts[:, 2], parts[:, 1]))]
        return _without_n(store, parts) if self.drop_n else parts

    def _without_copies(self, splits: dict[str, list[Group]]) -> dict[str, list[Group]]:
        kept, intervals, bases = without_copies(splits)
        if intervals:
            logger.warning(
                "data.duplicates: %s stretches of records with %s bases are left out, because other splits or groups "
                "hold copies of them.",
                f"{intervals:,}",
                f"{bases:,}",
            )
        return kept

    def _refuse_empty(
        self, splits: dict[str, list[Group]], stores: Mapping[Path, TokenStore], listed: SplitIntervals | None
    ) -> None:
        """Raise DataError if the training data or a requested split has nothing from a group."""
        names = cut_list((path.name for path in stores), most=3)
        bases = "no base (N does not count, and data.drop_n leaves it out)" if self.drop_n else "no base"
        by_name = "Name other records in data.{}_records, or leave the setting out"
        remedies = {
            "train": "Check the files, and what data.test_records and data.validation_records leave",
            "test": by_name.format("test") if self.test_records else "",
            "validation": by_name.format("validation") if self.validation_records else "",
        }
        if self.validation_fraction and not self.validation_records:
            remedies["validation"] = (
                f"It is the last part of each training record, data.validation_fraction "
                f"({self.validation_fraction:g}): raise that, name data.validation_records, or set it to 0 for none"
            )
        if listed is not None:
            there = {SPLITS[split] for split in np.unique(listed.table[:, 0])}
            remedies = {split: f"Check its intervals in {listed.path}" if split in there else "" for split in SPLITS}
        for split, remedy in remedies.items():
            empty = [group.name for group in splits[split] if not len(group.intervals)]
            if remedy and empty:
                raise DataError(f"The {_SETS[split]} set has {bases} of {shown(empty[0])} ({names}). {remedy}.")


def _without_n(store: TokenStore, parts: np.ndarray) -> np.ndarray:
    """Parts of records, in order and without overlap, cut into stretches without N."""
    first = store.starts[parts[:, 1]]
    found, part = intersection(parts[:, 2:] + first[:, None], known_stretches(store))
    return np.concatenate((parts[part, :2], found - first[part, None]), axis=1)


def _listed(name: str) -> SplitIntervals:
    paths = locate(name)
    if len(paths) > 1:
        raise ConfigError(f"data.intervals must be one file; {shown(name)} stands for {len(paths)}.")
    return SplitIntervals.read(paths[0])


def _matches_nothing(patterns: _Patterns, stores: Mapping[Path, TokenStore]) -> DataError:
    pattern = min(patterns.missing)
    names = sorted({name for path, store in stores.items() for name in (path.name, *store.names[:200])})
    return DataError(
        f"The pattern {shown(pattern)} of data.{patterns.key} matches no record and no file."
        f"{did_you_mean(pattern[:80], names)} There are: {cut_list(names, most=8)}."
    )


def _sources(stores: Mapping[Path, TokenStore]) -> dict[str, str]:
    names = [path.name for path in stores]
    return {
        path.name if names.count(path.name) == 1 else str(path): store.meta["sources"][0]["sha256"]
        for path, store in stores.items()
    }
