"""Reads text files: whole files byte by byte, or documents one by one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mambaseq.conditions import as_written
from mambaseq.data.addresses import check_address, is_address
from mambaseq.data.cache import locate
from mambaseq.data.files import relative_names
from mambaseq.data.records import Record, Refuse, raised, rest_left_out, with_columns
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.data.unpacking import Unreadable, packed_by
from mambaseq.errors import ConfigError, DataError, UserError, cut_list, did_you_mean, shown
from mambaseq.limits import DOCUMENT_BYTES, check_unpacked
from mambaseq_text.lines import lines, paragraphs, whole
from mambaseq_text.opening import (
    CHUNK,
    characters,
    check_encoding,
    explained,
    is_utf8,
    not_encoded,
    opened,
    suffix_of,
    unpacked,
)

Unit = Literal["file", "paragraph", "line"]

_JSONL = (".jsonl", ".ndjson", ".json")
_ROWS, _BATCH_BYTES = (8, 256), 2**28


def text_files(names: str | Sequence[str], key: str = "files") -> list[str]:
    """The files that names stand for, in order, each once: paths, patterns and resources (see
    `mambaseq.data.cache.locate`); an address with `://` stays as it is. key: the setting with the names.

    Raises DataError if there is none, and for a folder; ConfigError for an address that contains a secret.
    """
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if is_address(name):
            check_address(name, key)
            found.append(name)
        elif _is_folder(name):
            pattern = Path(name) / "**" / "*.txt"
            raise DataError(
                f"{shown(name, 300)} is a folder. Name the files in it, with a pattern: {shown(pattern, 300)}."
            )
        else:
            found += map(str, locate(name))
    return list(dict.fromkeys(found))


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long
        return False


def is_plain(name: str) -> bool:
    """Whether a file is plain text by its name: neither jsonl nor parquet."""
    return suffix_of(name) not in (*_JSONL, ".parquet")


def read_bytes(name: str, encoding: str = "utf-8") -> np.ndarray:
    """A plain text file as UTF-8 bytes, `(size,)` uint8; memory-mapped if it is UTF-8 and not packed.

    Raises DataError if it is empty or cannot be read or decoded, UserError if it unpacks to too much. `decoded` checks
    UTF-8 itself.
    """
    check_encoding(name, encoding)
    data = np.zeros(0, np.uint8)
    if is_utf8(encoding) and not _is_packed(name) and not is_address(name):
        with explained(name, ValueError):
            if Path(name).stat().st_size:
                data = np.memmap(name, dtype=np.uint8, mode="r")
    else:
        pieces = unpacked(name) if is_utf8(encoding) else (text.encode() for text in characters(name, encoding))
        joined = bytearray()
        for piece in pieces:
            joined += piece
        data = np.frombuffer(joined, dtype=np.uint8)
    if not data.size:
        raise DataError(f"{name} is empty. Put text into it, or leave it out.")
    return data


def _is_packed(name: str) -> bool:
    if is_address(name):
        return False
    with explained(name), Path(name).open("rb") as file:
        return packed_by(file.read(18))


def character_start(data: np.ndarray, position: int) -> int:
    """The nearest place at or before `position` where a UTF-8 character begins."""
    while 0 < position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position


def decoded(name: str, data: np.ndarray, start: int, stop: int) -> Iterator[str]:
    """Text of the bytes `[start, stop)` of a file in pieces of at most 1 MiB, cut after a line's end if possible.

    Raises DataError that names the file and the byte where it is not UTF-8.
    """
    while start < stop:
        end = min(start + CHUNK, stop)
        if end < stop:
            piece = data[start:end].tobytes()
            line_end = piece.rfind(b"\n") + 1
            end = start + line_end if line_end else max(character_start(data, end), start + 1)
        try:
            yield data[start:end].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise not_encoded(name, at, "utf-8", int(data[at]), data[:18].tobytes()) from error
        start = end


def documents(
    name: str, *, field: str = "text", encoding: str = "utf-8", unit: Unit = "file"
) -> Iterator[tuple[str, str]]:
    """Documents of one file in order, as `(where, text)`; nothing is kept in memory or in a cache.

    jsonl (`.jsonl`, `.ndjson`, `.json`: an object a line) and parquet hold a document in `field` of each row; in any
    other file, `unit` says what a document is. Files may be packed (gz, xz, zst, bz2). Line ends inside a document are
    kept.
    Raises DataError that names the file, and line, row or byte; UserError for a document that exceeds the limit
    `DOCUMENT_BYTES`, and for a file that unpacks to too much.
    """
    for where, text, _ in _rows(name, field, encoding, unit, ()):
        yield where, text


_Row = tuple[str, str, dict[str, Any]]


def _rows(
    name: str, field: str, encoding: str, unit: Unit, more: Sequence[str], refuse: Refuse = raised
) -> Iterator[_Row]:
    """As `documents`, with the values in other columns, `more`. refuse: called for a row that cannot be used. Raises
    DataError for a file that has no columns."""
    if more and is_plain(name):
        raise DataError(f"{name} is plain text and has no column {shown(more[0])}. Give jsonl or parquet, or a table.")
    try:
        if suffix_of(name) == ".parquet":
            yield from _parquet(name, field, more, refuse)
        elif suffix_of(name) in _JSONL:
            for number, line in enumerate(lines(name, characters(name, encoding)), start=1):
                if not line.strip():
                    continue
                try:
                    found = _fields_of_line(name, number, line, field, more)
                except DataError as error:
                    refuse(error)
                    continue
                yield f"{name}, line {number}", *found
        elif unit == "file":
            yield from ((name, text, {}) for text in whole(name, characters(name, encoding)))
        else:
            cut = paragraphs if unit == "paragraph" else lines
            for number, text in enumerate(cut(name, characters(name, encoding)), start=1):
                yield f"{name}, {unit} {number}", text, {}
    except DataError as error:
        if isinstance(error, Unreadable) or not _is_packed(name):
            raise
        for _ in unpacked(name):  # a damaged file is worse than a bad line: its checksum shows it
            pass
        raise


def _fields_of_line(name: str, number: int, line: str, field: str, more: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The text in a line of jsonl, and other values of the line."""
    if line.startswith("\ufeff"):
        raise DataError(
            f"Line {number} of {name} begins with a byte order mark (BOM), which is not JSON. Set encoding to "
            "utf-8-sig, or save the file without it."
        )
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"Line {number} of {name} is not JSON: {error.msg} at column {error.colno}. Each line must be one complete "
            "JSON object; correct or remove the line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; endlessly nested lists
        raise DataError(
            f"Line {number} of {name} cannot be read as JSON: {str(error)[:100]}. Correct or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"Line {number} of {name} is not a JSON object but {type(row).__name__}. Write {{{shown(field)}: ...}}."
        )
    if field not in row:
        raise DataError(
            f"Line {number} of {name} has no field {shown(field)}.{_known(field, list(row))} Set field, or correct the "
            f"line."
        )
    columns = as_written(more, row)
    for other in columns.values():
        if other not in row:
            raise DataError(
                f"Line {number} of {name} has no field {shown(other)}.{_known(other, list(row))} Name another column, "
                f"or correct the line."
            )
    if not isinstance(row[field], str):
        raise DataError(
            f"Field {shown(field)} in line {number} of {name} is not text but {type(row[field]).__name__}. "
            f"Correct or remove it."
        )
    text: str = row[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Field {shown(field)} in line {number} of {name} holds half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}) at character {error.start:,}, which is no text. Correct or "
            f"remove the line."
        ) from error
    return text, {other: row[written] for other, written in columns.items()}


