"""Text files in: whole files byte by byte, documents through `datasets`."""

from __future__ import annotations

import glob
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np

from mambaseq.data.cache import fingerprint, locate
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import DataError, did_you_mean

Unit = Literal["file", "paragraph", "line"]
CHUNK = 2**20

_PACKED = (".gz", ".xz", ".zst", ".bz2")
_JSONL = (".jsonl", ".ndjson", ".json")
_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # pyarrow's errors are among these


def text_files(names: str | Sequence[str]) -> list[str]:
    """The files that names stand for, in their order, each once: paths, patterns and resources (see
    `mambaseq.data.cache.locate`); an address with `://` stays as it is. Raises DataError when there is
    none, and for a folder."""
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if Path(name).is_dir():
            pattern = Path(name) / "*.txt"
            raise DataError(f"{name!r} is a folder. Name the files in it, with a pattern: {str(pattern)!r}.")
        found += [name] if "://" in name else [str(path) for path in locate(name)]
    return list(dict.fromkeys(found))


def source(name: str) -> dict[str, Any]:
    """What tells whether a file has changed; of an address nothing but itself is known."""
    return {"name": name} if "://" in name else fingerprint(Path(name))


def is_plain(name: str) -> bool:
    """Whether a file is plain text, by its name: neither jsonl nor parquet."""
    return _suffix(name) not in (*_JSONL, ".parquet")


def _suffix(name: str) -> str:
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else path.suffix.lower()


def read_bytes(name: str, encoding: str = "utf-8") -> np.ndarray:
    """A plain text file as UTF-8 bytes, `(size,)` uint8; mapped, not read, where it is UTF-8 already.

    Raises DataError when it is empty, cannot be read or decoded. UTF-8 itself is checked by `decoded`.
    """
    try:
        if "://" in name or Path(name).suffix.lower() in _PACKED:
            with fsspec.open(name, "rb", compression="infer") as file:
                data = np.frombuffer(file.read(), dtype=np.uint8)
        else:
            data = np.memmap(name, dtype=np.uint8, mode="r") if Path(name).stat().st_size else np.zeros(0, np.uint8)
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    if not data.size:
        raise DataError(f"{name} is empty. Put text into it, or leave it out.")
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        return data
    try:
        return np.frombuffer(data.tobytes().decode(encoding).encode("utf-8"), dtype=np.uint8)
    except UnicodeDecodeError as error:
        raise _not_encoded(name, error.start, encoding, int(data[error.start])) from error
    except LookupError as error:
        raise DataError(
            f"There is no text encoding {encoding!r}. Set encoding to utf-8, latin-1, cp1252, ..."
        ) from error


def character_start(data: np.ndarray, position: int) -> int:
    """The nearest place at or before `position` where a UTF-8 character begins."""
    while 0 < position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position


