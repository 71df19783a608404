"""Tables: of numbers in CSV files, and of rows with names (CSV, TSV, jsonl), for readers of domains."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.errors import DataError, cut_list, shown
from mambaseq.limits import TABLE_BYTES, WINDOW

LARGEST = 1e9
"""The largest number: measurements are smaller, and squares of larger ones could overflow."""

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Of the names of tables of rows."""

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


def named_rows(path: Path, what: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line and row of each row of a table, by its name's ending: CSV and TSV with a first line of names, whose values
    are texts (commas, tabs or semicolons between them, whichever the first line has), or jsonl, an object a line.

    what: the option that names the table, for messages.
    Raises DataError that names the file, and the line where there is one; UserError for one over `limits.TABLE_BYTES`.
    """
    try:
        TABLE_BYTES.check(path.stat().st_size, str(path))
        yield from _rows_of(path, what)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start:,}). Save it in that encoding.") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table: {error}. Correct it.") from error
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{what} {shown(path, 300)} cannot be read: {reason}. Check the path.") from error


def _rows_of(path: Path, what: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{what} {shown(path, 300)} must end in .csv, .tsv or .jsonl. Rename it.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if ending in (".csv", ".tsv"):
            first = file.readline(HEADER)
            file.seek(0)
            signs = ",;\t" if ending == ".csv" else "\t,;"
            sign = next((sign for sign in signs if sign in first), signs[0])
            rows = csv.DictReader(file, delimiter=sign, strict=True)
            names = [name.strip() for name in rows.fieldnames or []]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} has more than one column {cut_list(twice, 3)}. Rename or remove one.")
            for row in rows:
                if None in row:
                    raise DataError(
                        f"{path}, line {rows.line_num} has more cells than there are columns. Quote a name that holds "
                        f"the separator."
                    )
                yield rows.line_num, {name.strip(): value for name, value in row.items() if isinstance(name, str)}
            return
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                one = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {line} is no JSON: {str(error)[:100]}. Correct it.") from error
            if not isinstance(one, dict):
                raise DataError(f"{path}, line {line} is no JSON object of names and values. Correct it.")
            yield line, one
