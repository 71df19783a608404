"""A label for each base of an assembly: painted from intervals, kept as runs of equal labels, read by place."""

from __future__ import annotations

import array
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import read_bed
from mambaseq_dna.files.fields import ending
from mambaseq_dna.files.gff import read_gff

Overlap = Literal["priority", "ignore"]
Unplaced = Literal["refuse", "drop"]

UNKNOWN = -100
_KINDS_TOLD = 1000
_RUNS = 1 << 16  # whose classes are counted together

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Runs:
    """A value for each position of a sequence, as runs of equal ones.

    edges: `(runs + 1,)` int64, ascending, from 0 to the sequence's length. values: `(runs, ...)`. outside: the value of
        positions that are not in the sequence.
    """

    edges: np.ndarray
    values: np.ndarray
    outside: int | float = UNKNOWN

    def __len__(self) -> int:
        return int(self.edges[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The values of `[start, stop)`, `(stop - start, ...)`, a copy."""
        first, last = max(start, 0), min(stop, len(self))
        out = np.full((stop - start, *self.values.shape[1:]), self.outside, self.values.dtype)
        if last > first:
            low = int(np.searchsorted(self.edges, first, side="right")) - 1
            high = int(np.searchsorted(self.edges, last, side="left"))
            lengths = np.diff(self.edges[low : high + 1].clip(first, last))
            out[first - start : last - start] = np.repeat(self.values[low:high], lengths, axis=0)
        return out


class Place(NamedTuple):
    """An interval of an assembly: `[start, stop)`, from 0. kind: what it is. where: file and line."""

    chrom: str
    start: int
    stop: int
    strand: str
    kind: str
    where: str


def read_places(path: Path) -> Iterator[Place]:
    """The intervals of a GFF3, GTF or BED file: what they are is column 3 of a GFF (its type), column 4 of a BED (its
    name). Raises DataError as `read_gff` and `read_bed`, ConfigError for another ending of the name."""
    kind = ending(path)
    if kind in (".gff", ".gff3", ".gtf"):
        for feature in read_gff(path):
            where = f"{path}, line {feature.line:,}"
            yield Place(feature.chrom, feature.start, feature.stop, feature.strand, feature.kind, where)
    elif kind == ".bed":
        for bed in read_bed(path):
            yield Place(bed.chrom, bed.start, bed.stop, bed.strand, bed.name, f"{path}, line {bed.line:,}")
    else:
        raise ConfigError(
            f"{path}: labels of bases are read from .bed, .gff, .gff3 and .gtf files (packed ones too), by the name's "
            "ending. Rename the file, or convert it."
        )


def check_place(assembly: Assembly, place: Place, unplaced: Unplaced = "refuse") -> str | None:
    """The assembly's name of an interval's sequence; None if it has none and `unplaced` is `drop`.

    Raises DataError that names file and line: for a sequence that the assembly has not, and an interval beyond the end.
    """
    if unplaced == "drop" and assembly.find(place.chrom) is None:
        return None
    name = assembly.resolve(place.chrom, place.where)
    store, record = assembly.place(name)
    length = int(store.lengths[record])
    if place.stop > length:
        raise DataError(
            f"{place.where}: the interval {place.start:,} to {place.stop:,} of {shown(place.chrom)} is beyond its end, "
            f"base {length:,}. Give the assembly that the positions refer to."
        )
    return name


class Classes:
    """Which class an interval has: by what it is, and its strand.

    features: the name of each class to names of its intervals (types of GFF, names of BED), which may hold `*` and `?`.
        A class that comes first wins where several fit, and where intervals overlap.
    stranded: classes that are two, `NAME on +` and `NAME on -`; true for all.
    other: the name of bases in no interval; it is class 0.

    names: of all classes. partners: the number of each class on the other strand.
    """

    def __init__(
        self, features: Mapping[str, Sequence[str] | str], stranded: bool | Sequence[str] = False, other: str = "other"
    ) -> None:
        if not features:
            raise ConfigError("data.features names no class. Write, for instance, features: {coding: [CDS]}.")
        self.patterns = {name: [of] if isinstance(of, str) else list(of) for name, of in features.items()}
        both = list(features) if stranded is True else [] if stranded is False else list(stranded)
        for name in both:
            if name not in features:
                raise ConfigError(
                    f"data.stranded names {shown(name)}, which is no class of data.features."
                    f"{did_you_mean(name[:80], features)} There are: {cut_list(features)}."
                )
        self.names, self.partners = [other], [0]
        self._number: dict[tuple[str, str], int] = {}
        for name in features:
            first = len(self.names)
            if name in both:
                self.names += [f"{name} on +", f"{name} on -"]
                self.partners += [first + 1, first]
                self._number |= {(name, "+"): first, (name, "-"): first + 1}
            else:
                self.names.append(name)
                self.partners.append(first)
                self._number |= {(name, strand): first for strand in "+-.?"}
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"Two classes of data.features have one name: {cut_list(self.names)}.")
        self._class: dict[str, str | None] = {}
        self.missing = {pattern for of in self.patterns.values() for pattern in of}

    def _of_kind(self, kind: str) -> str | None:
        if kind not in self._class:
            fits = [(name, p) for name, of in self.patterns.items() for p in of if fnmatchcase(kind, p)]
            self.missing -= {pattern for _, pattern in fits}
            if len(self._class) > _KINDS_TOLD and not fits:
                return None
            self._class[kind] = fits[0][0] if fits else None
        return self._class[kind]

    def of(self, place: Place) -> int | None:
        """The number of an interval's class, None if it has none. Raises DataError for a class of both strands and an
        interval of none."""
        name = self._of_kind(place.kind)
        if name is None:
            return None
        number = self._number.get((name, place.strand))
        if number is None:
            raise DataError(
                f"{place.where}: {shown(place.kind)} is of the class {shown(name)}, which has a strand, but its strand "
                f"is {shown(place.strand)}. Write + or -, or leave {shown(name)} out of data.stranded."
            )
        return number

    def check_all_found(self, files: Sequence[Path]) -> None:
        """Raise DataError for a pattern that no interval fitted."""
        if self.missing:
            pattern = min(self.missing)
            raise DataError(
                f"data.features: no interval of {cut_list(path.name for path in files)} is called {shown(pattern)}."
                f"{did_you_mean(pattern[:80], self._class)} There are: {cut_list(self._class, most=12)}."
            )


def paint(
    assembly: Assembly,
    files: Sequence[Path],
    classes: Classes,
    *,
    overlap: Overlap = "priority",
    several: bool = False,
    unplaced: Unplaced = "refuse",
) -> dict[str, Runs]:
    """The classes of all bases of an assembly, by the names of its sequences.

    overlap: where intervals of several classes overlap, the class that comes first counts (of a class on both strands,
        that on +), or, with `ignore`, none: -100.
    several: a base has all its classes: `(length, classes)` of 1 and 0, without the class of bases in no interval.
        Otherwise `(length,)`. int64 both.
    unplaced: intervals of sequences that the assembly has not are refused, or left out with a warning (`drop`).
    Raises DataError that names file and line (see `check_place`, `Classes.of`), and for a class without intervals.
    """
    if overlap not in ("priority", "ignore") or unplaced not in ("refuse", "drop"):
        raise ConfigError(
            "data.overlap is priority or ignore, and data.unplaced is refuse or drop, not "
            f"{shown(overlap)} and {shown(unplaced)}."
        )
    found: dict[str, array.array[int]] = {}  # start, stop, class, again and again: a tenth of what tuples take
    dropped: dict[str, int] = {}
    for path in files:
        for place in read_places(path):
            number = classes.of(place)
            if number is None:
                continue
            name = check_place(assembly, place, unplaced)
            if name is None:
                dropped[place.chrom] = dropped.get(place.chrom, 0) + 1
            else:
                found.setdefault(name, array.array("q")).extend((place.start, place.stop, number))
    classes.check_all_found(files)
    if dropped:
        logger.warning(
            "data.unplaced: %s intervals are left out: they are on %s, which the assembly has not.",
            f"{sum(dropped.values()):,}",
            cut_list(dropped, most=5),
        )
    lengths = assembly.lengths
    return {
        name: _painted(
            np.array(found.pop(name, ()), np.int64).reshape(-1, 3), lengths[name], len(classes.names), overlap, several
        )
        for name in assembly.names
    }


def _painted(rows: np.ndarray, length: int, n_classes: int, overlap: Overlap, several: bool) -> Runs:
    """rows: `(intervals, 3)` of start, stop, class."""
    edges = np.unique(np.concatenate(([0, length], rows[:, 0], rows[:, 1])))
    n_runs = len(edges) - 1
    values = np.empty((n_runs, n_classes - 1) if several else n_runs, np.int64)
    begins, ends = (rows[rows[:, place].argsort(kind="stable")] for place in (0, 1))
    open_ = np.zeros(n_classes, np.int64)  # how many intervals of each class cover a base
    for first in range(0, n_runs, _RUNS):
        some = edges[first : min(first + _RUNS, n_runs)]
        changes = np.zeros((len(some), n_classes), np.int64)
        for table, place, by in ((begins, 0, 1), (ends, 1, -1)):
            low = int(np.searchsorted(table[:, place], some[0], side="left"))
            high = int(np.searchsorted(table[:, place], some[-1], side="right"))
            np.add.at(changes, (np.searchsorted(some, table[low:high, place]), table[low:high, 2]), by)
        changes[0] += open_
        counts = changes.cumsum(0)
        open_ = counts[-1]
        covers = counts > 0  # (runs, classes)
        if several:
            values[first : first + len(some)] = covers[:, 1:]
            continue
        one = covers.argmax(1)  # the first class; 0, which covers nothing, where there is none
        if overlap == "ignore":
            one[covers.sum(1) > 1] = UNKNOWN
        values[first : first + len(some)] = one
    return Runs(edges, values)
