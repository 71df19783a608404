"""Values of bases from bigWig and bedGraph files, by the names of an assembly's sequences."""

from __future__ import annotations

import array
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mambaseq.errors import ConfigError, DataError, cut_list, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bedgraph import Value, read_bedgraph
from mambaseq_dna.files.bigwig import BigWig
from mambaseq_dna.files.fields import ending
from mambaseq_dna.labels import Place, Runs, Unplaced, check_place

_NAN = float("nan")

logger = logging.getLogger(__name__)


class Signal(Protocol):
    """A value for each base of an assembly."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of `[start, stop)` of a sequence, by the assembly's name: `(stop - start,)` float32, NaN where there is
        none."""
        ...


class _Listed:
    """A bedGraph file in memory, as runs of equal values."""

    def __init__(self, runs: dict[str, Runs]) -> None:
        self._runs = runs

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        runs = self._runs.get(name)
        return np.full(stop - start, np.nan, np.float32) if runs is None else runs.read(start, stop)


class _Indexed:
    """A bigWig file, read where it is asked for. names: those of the assembly, and of the file."""

    def __init__(self, file: BigWig, names: dict[str, str]) -> None:
        self._file, self._names = file, names

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        known = self._names.get(name)
        return np.full(stop - start, np.nan, np.float32) if known is None else self._file.read(known, start, stop)


def read_signal(assembly: Assembly, path: Path, unplaced: Unplaced = "refuse") -> Signal:
    """The values of a bigWig (`.bw`, `.bigWig`) or bedGraph (`.bedGraph`, `.bdg`, also packed) file.

    unplaced: values of sequences that the assembly has not are refused, or left out with a warning (`drop`).
    Raises DataError that names the file (of bedGraph also the line): for such sequences, values beyond a sequence's
    end, intervals that overlap, a bigWig whose sequence has another length than the assembly's; ConfigError for another
    ending of the name.
    """
    if unplaced not in ("refuse", "drop"):
        raise ConfigError(f"data.unplaced is refuse or drop, not {shown(unplaced)}.")
    kind = ending(path)
    if kind in (".bw", ".bigwig"):
        return _indexed(assembly, path, unplaced)
    if kind in (".bedgraph", ".bdg", ".bg"):
        return _listed(assembly, path, unplaced)
    raise ConfigError(
        f"{path}: values of bases are read from .bigWig, .bw, .bedGraph and .bdg files, by the name's ending. Rename "
        "the file, or convert it."
    )


def _indexed(assembly: Assembly, path: Path, unplaced: Unplaced) -> Signal:
    file = BigWig(path)
    names: dict[str, str] = {}
    left_out = []
    lengths = assembly.lengths
    for theirs, length in file.lengths.items():
        if unplaced == "drop" and assembly.find(theirs) is None:
            left_out.append(theirs)
            continue
        ours = assembly.resolve(theirs, str(path))
        if lengths[ours] != length:
            raise DataError(
                f"{path}: its sequence {shown(theirs)} has {length:,} bases, but the assembly's {shown(ours)} has "
                f"{lengths[ours]:,}. Give the assembly that the values refer to."
            )
        names[ours] = theirs
    _tell(left_out, path)
    return _Indexed(file, names)


def _listed(assembly: Assembly, path: Path, unplaced: Unplaced) -> Signal:
    found: dict[str, _Columns] = {}
    left_out: dict[str, None] = {}
    for value in read_bedgraph(path):
        place = Place(value.chrom, value.start, value.stop, ".", "", f"{path}, line {value.line:,}")
        name = check_place(assembly, place, unplaced)
        if name is None:
            left_out[value.chrom] = None
        else:
            found.setdefault(name, _Columns()).add(value)
    _tell(list(left_out), path)
    lengths = assembly.lengths
    return _Listed({name: _runs(found.pop(name), lengths[name], path) for name in list(found)})


class _Columns:
    """Intervals of a bedGraph as they are read: 28 bytes each, a tenth of what Python's numbers take."""

    def __init__(self) -> None:
        self.starts, self.stops, self.lines = (array.array("q") for _ in range(3))
        self.values = array.array("f")

    def add(self, value: Value) -> None:
        self.starts.append(value.start)
        self.stops.append(value.stop)
        self.values.append(value.value)
        self.lines.append(value.line)


def _runs(rows: _Columns, length: int, path: Path) -> Runs:
    starts, stops, lines = (np.frombuffer(of, np.int64) for of in (rows.starts, rows.stops, rows.lines))
    numbers = np.frombuffer(rows.values, np.float32)
    if (starts[1:] < starts[:-1]).any():
        order = np.argsort(starts, kind="stable")
        starts, stops, lines = (of[order] for of in (starts, stops, lines))
        numbers = numbers[order]
    if len(wrong := np.flatnonzero(starts[1:] < stops[:-1])):
        one, other = sorted(lines[wrong[0] : wrong[0] + 2].tolist())
        raise DataError(
            f"{path}, line {other:,}: the interval overlaps that of line {one:,}, so a base has two values. Merge them "
            "(bedtools merge, or bedtools unionbedg)."
        )
    edges = np.unique(np.concatenate(([0, length], starts, stops)))
    values = np.full(len(edges) - 1, np.nan, np.float32)
    values[np.searchsorted(edges, starts)] = numbers
    return Runs(edges, values, _NAN)


def _tell(left_out: Sequence[str], path: Path) -> None:
    if left_out:
        logger.warning(
            "data.unplaced: the values of %s on %s are left out, which the assembly has not.",
            path,
            cut_list(left_out, most=5),
        )
