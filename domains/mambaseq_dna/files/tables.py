"""Reads tables with a sequence a row: CSV and TSV, plain or packed, and parquet."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mambaseq.data.records import Refuse, raised
from mambaseq.data.unpacking import read_pieces
from mambaseq.errors import DataError, cut_list, did_you_mean, shown
from mambaseq.limits import check_unpacked
from mambaseq_dna.files.bed import text_lines
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.tokenizer import BaseTokenizer, InvalidBase

_AT_ONCE, _LETTERS = 4096, 1 << 22  # rows, and letters, that become ids together
_ROWS = 256  # of parquet, whose rows may all be as long as one
_LONGEST_CELL = 1 << 24
_INVALID = 255
_OPTIONAL = ("data.split", "data.group", "data.names")  # settings that may be null
_TABLE = np.frombuffer(BaseTokenizer("keep").table, dtype=np.uint8)


class Row(NamedTuple):
    """A sequence of a file. line: its line, row or number in the file, from 1. name: "" if it has none. ids:
    `(length,)` uint8 of `BaseTokenizer("keep")`. fields: what is in the columns that were asked for, as text."""

    line: int
    name: str
    ids: np.ndarray
    fields: tuple[str, ...]


def is_parquet(path: Path) -> bool:
    """Whether a file is parquet by its name."""
    return path.suffix.lower() in (".parquet", ".pq")


def table_rows(
    path: Path,
    sequence: str = "sequence",
    name: str | None = None,
    fields: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    refuse: Refuse = raised,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """The rows of a table, in order. The ending `.parquet` or `.pq` says that it is parquet; any other file is text
    with commas, tabs or semicolons between its columns, whichever its first line has.

    sequence, name, fields: names of columns. name: None takes the column `name` or `id` where there is one. columns:
        names of all columns of a file without a header; None: the first line holds them.
    refuse: called for a row that cannot be used; the others are returned. settings: for messages, which setting asks
        for a column.
    Raises DataError that names file and line: a missing column, another number of cells than columns, an open quote, an
    empty sequence, a letter that is no base; and for a file without rows. Rows are told together (`Faults`); none is
    returned after a wrong one.
    """
    wanted = [sequence, *fields] + ([] if name is None else [name])
    faults, odd = Faults(refuse), dict[int, str]()
    cells = _parquet(path, wanted, settings) if is_parquet(path) else _delimited(path, wanted, columns, odd, settings)
    known, unit = next(cells)
    if name is None and (name := _names_column(known)) is not None:
        wanted.append(name)
    places = [known.index(column) for column in wanted]
    found = 0
    for chunk in _chunks(cells, places[0]):
        sequences = [row[places[0]].strip() for _, row in chunk]
        encoded, wrong = _encoded(path, unit, sequences, chunk, columns, odd, faults)
        found += len(chunk)
        if faults.count:
            continue
        for number, ((line, row), ids) in enumerate(zip(chunk, encoded, strict=True)):
            if number in wrong:
                continue
            told = row[places[-1]] if name is not None else ""
            yield Row(line, told, ids, tuple(row[place].strip() for place in places[1 : 1 + len(fields)]))
    faults.check()
    if not found:
        raise DataError(f"{path} has no rows. Check that it is the right file.")


def table_columns(path: Path, columns: Sequence[str] | None = None) -> list[str]:
    """The names of a table's columns. Raises DataError as `table_rows`."""
    if not is_parquet(path):
        return list(next(_delimited(path, [], columns, {}, {}))[0])
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path} cannot be read as parquet: {reason}. Copy or write it again.")


def _chunks(cells: Iterator[Any], place: int) -> Iterator[list[Any]]:
    """Rows in lists of up to `_AT_ONCE`, and of about `_LETTERS` letters, so that memory does not grow with sequences.
    place: of the sequence in a row."""
    chunk: list[Any] = []
    letters = 0
    for row in cells:
        chunk.append(row)
        letters += len(row[1][place])
        if len(chunk) == _AT_ONCE or letters >= _LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _encoded(
    path: Path,
    unit: str,
    sequences: list[str],
    chunk: list[Any],
    columns: Sequence[str] | None,
    odd: dict[int, str],
    faults: Faults,
) -> tuple[list[np.ndarray], set[int]]:
    """The ids of sequences, and which are wrong; how, as faults. odd: see `_delimited`."""
    letters = np.frombuffer("".join(sequences).encode("latin-1", "replace"), dtype=np.uint8)
    ids = _TABLE[letters]
    ends = np.cumsum([len(one) for one in sequences])
    starts = np.concatenate(([0], ends[:-1]))
    wrong = np.flatnonzero(ids == _INVALID)
    rows, first = np.unique(np.searchsorted(ends, wrong, side="right"), return_index=True)
    at = dict(zip(rows.tolist(), wrong[first].tolist(), strict=True))
    bad = {*at, *np.flatnonzero(ends == starts).tolist()}
    for row in sorted(bad):
        line = chunk[row][0]
        place = f"{unit} {line:,}"
        if faults.named:
            faults.add(place)
        elif row not in at:
            told = odd.get(line, "the sequence is empty. Remove the row, or complete it.")
            faults.add(place, f"{path}, {place}: {told}")
        else:
            position = at[row] - int(starts[row])
            names = columns and line == 1
            header = " If this line holds the names of columns, set data.columns to null." if names else ""
            faults.add(
                place,
                f"{path}, {place}: {InvalidBase(sequences[row][position], position)} The sequence is "
                f"{shown(sequences[row], 30)}.{header}",
            )
    odd.clear()
    return [ids[start:stop] for start, stop in zip(starts.tolist(), ends.tolist(), strict=True)], bad


