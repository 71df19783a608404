"""Reads bedGraph: a value for each of disjoint intervals, counted from 0, the end left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mambaseq.data.tables import LARGEST
from mambaseq.errors import DataError, shown
from mambaseq_dna.files.bed import text_lines
from mambaseq_dna.files.faults import parsed
from mambaseq_dna.files.fields import NOT_DATA, whole


class Value(NamedTuple):
    """One line."""

    chrom: str
    start: int
    stop: int
    value: float
    line: int


def read_bedgraph(path: str | Path) -> Iterator[Value]:
    """The intervals of a bedGraph file, plain or packed, in file order; comments, `track` and `browser` lines left out.

    Raises DataError that names file and line: another number of columns than four, positions that are no numbers, an
    end that is not behind the start, a value that is no finite number up to `LARGEST`; and for a file without
    intervals.
    """
    found = False
    for one in parsed(text_lines(path), lambda number, line: _values(path, number, line)):
        found = True
        yield one
    if not found:
        raise DataError(f"{path} has no interval. Check that it is the right file.")


def _values(path: str | Path, number: int, line: str) -> list[Value]:
    """That of a line; none of a line that is no interval."""
    if not line.strip() or line.startswith(NOT_DATA):
        return []
    cells = line.split()
    where = f"{path}, line {number:,}"
    try:
        chrom, start, stop, value = cells[0], whole(cells[1]), whole(cells[2]), float(cells[3])
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{where}: {shown(line)} is not an interval with a value. A bedGraph line has a sequence's name, a "
            "start, counted from 0, an end and a number."
        ) from error
    if len(cells) != 4:
        raise DataError(f"{where}: {shown(line)} has {len(cells)} columns, not 4. Is it a bedGraph file?")
    if start >= stop:
        raise DataError(
            f"{where}: the interval {start:,} to {stop:,} is empty. Starts are counted from 0, and an "
            "end is behind its start."
        )
    if not math.isfinite(value):
        raise DataError(f"{where}: the value {shown(cells[3])} is not a finite number. Leave the line out.")
    if abs(value) > LARGEST:
        raise DataError(
            f"{where}: the value {shown(cells[3])} is beyond {LARGEST:g}, the largest to learn. Scale the values, or "
            "leave the line out."
        )
    return [Value(chrom, start, stop, value, number)]