def _known(field: str, names: Sequence[str]) -> str:
    short = [name[:40] for name in names]
    return f"{did_you_mean(field, short)} It has: {cut_list(map(repr, short), 8)}."


def _parquet(name: str, field: str, more: Sequence[str], refuse: Refuse) -> Iterator[_Row]:
    import pyarrow.parquet

    # pyarrow raises many types of errors for a damaged file
    with explained(name, Exception), opened(name) as (file, size):
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        columns = table.schema_arrow.names
        if field not in columns:
            raise DataError(f"{name} has no column {shown(field)}.{_known(field, columns)} Set field to one of them.")
        written = as_written(more, columns)
        for other in written.values():
            if other not in columns:
                raise DataError(f"{name} has no column {shown(other)}.{_known(other, columns)} Name one of them.")
        # not by columns: asking for one that a damaged index lacks crashes the process
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        check_unpacked(sum(sizes), size or sum(sizes), name)
        # a value may be as long as its group, and is repeated for each row that refers to it
        rows = max(_ROWS[0], min(_ROWS[1], _BATCH_BYTES // max([1, *sizes])))
        number = taken = 0
        for batch in table.iter_batches(batch_size=rows, columns=list(dict.fromkeys([field, *written.values()]))):
            found = {column: batch.column(column).to_pylist() for column in (field, *written.values())}
            for place, text in enumerate(found[field]):
                number += 1
                if not isinstance(text, str):
                    refuse(
                        DataError(
                            f"Row {number} of {name} holds {type(text).__name__} in {shown(field)}, not text. Remove "
                            f"the row, or set field to a column of text."
                        )
                    )
                    continue
                taken += len(text)
                DOCUMENT_BYTES.check(len(text), f"{name}, row {number}")
                check_unpacked(taken, size or taken, name)
                yield f"{name}, row {number}", text, {other: found[column][place] for other, column in written.items()}


def columns(path: str | Path) -> list[str]:
    """The columns of jsonl and parquet, of jsonl those of its first line; none of what is plain text, or cannot be
    read, which `read_text` tells."""
    if is_address(str(path)) or is_plain(str(path)):
        return []
    with contextlib.suppress(UserError, ValueError, RecursionError, OSError):
        if suffix_of(str(path)) == ".parquet":
            import pyarrow.parquet

            with opened(str(path)) as (file, _):
                return list(pyarrow.parquet.ParquetFile(file).schema_arrow.names)
        for line in lines(str(path), characters(str(path), "utf-8")):
            if line.strip():
                row = json.loads(line)
                return list(row) if isinstance(row, dict) else []
    return []


@with_columns(columns)
def read_text(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    encoding: str = "utf-8",
    fields: Sequence[str] = (),
    refuse: Refuse = raised,
) -> Iterator[Record]:
    """Records for `predict`: a plain text file is one record, with the file's name (and the folders that differ, see
    `mambaseq.data.files.relative_names`); each row of jsonl or parquet is one.

    fields: further columns of jsonl and parquet to return with each record. refuse: called for a file or row that
        cannot be used; the rest of a file that cannot be read to its end is left out.
    Raises DataError as `documents` does, and if the files are empty or have no such column.
    """
    files = text_files(str(path))
    for name, short in zip(files, _record_names(files, str(path)), strict=True):
        count = 0

        def refused(error: UserError) -> None:
            nonlocal count
            count += 1
            refuse(error)

        rows = _texts(name, short, field, encoding, fields, refused)
        while True:
            try:
                found = next(rows, None)
                if found is None:
                    break
                where, text, more = found
                count += 1
                record = Record(name=where, ids=tokenizer.encode(text), source=name, fields=more)
            except ConfigError:
                raise
            except UserError as error:
                ended = getattr(rows, "gi_frame", None) is None
                refuse(rest_left_out(error, name) if ended and count and refuse is not raised else error)
                count += 1
                continue
            yield record
        if not count:
            refuse(DataError(f"{name} holds no document. Put text into it, or name another file."))


def _record_names(files: Sequence[str], given: str) -> list[str]:
    if any(map(is_address, files)):
        return [Path(name).name for name in files]
    short = relative_names([Path(name) for name in files], given)
    return [(Path(stem).parent / Path(name).name).as_posix() for stem, name in zip(short, files, strict=True)]


def _texts(name: str, short: str, field: str, encoding: str, more: Sequence[str], refuse: Refuse) -> Iterator[_Row]:
    if more or not is_plain(name):
        yield from _rows(name, field, encoding, "file", more, refuse)
        return
    data = read_bytes(name, encoding)
    yield short, "".join(decoded(name, data, 0, len(data))), {}
