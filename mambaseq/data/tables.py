"""Tables of numbers in CSV files, for readers of domains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambaseq.errors import DataError, shown
from mambaseq.limits import WINDOW

LARGEST = 1e9
"""The largest number: measurements are smaller, and squares of larger ones could overflow."""

HEADER = 100_000
"""Characters of the first line that are read at most."""


def read_table(path: str | Path, columns: Sequence[str], *, others: bool = False) -> np.ndarray:
    """The rows of a CSV file whose first line names these columns, `(rows, columns)` float64; there may be none.

    others: it may name others too, in any order, which are left out: dates, names.
    Raises DataError that names the file, and the line if there is one: for a missing file, other text than UTF-8,
    another first line, or a row with anything but finite numbers up to `LARGEST`; UserError for more rows than
    `limits.WINDOW`.
    """
    path, header = Path(path), ",".join(name.strip() for name in columns)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            there = [name.strip() for name in file.readline(HEADER).split(",")]
            first = ",".join(there)
            if first != header and not (others and all(there.count(name.strip()) == 1 for name in columns)):
                must = "name each of" if others else "be"
                raise DataError(
                    f"{path}: the first line must {must} {shown(header)}, not {shown(first)}. Add that header."
                )
            lines = list(itertools.islice(file, WINDOW.value + 1))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start:,}). Save it in that encoding.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    WINDOW.check(len(lines), str(path))
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        return np.zeros((0, len(columns)))
    places = [there.index(name.strip()) for name in columns] if others else list(range(len(there)))
    try:
        table = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2, usecols=places)
        if table.shape != (len(lines), len(columns)) or any(line.count(",") + 1 != len(there) for line in lines):
            raise ValueError("rows are empty or have other columns")
    except ValueError as error:
        line, row = _first_wrong(lines, len(there), places)
        among = f" in {len(there)} columns" if len(there) > len(columns) else ""
        raise DataError(
            f"{path}: line {line} is not {len(columns)} numbers{among} with points for decimals and commas between "
            f"them: {shown(row)}. Correct or remove it."
        ) from error
    good = (np.abs(table) <= LARGEST).all(axis=1)
    if not good.all():
        line = int(np.argmin(good)) + 2
        raise DataError(f"{path}: line {line} has a gap (nan or inf), or a number above 1e9. Fill or cut it out.")
    return table


def _first_wrong(lines: list[str], columns: int, places: list[int]) -> tuple[int, str]:
    for number, line in enumerate(lines, start=2):
        cells = line.split(",")
        if len(cells) != columns or not all(_is_number(cells[place]) for place in places):
            return number, line.rstrip("\n")
    return 2, lines[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
