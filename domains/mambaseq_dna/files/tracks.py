"""Predictions as tracks of a genome browser: BED for labels, bedGraph and bigWig for numbers.

Positions count from 0, and an end is left out. What has no prediction (N) is in no track.
"""

from __future__ import annotations

import abc
import bisect
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.runs.tables import Block, Files, Table, Words
from mambaseq_dna.files.bigwig import name_sequences, pybigtools

_ACCEPTED = (".bw", ".bigwig", ".bigWig")  # by pybigtools; others, such as .BW, are renamed


def _word(record: str) -> str:
    """A record's name without white space, which ends a column or a line: those of tables may have some."""
    return "_".join(record.split()) or "."


class _Track(Table):
    """Rows without a prediction are left out, and white space in names of records is an underscore."""

    unit = "places"

    def __init__(self, files: Files) -> None:
        super().__init__()
        self._files = files

    def _write(self, place: tuple[str, str, int, int, str]) -> None:
        pass

    def put(self, file: str, record: str, block: Block) -> None:
        super().put(file, _word(record), block)


def _edges(changes: np.ndarray) -> list[tuple[int, int]]:
    """First and behind-last of each run of rows, from `changes` between them, `(n - 1,)` bool."""
    ends = [0, *(np.flatnonzero(changes) + 1).tolist(), len(changes) + 1]
    return list(itertools.pairwise(ends))


class _Run(NamedTuple):
    record: str
    start: int
    stop: int
    label: str
    total: float
    rows: int


class BedTable(_Track):
    """BED: sequence, start, end, class, score, strand. Neighbouring positions of one class are one line.

    score: the mean probability of the class, times 1000, as a whole number. strand: the last character of a class name
    that ends with + or -, otherwise a point.
    """

    lines = 0

    def told(self) -> str:
        return f"{self.lines:,} intervals ({self.predicted:,} places with a label)"

    def _header(self, columns: list[str]) -> None:
        self._out: IO[str] = self._files.path().open("w", encoding="utf-8", newline="")
        self._run: _Run | None = None

    def _put(self, file: str, record: str, block: Block) -> None:
        labels = block.columns[0] if block.columns else None
        if not isinstance(labels, Words):
            raise ConfigError(
                "A BED file holds a label for each place, but these are numbers. Write .bedgraph, .bw or .csv."
            )
        numbers = [column for column in block.columns[1:] if isinstance(column, np.ndarray)]
        if len(numbers) == len(labels.names):
            shares = np.stack(numbers, axis=1)[np.arange(len(labels.codes)), labels.codes]
        else:
            shares = numbers[0] if numbers else np.zeros(len(labels.codes))
        starts, stops = block.starts(), block.stops()
        known = np.ones(len(starts), dtype=bool) if block.known is None else block.known
        changes = (labels.codes[1:] != labels.codes[:-1]) | (known[1:] != known[:-1]) | (not block.each)
        for first, last in _edges(changes):
            if not known[first]:
                continue
            label = labels.names[labels.codes[first]]
            share, count = float(shares[first:last].sum(dtype=np.float64)), last - first
            run = _Run(record, int(starts[first]), int(stops[last - 1]), label, share, count)
            before = self._run
            if block.each and before is not None and before[0] == record and before[2:4] == (run.start, label):
                run = run._replace(start=before.start, total=before.total + share, rows=before.rows + count)
            else:
                self._finish()
            self._run = run

    def _finish(self) -> None:
        if self._run is not None:
            record, start, stop, label, total, count = self._run
            strand = label[-1:] if label[-1:] in ("+", "-") else "."
            name = "".join(" " if sign in "\t\r\n" else sign for sign in label) or "."
            self._out.write(f"{record}\t{start}\t{stop}\t{name}\t{round(1000 * total / count)}\t{strand}\n")
            self.lines += 1

    def close(self) -> None:
        if self._columns is None:
            return
        self._finish()
        self._run = None
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()


