"""The table that `predict` writes: rows in order, cells that no spreadsheet takes for formulas, nothing lost."""

from __future__ import annotations

import collections
import contextlib
import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mambaseq.atomic import atomic_path
from mambaseq.errors import UserError
from mambaseq.outputs import is_stream, output_stream, output_target

COLUMNS = ("file", "record", "start", "stop")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def safe_cell(text: str) -> str:
    """Text that a spreadsheet shows and does not run: an apostrophe stands before what begins like a formula (=, +, -,
    @, tab, carriage return; OWASP, "CSV Injection"). Numbers stay numbers.

    >>> safe_cell("=1+1"), safe_cell("-1.5e-3"), safe_cell("chr1")
    ("'=1+1", '-1.5e-3', 'chr1')
    """
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text) else text


def partial_path(path: Path) -> Path:
    """Where what was finished before an error is kept: `bits.csv` → `bits.partial.csv`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class Table:
    """Rows of predictions: file, record, start, stop, the values' columns, a note.

    A row without a prediction has empty cells and a note that says why; such rows that come before the first prediction
    wait for it, since the columns are not known before.

    rows: written so far. predicted: those with a prediction. notes: how often each note was written.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self._writer = file, csv.writer(file)
        self._waiting: list[list[str]] = []
        self._width: int | None = None
        self.rows = self.predicted = 0
        self.notes: collections.Counter[str] = collections.Counter()

    def begin(self, columns: Sequence[str]) -> None:
        """Write the header; columns: names of the values."""
        if self._width is None:
            self._width = len(columns)
            self._writer.writerow([*COLUMNS, *map(safe_cell, columns), "note"])
            for place in self._waiting:
                self._write(place, [""] * self._width)
            self._waiting.clear()

    def _write(self, place: list[str], values: Sequence[str]) -> None:
        self._writer.writerow([*place[:4], *values, place[4]])

    def add(self, file: str, record: str, start: int, stop: int, values: Sequence[str] | None, note: str = "") -> None:
        """values None: there is no prediction, and `note` says why."""
        place = [safe_cell(file), safe_cell(record), str(start), str(stop), safe_cell(note)]
        self.rows += 1
        if values is None:
            self.notes[note] += 1
            if self._width is None:
                self._waiting.append(place)
                return
            values = [""] * self._width
        else:
            self.predicted += 1
        self._write(place, [safe_cell(value) for value in values])


@contextlib.contextmanager
def table(out: Path) -> Iterator[Table]:
    """A table that takes its place at `out` when the block ends well; see `mambaseq.outputs` for links, devices, pipes.

    Predictions that are finished when the block ends with an error of the user's, with Ctrl-C or for want of memory are
    kept at `partial_path(out)`; a UserError is raised again and says so. Without any nothing is kept.
    """
    target = output_target(out)
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    if is_stream(out):
        with output_stream(out, "w", **options) as file:
            yield Table(file)
        return
    with atomic_path(target) as temporary, temporary.open("x", **options) as file:
        rows = Table(file)
        try:
            yield rows
        except (UserError, KeyboardInterrupt, MemoryError) as error:
            if not rows.predicted:
                raise
            file.flush()
            os.fsync(file.fileno())
            kept = partial_path(target)
            temporary.replace(kept)
            told = f"The {rows.rows:,} rows finished before are in {kept}."
            if isinstance(error, UserError):
                raise UserError(f"{error} {told}") from error
            print(f"\n{told}", file=sys.stderr)
            raise
