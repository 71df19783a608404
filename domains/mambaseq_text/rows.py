"""Reads documents one by one: rows of jsonl, JSON arrays, parquet and CSV, or parts of plain text."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mambaseq.conditions import as_written
from mambaseq.data.addresses import is_address
from mambaseq.data.records import Refuse, raised
from mambaseq.data.unpacking import Unreadable, packed_by
from mambaseq.errors import DataError, UserError, cut_list, did_you_mean, shown
from mambaseq.limits import DOCUMENT_BYTES, check_unpacked
from mambaseq_text.lines import byte_lines, lines, paragraphs, whole
from mambaseq_text.opening import characters, explained, is_utf8, not_encoded, opened, suffix_of, unpacked

Unit = Literal["file", "paragraph", "line"]

# How a user names the field or column of the text; predict and generate read that of the run's data.
_FIELD = "(data.field of training data, --field of text commands; predict reads the field that was trained on)"
_JSONL, _TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
_ROWS, _BATCH_BYTES = (8, 256), 2**28
_PIECE = 1 << 20
_WHITE = " \t\r\n"

Row = tuple[str, str, dict[str, Any]]
"""The place of a document, its text, and the values of other columns."""


class BadRow(DataError):
    """A row that cannot be used, after which others may be.

    file, line: where it is; line counts rows in parquet. reason: what is wrong with it, in a few words.
    """

    def __init__(self, message: str, file: str, line: int, reason: str) -> None:
        super().__init__(message)
        self.file, self.line, self.reason = file, line, reason
        self.place = f"{file}, line {line}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.file, self.line, self.reason)


def is_plain(name: str) -> bool:
    """Whether a file is plain text by its name: neither jsonl, JSON, parquet nor CSV."""
    return suffix_of(name) not in (*_JSONL, *_TABLES, ".parquet")


def is_packed(name: str) -> bool:
    """Whether a file is packed by what is in it. An address is never."""
    if is_address(name):
        return False
    with explained(name), Path(name).open("rb") as file:
        return packed_by(file.read(18))


def documents(
    name: str, *, field: str = "text", encoding: str = "utf-8", unit: Unit = "file", refuse: Refuse = raised
) -> Iterator[tuple[str, str]]:
    """Documents of one file in order, as `(where, text)`; nothing is kept in memory or in a cache.

    jsonl (`.jsonl`, `.ndjson`, `.json`: an object a line, or one array of objects), parquet and tables (`.csv`, `.tsv`
    with a first line of names) hold a document in `field` of each row; in any other file, `unit` says what a document
    is. Files may be packed (gz, xz, zst, bz2). Line ends inside a document are kept.
    refuse: called with a BadRow for a row that cannot be used; the default raises it.
    Raises DataError that names the file, and line, row or byte; UserError for a document that exceeds the limit
    `DOCUMENT_BYTES`, and for a file that unpacks to too much.
    """
    for where, text, _ in rows(name, field, encoding, unit, (), refuse):
        yield where, text


def rows(
    name: str, field: str, encoding: str, unit: Unit, more: Sequence[str], refuse: Refuse = raised
) -> Iterator[Row]:
    """As `documents`, with the values in other columns, `more`. Raises DataError for a file that has no columns."""
    if not is_plain(name):
        for kind, number, row in objects(name, [field, *more], encoding, refuse):
            try:
                text = text_in(row, field, kind, number, name)
            except BadRow as error:
                refuse(error)
                continue
            yield f"{name}, {kind} {number}", text, {other: row[other] for other in more}
        return
    if more:
        raise DataError(f"{name} is plain text and has no column {shown(more[0])}. Give jsonl or parquet, or a table.")
    with _damage_first(name):
        if unit == "file":
            yield from ((name, text, {}) for text in whole(name, characters(name, encoding)))
        else:
            cut = paragraphs if unit == "paragraph" else lines
            for number, text in enumerate(cut(name, characters(name, encoding)), start=1):
                yield f"{name}, {unit} {number}", text, {}


class _damage_first:
    """A damaged file is worse than a bad line in it: its checksum shows it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DataError) and not isinstance(error, Unreadable) and is_packed(self.name):
            for _ in unpacked(self.name):
                pass


