"""Finds text files, and reads plain ones byte by byte; and the reader of `predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mambaseq.data.addresses import check_address, is_address
from mambaseq.data.cache import locate
from mambaseq.data.files import relative_names
from mambaseq.data.records import Record, Refuse, raised, rest_left_out, with_columns
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq_text.hub import hub_files, is_hub
from mambaseq_text.opening import CHUNK, characters, check_encoding, explained, is_utf8, not_encoded, unpacked
from mambaseq_text.rows import Row, columns, is_packed, is_plain, rows


def text_files(names: str | Sequence[str], key: str = "files") -> list[str]:
    """The files that names stand for, in order, each once: paths, patterns and resources (see
    `mambaseq.data.cache.locate`) and data sets of the Hub (see `hub_files`); an address with `://` stays as it is. key:
    the setting with the names.

    Raises DataError if there is none, and for a folder; ConfigError for an address that contains a secret.
    """
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if is_address(name):
            check_address(name, key)
            found.append(name)
        elif is_hub(name):
            found += hub_files(name, key)
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


def read_bytes(name: str, encoding: str = "utf-8") -> np.ndarray:
    """A plain text file as UTF-8 bytes, `(size,)` uint8; memory-mapped if it is UTF-8 and not packed.

    Raises DataError if it is empty or cannot be read or decoded, UserError if it unpacks to too much. `decoded` checks
    UTF-8 itself.
    """
    check_encoding(name, encoding)
    data = np.zeros(0, np.uint8)
    if is_utf8(encoding) and not is_packed(name) and not is_address(name):
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

        found_rows = _texts(name, short, field, encoding, fields, refused)
        while True:
            try:
                found = next(found_rows, None)
                if found is None:
                    break
                where, text, more = found
                count += 1
                record = Record(name=where, ids=_encoded(tokenizer, text, where), source=name, fields=more)
            except ConfigError:
                raise
            except UserError as error:
                ended = getattr(found_rows, "gi_frame", None) is None
                refuse(rest_left_out(error, name) if ended and count and refuse is not raised else error)
                count += 1
                continue
            yield record
        if not count:
            refuse(DataError(f"{name} holds no document. Put text into it, or name another file."))


def _encoded(tokenizer: Tokenizer, text: str, where: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except ConfigError:
        raise
    except UserError as error:
        raise DataError(f"{where}: {error}").about(where) from error


def _record_names(files: Sequence[str], given: str) -> list[str]:
    if any(map(is_address, files)):
        return [Path(name).name for name in files]
    short = relative_names([Path(name) for name in files], given)
    return [(Path(stem).parent / Path(name).name).as_posix() for stem, name in zip(short, files, strict=True)]


def _texts(name: str, short: str, field: str, encoding: str, more: Sequence[str], refuse: Refuse) -> Iterator[Row]:
    if more or not is_plain(name):
        yield from rows(name, field, encoding, "file", more, refuse)
        return
    data = read_bytes(name, encoding)
    yield short, "".join(decoded(name, data, 0, len(data))), {}