class _Numbers(_Track):
    """A file for each column of numbers: the name that was given if there is one, otherwise with the column's in it."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._lengths: dict[str, tuple[int, str]] = {}
        self._taken: dict[str, list[list[int]]] = {}
        self._paths: list[Path] = []

    def told(self) -> str:
        return f"{self.predicted:,} places with a value"

    def sequence(self, file: str, record: str, length: int) -> None:
        record = _word(record)
        known, first = self._lengths.setdefault(record, (length, file))
        if known != length:
            raise DataError(
                f"{file}: its record {shown(record, 300)} has {length:,} bases, the one of {first} {known:,}. A track "
                "has one sequence of a name; predict on one file at a time, or write .csv."
            )

    def _check_free(self, file: str, record: str, start: int, stop: int) -> None:
        """Raise DataError if a place has a value already."""
        taken = self._taken.setdefault(record, [])
        place = bisect.bisect_right(taken, [start, stop])
        before, after = taken[place - 1 : place] if place else [], taken[place : place + 1]
        if (before and before[0][1] > start) or (after and after[0][0] < stop):
            raise DataError(
                f"{file}: {shown(record, 300)}, {start:,} to {stop:,} is predicted twice, and a track has one value at "
                "a place. Give regions and windows that do not overlap, each record once, or write .csv."
            )
        if before and before[0][1] == start:
            before[0][1] = stop
        else:
            taken.insert(place, [start, stop])

    def _header(self, columns: list[str]) -> None:
        pass

    def _numbers(self, file: str, record: str, block: Block) -> np.ndarray:
        """Values `(n, numbers)` float64, NaN where unknown; labels are left out. Opens the files, at first."""
        self._check_free(file, record, block.start, block.stop)
        values = [column.astype(np.float64) for column in block.columns if isinstance(column, np.ndarray)]
        if not self._paths:
            assert self._columns is not None
            pairs = zip(self._columns, block.columns, strict=True)
            names = [name for name, column in pairs if isinstance(column, np.ndarray)]
            if not names:
                raise ConfigError("A track holds numbers, but only labels are to be written: write .bed or .csv.")
            self._paths = [self._files.path(name if len(names) > 1 else "") for name in names]
            self._opened()
        numbers = np.stack(values, axis=1)
        if block.known is not None:
            numbers[~block.known] = np.nan
        return numbers

    @abc.abstractmethod
    def _opened(self) -> None:
        """Called when the names of the files are known."""


class BedGraphTable(_Numbers):
    """bedGraph: sequence, start, end, value with eight digits; a line a position, bin or window."""

    def _opened(self) -> None:
        self._outs: list[IO[str]] = [path.open("w", encoding="utf-8", newline="") for path in self._paths]

    def _put(self, file: str, record: str, block: Block) -> None:
        values = self._numbers(file, record, block)
        known = slice(None) if block.known is None else block.known
        starts, stops = block.starts()[known].tolist(), block.stops()[known].tolist()
        for out, column in zip(self._outs, values[known].T.tolist(), strict=True):
            out.writelines(
                f"{record}\t{start}\t{stop}\t{value:.8g}\n"
                for start, stop, value in zip(starts, stops, column, strict=True)
            )

    def close(self) -> None:
        if not self._paths:
            return
        for out in self._outs:
            out.flush()
            os.fsync(out.fileno())
            out.close()


class BigWigTable(_Numbers):
    """bigWig, by pybigtools, which holds little of it in memory. Its values have to be sorted, and it begins with the
    lengths of all sequences, so values wait in a file (fp32, as bigWig has them) until all are known."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._library = pybigtools()
        self._places: list[tuple[str, int, int, int, int]] = []
        self._bases = 0
        self._error: OSError | None = None
        self._others: dict[str, int] = {}

    def sequences(self, file: str, lengths: Mapping[str, int]) -> None:
        for name, length in lengths.items():
            self._others.setdefault(_word(name), length)

    def _opened(self) -> None:
        self._spool = tempfile.TemporaryFile(dir=self._paths[0].parent)  # noqa: SIM115 - it lives as long as this

    def _put(self, file: str, record: str, block: Block) -> None:
        values = self._numbers(file, record, block).astype(np.float32)
        self._places.append((record, block.start, block.stop, block.step, self._spool.tell()))
        self._spool.write(np.ascontiguousarray(values).data)

    def close(self) -> None:
        if not self._paths:
            return
        names = sorted(self._lengths, key=str.encode)  # as readers search them
        order = {name: number for number, name in enumerate(names)}
        self._places.sort(key=lambda place: (order[place[0]], place[1]))
        lengths = {name: self._lengths[name][0] for name in names}
        everything = self._others | lengths
        for number, path in enumerate(self._paths):
            self._bases, self._error = 0, None
            place = path if path.suffix in _ACCEPTED else path.with_name(f"{path.name}.bw")
            self._library.open(str(place), "w").write(lengths, self._values(number))
            self._check(place)
            name_sequences(place, everything)
            place.replace(path)
        self._spool.close()

    def _values(self, number: int) -> Iterator[tuple[str, int, int, float]]:
        try:
            for record, start, stop, step, offset in self._places:
                starts = np.arange(start, stop, step)
                size = len(starts) * len(self._paths)
                self._spool.seek(offset)
                values = np.frombuffer(self._spool.read(4 * size), np.float32).reshape(-1, len(self._paths))[:, number]
                stops = np.minimum(starts + step, stop)
                known = ~np.isnan(values)
                self._bases += int((stops - starts)[known].sum())
                found = (column[known].tolist() for column in (starts, stops, values))
                yield from zip(itertools.repeat(record), *found)
        except OSError as error:  # which the library prints and forgets
            self._error = error

    def _check(self, path: Path) -> None:
        """Raise what went wrong while a file was written. The library prints errors and goes on."""
        if self._error is not None:
            raise self._error
        try:
            written = self._library.open(str(path)).info()["summary"]["basesCovered"]
        except Exception as error:  # its classes are not told
            written = f"{type(error).__name__}"
        if written != self._bases:
            raise UserError(
                f"The bigWig {path.name} could not be written whole ({written} of {self._bases:,} bases). Is the disk "
                "full? Free some space, or write .bedgraph."
            )