def objects(
    name: str, columns: Sequence[str], encoding: str = "utf-8", refuse: Refuse = raised
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The rows of a file that is not plain, as `(kind, number, values)`; kind is `line` or `row`, numbers count from 1.

    columns: what must be there; they are the keys of `values`. Accents may be written in another way. refuse: called
        with a BadRow. Raises as `documents` does, and DataError for parquet or a table without such a column.
    """
    with _damage_first(name):
        suffix = suffix_of(name)
        if suffix == ".parquet":
            yield from _parquet(name, columns)
        elif suffix in _TABLES:
            yield from _table(name, columns, encoding, refuse)
        elif suffix == ".json" and (found := _array(name, encoding)) is not None:
            for number, value in found:
                try:
                    yield "row", number, _values("row", number, name, value, columns)
                except BadRow as error:
                    refuse(error)
        else:
            for number, line in _json_lines(name, encoding, refuse):
                try:
                    values = _values("line", number, name, _loaded(name, number, line, columns), columns)
                except BadRow as error:
                    refuse(error)
                    continue
                yield "line", number, values


def _bad(kind: str, number: int, name: str, reason: str, remedy: str) -> BadRow:
    """A row that is something that it must not be."""
    return BadRow(f"{kind.capitalize()} {number} of {name} {reason}. {remedy}", name, number, reason)


def _json_lines(name: str, encoding: str, refuse: Refuse) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank. What is not UTF-8 ends with its line; other encodings end the file."""
    if not is_utf8(encoding):
        yield from (
            (n, line) for n, line in enumerate(lines(name, characters(name, encoding)), start=1) if line.strip()
        )
        return
    offset, head = 0, b""
    for number, raw in enumerate(byte_lines(name, unpacked(name)), start=1):
        head = head or raw[:18]
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            value = raw[error.start]
            whole_file = not_encoded(name, offset + error.start, encoding, value, head)
            if number == 1 and (b"\0" in head or head[:2] in (b"\xff\xfe", b"\xfe\xff")):
                raise whole_file from error
            reason = f"is not UTF-8: byte 0x{value:02x} at offset {offset + error.start:,}"
            refuse(BadRow(f"{whole_file} It is in line {number:,}.", name, number, reason))
            line = ""
        offset += len(raw)
        if line.strip():
            yield number, line


def _loaded(name: str, number: int, line: str, columns: Sequence[str]) -> Any:
    if line.startswith("\ufeff"):
        raise DataError(
            f"Line {number} of {name} begins with a byte order mark (BOM), which is not JSON. Save the file "
            "without it, or say that it is utf-8-sig (data.encoding of training data, --encoding of text/perplexity)."
        )
    try:
        return json.loads(line.rstrip("\r\n"))  # its end is not told as what is wrong with an open text
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        remedy = "Each line must be one complete JSON object; correct or remove the line."
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; endlessly nested lists
        reason, remedy = f"cannot be read as JSON: {str(error)[:100]}", "Correct or remove the line."
    raise _bad("line", number, name, reason, remedy)


def _values(kind: str, number: int, name: str, row: Any, columns: Sequence[str]) -> dict[str, Any]:
    """What a row of JSON has in these columns."""
    if not isinstance(row, dict):
        reason = f"is not a JSON object but {type(row).__name__}"
        raise _bad(kind, number, name, reason, f"Write {{{shown(columns[0])}: ...}}.")
    written = as_written(columns, row)
    for place, other in enumerate(written.values()):
        if other not in row:
            remedy = f"Name one {_FIELD}" if not place else "Name another column"
            reason = f"has no field {shown(other)}"
            raise _bad(
                kind, number, name, reason, f"{_known(other, list(row))} {remedy}, or correct the {kind}.".strip()
            )
    return {column: row[other] for column, other in written.items()}


def text_in(row: dict[str, Any], field: str, kind: str, number: int, name: str) -> str:
    """The text in a column of a row. Raises BadRow if it is none."""
    text = row[field]
    if not isinstance(text, str):
        if kind == "row" and suffix_of(name) == ".parquet":
            reason = f"holds {type(text).__name__} in {shown(field)}, not text"
            raise _bad(kind, number, name, reason, f"Remove the row, or name a column of text {_FIELD}.")
        raise BadRow(
            f"Field {shown(field)} in {kind} {number} of {name} is not text but {type(text).__name__}. Correct or "
            "remove it.",
            name,
            number,
            f"{shown(field)} is not text but {type(text).__name__}",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(
            f"Field {shown(field)} in {kind} {number} of {name} holds half of a surrogate pair ({half}) at character "
            f"{error.start:,}, which is no text. Correct or remove the {kind}.",
            name,
            number,
            f"{shown(field)} holds half of a surrogate pair ({half})",
        ) from error
    return text


def _known(field: str, names: Sequence[str]) -> str:
    short = [name[:40] for name in names]
    return f"{did_you_mean(field, short)} It has: {cut_list(map(repr, short), 8)}."


def columns(path: str | Path) -> list[str]:
    """The columns of a file that is not plain; of JSON those of its first row. None of plain text, or of what cannot be
    read, which `read_text` tells."""
    name = str(path)
    if is_address(name) or is_plain(name):
        return []
    with contextlib.suppress(UserError, ValueError, RecursionError, OSError):
        if suffix_of(name) == ".parquet":
            import pyarrow.parquet

            with opened(name) as (file, _):
                return list(pyarrow.parquet.ParquetFile(file).schema_arrow.names)
        if suffix_of(name) in _TABLES:
            return _names(name, next(lines(name, characters(name, "utf-8")), ""))[0]
        found = _array(name, "utf-8") if suffix_of(name) == ".json" else None
        if found is None:
            found = ((number, json.loads(line)) for number, line in _json_lines(name, "utf-8", raised))
        for _, row in found:
            return list(row) if isinstance(row, dict) else []
    return []


def _array(name: str, encoding: str) -> Iterator[tuple[int, Any]] | None:
    """The values of a JSON array, with their numbers; None for a file that begins with anything else."""
    pieces = characters(name, encoding)
    held = ""
    for piece in pieces:
        if held := piece.removeprefix("\ufeff").lstrip(_WHITE):
            break
    if not held.startswith("["):
        pieces.close()  # type: ignore[attr-defined]
        return None
    return _values_of(name, held[1:], pieces)


def _values_of(name: str, held: str, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    decoder, number, at, over = json.JSONDecoder(), 1, 0, False
    wanted = _PIECE
    while True:
        while len(held) - at < wanted and not over:
            piece = next(pieces, None)
            over = piece is None
            held, at = held[at:] + (piece or ""), 0
        while held[at : at + 1] and held[at] in _WHITE:
            at += 1
        if number == 1 and held[at : at + 1] == "]":
            end = at
        else:
            try:
                value, end = decoder.raw_decode(held, at)
            except json.JSONDecodeError as error:
                if not over:  # it may be cut
                    wanted = 2 * (len(held) - at)
                    DOCUMENT_BYTES.check(len(held) - at, f"{name}, row {number:,}")
                    continue
                raise DataError(
                    f"Row {number} of {name} is not JSON: {error.msg}. An array of objects must be whole; correct it, "
                    "or write an object a line, of which a broken one can be left out."
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"Row {number} of {name} cannot be read as JSON: {str(error)[:100]}. Correct it."
                ) from error
            wanted = _PIECE
            while held[end : end + 1] and held[end] in _WHITE:
                end += 1
            if end == len(held) and not over:
                wanted = end - at + _PIECE
                continue
            yield number, value
            number += 1
        if held[end : end + 1] == ",":
            at = end + 1
            continue
        rest = held[end + 1 :] + ("" if over else "".join(pieces))
        if held[end : end + 1] != "]" or rest.strip(_WHITE):
            raise DataError(
                f"{name} is no JSON array of objects after its row {number - 1:,}: a comma or the end is missing, or "
                "something stands behind it. Correct it, or write an object a line."
            )
        return


def _names(name: str, first: str) -> tuple[list[str], str]:
    """The names in the first line of a table, and the sign between them."""
    first = first.removeprefix("\ufeff")
    signs = ",;\t" if suffix_of(name) == ".csv" else "\t,;"
    sign = next((sign for sign in signs if sign in first), signs[0])
    try:
        return [one.strip() for one in next(csv.reader([first], delimiter=sign), [])], sign
    except csv.Error as error:
        raise DataError(f"The first line of {name} names no columns: {error}. Give it a line of names.") from error


def _table(
    name: str, columns: Sequence[str], encoding: str, refuse: Refuse
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of a CSV or TSV file whose first line has names; the number is that of the line in which a row ends."""
    csv.field_size_limit(max(csv.field_size_limit(), DOCUMENT_BYTES.value))
    source = lines(name, characters(name, encoding))
    names, sign = _names(name, next(source, ""))
    written = as_written(columns, names)
    for other in written.values():
        if other not in names:
            raise DataError(f"{name} has no column {shown(other)}.{_known(other, names)} Name one of them {_FIELD}.")
    places = {column: names.index(other) for column, other in written.items()}
    reader = csv.reader(source, delimiter=sign, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            refuse(_bad("line", reader.line_num + 1, name, f"is no row: {error}", "Correct its quotes, or remove it."))
            continue
        if cells is None:
            return
        if not cells:
            continue
        number = reader.line_num + 1
        if len(cells) != len(names):
            reason = f"has {len(cells)} cells, not {len(names)}"
            refuse(_bad("line", number, name, reason, "Quote what holds the separator, or remove the line."))
            continue
        yield "line", number, {column: cells[place] for column, place in places.items()}


def _parquet(name: str, columns: Sequence[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import pyarrow.parquet

    # pyarrow raises many types of errors for a damaged file
    with explained(name, Exception), opened(name) as (file, size):
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        there = table.schema_arrow.names
        written = as_written(columns, there)
        for place, other in enumerate(written.values()):
            if other not in there:
                remedy = "Name one of them" if place else f"Name one of them {_FIELD}"
                raise DataError(f"{name} has no column {shown(other)}.{_known(other, there)} {remedy}.")
        # not by columns: asking for one that a damaged index lacks crashes the process
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        check_unpacked(sum(sizes), size or sum(sizes), name)
        # a value may be as long as its group, and is repeated for each row that refers to it
        at_once = max(_ROWS[0], min(_ROWS[1], _BATCH_BYTES // max([1, *sizes])))
        number = taken = 0
        for batch in table.iter_batches(batch_size=at_once, columns=list(dict.fromkeys(written.values()))):
            found = {column: batch.column(other).to_pylist() for column, other in written.items()}
            for place in range(batch.num_rows):
                number += 1
                values = {column: values[place] for column, values in found.items()}
                length = sum(len(value) for value in values.values() if isinstance(value, str | list))
                taken += length
                DOCUMENT_BYTES.check(length, f"{name}, row {number}")
                check_unpacked(taken, size or taken, name)
                yield "row", number, values