def _names_column(known: Sequence[str]) -> str | None:
    """The column that names rows, if none is asked for."""
    return next((name for name in ("name", "id") if name in known), None)


def _check_there(
    path: Path,
    wanted: Sequence[str],
    known: Sequence[str],
    settings: Mapping[str, str],
    columns: Sequence[str] | None = (),
) -> None:
    """Raise DataError for all columns that are wanted and not there, or there twice. settings: which setting asks for a
    column. columns: names that were given for a file without a header; None if the first line is taken for one."""
    missing = [column for column in dict.fromkeys(wanted) if column not in known]
    for column in wanted:
        if known.count(column) > 1:
            raise DataError(f"{path} has {known.count(column)} columns {shown(column)}. Rename all but one.")
    if not missing:
        return
    names = [str(one)[:40] for one in known]
    near = "".join(did_you_mean(column, names) for column in missing)
    told = [f"{shown(column)}{f' ({settings[column]})' if column in settings else ''}" for column in missing]
    hint = ""
    if columns:
        hint = " These are data.columns."
    elif columns is None:
        optional = [name for column in missing if (name := settings.get(column)) in _OPTIONAL]
        null = f", or set {cut_list(optional)} to null" if optional else ""
        hint = (
            f" Correct the setting or the header{null}. If the file has no header, name its columns in order: "
            "data.columns."
        )
        bases = next((place for place, cell in enumerate(known) if _looks_like_bases(cell)), None)
        if bases is not None and wanted[0] in missing:
            rest = iter(missing[1:])
            names_of = [wanted[0] if k == bases else next(rest, f"other{k + 1}") for k in range(len(known))]
            hint = (
                f" Column {bases + 1} of its first line holds bases: the file has no header. Name all its columns in "
                f"order, such as data.columns: [{cut_list(names_of, 8)}]."
            )
    raise DataError(
        f"{path} has no column{'s' if len(told) > 1 else ''} {cut_list(told, 6)}.{near} It has: "
        f"{cut_list(map(repr, names), 8)}.{hint}"
    )


def _looks_like_bases(cell: str) -> bool:
    """Whether a cell of a first line is a sequence, rather than the name of a column."""
    return len(cell) >= 4 and not set(cell.upper()) - set("ACGTUN")


def _delimited(
    path: Path,
    wanted: Sequence[str],
    columns: Sequence[str] | None,
    odd: dict[int, str],
    settings: Mapping[str, str],
) -> Iterator[Any]:
    """First (names of the columns, what a row is called), then (line, cells) of each row; empty ones for a row with
    another number of cells, about which `odd` then says what is wrong, by its line."""
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for number, line in text_lines(path):
            at = number
            yield line + "\n"

    given = lines()
    first = next((line for line in given if line.strip()), None)
    if first is None:
        raise DataError(f"{path} is empty, or has only blank lines. Check that it is the right file.")
    delimiter = next((sign for sign in "\t,;" if sign in first), ",")
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    rows = csv.reader(itertools.chain([first], given), delimiter=delimiter, strict=True)
    begun = at
    try:
        if columns is None:
            header = [cell.strip() for cell in next(rows)]
        else:
            header = list(columns)
        _check_there(path, wanted, header, settings, columns)
        yield header, "line"
        begun = at + (columns is None)
        for cells in rows:
            if len(cells) != len(header):
                if not cells or (len(cells) == 1 and not cells[0].strip()):
                    continue  # a blank line
                odd[at] = (
                    f"the row has {len(cells)} cells, and there are {len(header)} columns "
                    f"({cut_list(header, 6)}). Correct the row: {shown(delimiter.join(cells), 60)}."
                )
                cells = [""] * len(header)
            yield at, cells
            begun = at + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {begun:,}: the row cannot be read ({error}). A cell that begins with a quote must end with "
            "one."
        ) from error


def _parquet(path: Path, wanted: Sequence[str], settings: Mapping[str, str]) -> Iterator[Any]:
    """As `_delimited`."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        known = table.schema_arrow.names
        _check_there(path, wanted, known, settings)
        own = _names_column(known)
        use = list(dict.fromkeys([*wanted, *([] if own is None else [own])]))
        _check_there(path, use, known, settings)
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        check_unpacked(sum(sizes), path.stat().st_size, str(path))
        yield use, "row"
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS, columns=use):
            columns = [[_text(value) for value in batch.column(column).to_pylist()] for column in use]
            for row in zip(*columns, strict=True):
                number += 1
                yield number, row
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise _no_parquet(path, error) from error


def _text(value: Any) -> str:
    """A value of a parquet table as a CSV file would have it."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # whole numbers in a column with gaps
        return str(int(value))
    return str(value)


def plain_sequence(path: Path) -> str:
    """The letters of a file that holds one sequence and nothing else, without white space. Raises DataError as
    `read_pieces` does, and for other text than ASCII."""
    data = b"".join(read_pieces(path)).removeprefix(b"\xef\xbb\xbf")
    try:
        return "".join(data.decode("ascii").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds more than letters of bases (byte {error.start:,}). Check the file.") from error