def decoded(name: str, data: np.ndarray, start: int, stop: int) -> Iterator[str]:
    """Text of the bytes `[start, stop)` of a file in pieces of at most 1 MiB, cut after a line's end where
    there is one.

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
            raise _not_encoded(name, at, "utf-8", int(data[at])) from error
        start = end


def _not_encoded(name: str, offset: int, encoding: str, value: int) -> DataError:
    return DataError(
        f"{name} is not {encoding.upper()} text: byte 0x{value:02x} at offset {offset:,} does not belong "
        f"there. Set encoding to what the file is written in (latin-1, cp1252, utf-16, ...), or convert it, "
        f"for example with iconv."
    )


def _unreadable(name: str, error: BaseException) -> DataError:
    if "://" in name:
        return DataError(
            f"{name} cannot be read: {error}. Check the address and the network, or fetch the file and give its path."
        )
    return DataError(
        f"{name} cannot be read: {error}. It is damaged, cut short or not what its name says; copy it again."
    )


def documents(
    name: str, *, field: str = "text", encoding: str = "utf-8", unit: Unit = "file"
) -> Iterator[tuple[str, str]]:
    """Documents of one file, one after the other, as `(where, text)`; nothing is kept in memory or in a
    cache.

    jsonl (`.jsonl`, `.ndjson`, `.json`: an object a line) and parquet hold a document in `field` of each row;
    of any other file, `unit` says what a document is. Files may be packed (gz, xz, zst, bz2).
    Raises DataError that names the file, and line, row or byte.
    """
    if _suffix(name) == ".parquet":
        yield from _parquet(name, field)
    elif _suffix(name) in _JSONL:
        # Lines are parsed here: Arrow's reader of JSON takes a text that looks like a date for one.
        for number, row in enumerate(_rows(name, "text", encoding=encoding, sample_by="line"), start=1):
            if row["text"].strip():
                yield f"{name}, line {number}", _field_of_line(name, number, row["text"], field)
    else:
        options = {"sample_by": _SAMPLE_BY[unit], "keep_linebreaks": True}
        for number, row in enumerate(_rows(name, "text", encoding=encoding, **options), start=1):
            if row["text"]:
                yield (name if unit == "file" else f"{name}, {unit} {number}"), row["text"]


def _field_of_line(name: str, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"Line {number} of {name} is not JSON: {error.msg} at column {error.colno}. Each line must be "
            f"one whole JSON object; correct or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"Line {number} of {name} is not a JSON object but {type(row).__name__}. Write {{{field!r}: ...}}."
        )
    if field not in row:
        raise DataError(
            f"Line {number} of {name} has no field {field!r}.{did_you_mean(field, row)} It has: "
            f"{', '.join(map(repr, row)) or 'none'}. Set field, or correct the line."
        )
    if not isinstance(row[field], str):
        raise DataError(
            f"Field {field!r} in line {number} of {name} is not text but {type(row[field]).__name__}. "
            f"Correct or remove it."
        )
    text: str = row[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Field {field!r} in line {number} of {name} holds half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}) at character {error.start:,}, which is no text. Correct or "
            f"remove the line."
        ) from error
    return text


def _parquet(name: str, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    try:
        with fsspec.open(name, "rb") as file:
            columns = pyarrow.parquet.read_schema(file).names
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    if field not in columns:
        raise DataError(
            f"{name} has no column {field!r}.{did_you_mean(field, columns)} It has: "
            f"{', '.join(map(repr, columns))}. Set field to one of them."
        )
    for number, row in enumerate(_rows(name, "parquet", columns=[field]), start=1):
        if not isinstance(row[field], str):
            raise DataError(
                f"Row {number} of {name} holds {type(row[field]).__name__} in {field!r}, not text. Remove "
                f"the row, or set field to a column of text."
            )
        yield f"{name}, row {number}", row[field]


def _rows(name: str, builder: str, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets

    pattern = name if "://" in name else glob.escape(str(Path(name).absolute()))
    try:
        rows = datasets.load_dataset(builder, data_files=[pattern], split="train", streaming=True, **options)
        # `iter` by batches, because plain iteration hands every loader worker a share of its own choosing
        for batch in rows.iter(batch_size=256):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except UnicodeDecodeError as error:
        offset, value = _invalid_byte(name, options["encoding"])
        raise _not_encoded(name, offset, options["encoding"], value) from error
    except LookupError as error:
        raise DataError(f"{name} cannot be read: {error}. Check encoding.") from error
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


def _invalid_byte(name: str, encoding: str) -> tuple[int, int]:
    """Where a file, unpacked, cannot be decoded: offset and value of the byte."""
    with fsspec.open(name, "rb", compression="infer") as file:
        data: bytes = file.read()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start, data[error.start]
    return 0, data[0]


def read_text(
    path: str | Path, tokenizer: Tokenizer, *, field: str = "text", encoding: str = "utf-8"
) -> Iterator[Record]:
    """Records for `predict`: a plain text file is one, a row of jsonl or parquet is one.

    Raises DataError as `documents` does, and when there is nothing in the files.
    """
    for name in text_files(str(path)):
        count = 0
        for where, text in _texts(name, field, encoding):
            count += 1
            yield Record(name=where, ids=tokenizer.encode(text), source=name)
        if not count:
            raise DataError(f"{name} holds no document. Put text into it, or name another file.")


def _texts(name: str, field: str, encoding: str) -> Iterable[tuple[str, str]]:
    if not is_plain(name):
        return documents(name, field=field, encoding=encoding)
    data = read_bytes(name, encoding)
    return [(Path(name).name, "".join(decoded(name, data, 0, len(data))))]
