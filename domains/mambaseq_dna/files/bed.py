"""Reads BED files: intervals of an assembly, counted from 0, the end left out (the UCSC format's columns 1 to 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mambaseq.data.unpacking import Unreadable, read_pieces
from mambaseq.errors import DataError, shown
from mambaseq_dna.files.faults import parsed
from mambaseq_dna.files.fields import NOT_DATA, whole

_LONGEST_LINE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Bed:
    """One line. strand: `+`, `-` or `.`; name is "" and score nan where the file has none. rest: columns 7 and on."""

    chrom: str
    start: int
    stop: int
    name: str = ""
    score: float = float("nan")
    strand: str = "."
    line: int = 0
    rest: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain or packed, with their numbers from 1; without line ends and byte order mark.

    Raises DataError for a file that is missing, cut or damaged, for other text than UTF-8, and for a line of more than
    2^20 bytes.
    """
    path, tail, number = Path(path), b"", 0
    try:
        for piece in read_pieces(path):
            *whole, tail = (tail + piece).split(b"\n")
            for line in whole:
                number += 1
                yield number, _decoded(line, path, number)
            if len(tail) > _LONGEST_LINE:
                raise DataError(
                    f"{path}: line {number + 1:,} is longer than {_LONGEST_LINE:,} bytes. Is it a text file?"
                )
    except Unreadable as error:
        raise error.at(f"after line {number:,}") from error
    if tail:
        yield number + 1, _decoded(tail, path, number + 1)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number:,} is not UTF-8. Is it a text file, in that encoding?") from error


def read_bed(path: str | Path) -> Iterator[Bed]:
    """The intervals of a BED file, plain or packed, in file order; comments, `track` and `browser` lines left out.

    Raises DataError that names file and line: fewer than three columns, positions that are no numbers, an end that is
    not behind the start, another strand than `+`, `-` and `.`; and for a file without intervals.
    """
    found = False
    for one in parsed(text_lines(path), lambda number, line: _intervals(path, number, line)):
        found = True
        yield one
    if not found:
        raise DataError(f"{path} has no interval. Check that it is the right file.")


def _intervals(path: str | Path, number: int, line: str) -> list[Bed]:
    """That of a line; none of a line that is no interval."""
    if not line.strip() or line.startswith(NOT_DATA):
        return []
    cells = line.split("\t") if "\t" in line else line.split()
    where = f"{path}, line {number:,}"
    if len(cells) < 3:
        raise DataError(
            f"{where}: {shown(line)} is not an interval. A BED line has a sequence's name, a start and an end, "
            "separated by tabs."
        )
    try:
        start, stop = whole(cells[1]), whole(cells[2])
    except ValueError as error:
        raise DataError(
            f"{where}: {shown(cells[1])} and {shown(cells[2])} are not whole numbers: a start, counted from 0, and "
            "an end. Is it a BED file?"
        ) from error
    if start >= stop:
        raise DataError(
            f"{where}: the interval {start:,} to {stop:,} is empty. Starts are counted from 0, and an "
            "end is behind its start."
        )
    strand = cells[5] if len(cells) > 5 and cells[5] else "."
    if strand not in ("+", "-", "."):
        raise DataError(f"{where}: the strand (column 6) is {shown(strand)}. Write +, - or a point.")
    name = cells[3] if len(cells) > 3 else ""
    return [Bed(cells[0], start, stop, name, _score(cells), strand, number, tuple(cells[6:]))]


def _score(cells: list[str]) -> float:
    try:
        return float(cells[4])
    except (IndexError, ValueError):  # missing, or a point
        return float("nan")
