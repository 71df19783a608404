"""Opens text files and addresses: unpacks bytes and decodes characters, in pieces."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from mambaseq.data.addresses import expanded, is_address, redacted
from mambaseq.data.cache import fingerprint
from mambaseq.data.unpacking import Unreadable, pieces_of, read_pieces
from mambaseq.errors import DataError, UserError, shown
from mambaseq_text.hub import pinned

CHUNK = 2**20
# Where a user says what a file's encoding is; other commands read files as the data of the run.
_WHERE = "data.encoding of training data, --encoding of text/perplexity"
PACKED = (".gz", ".xz", ".zst", ".bz2")

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# file systems' keys that identify the contents of an address, the best first
_VERSIONS = ("ETag", "etag", "sha256", "blob_id", "md5", "checksum", "mtime", "LastModified", "last_modified")


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, without that of its packing: `.jsonl` of
    `https://host/a.jsonl.gz?x`."""
    path = Path(urlsplit(name.split("::")[0]).path if is_address(name) else name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def source(name: str, *, hashed: bool = True) -> dict[str, Any]:
    """The identity of a file: see `mambaseq.data.cache.fingerprint`. For an address, its name and the server's
    identifier of the contents (such as an ETag), if any.

    hashed: False identifies a file by size and time of change, without reading all of it.
    """
    if is_address(name):
        version = _version(name)
        return {"name": name} if version is None else {"name": name, "version": version}
    if hashed:
        return fingerprint(Path(name))
    status = Path(name).stat()
    return {"name": Path(name).name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def checksum(found: dict[str, Any]) -> str:
    """The part of a `source` that identifies the contents; empty if nothing is known."""
    if "sha256" in found:
        return str(found["sha256"])
    if "mtime_ns" in found:
        return f"{found['size']} bytes, changed at {found['mtime_ns']} ns"
    return str(found.get("version", ""))


def _version(address: str) -> str | None:
    if (revision := pinned(address)) is not None:
        return revision
    import fsspec

    try:
        system, path = fsspec.url_to_fs(expanded(address))
        info = system.info(path)
    except UserError:
        raise
    except Exception:  # file systems may raise anything; reading will report it
        return None
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), None)


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[BinaryIO, int]]:
    """An address or a file, opened without unpacking, and its size; 0 if unknown."""
    if not is_address(name):
        with Path(name).open("rb") as local:
            yield local, Path(name).stat().st_size
        return
    import fsspec

    with fsspec.open(expanded(name), "rb") as remote:
        yield remote, int(getattr(remote, "size", 0) or 0)


@contextlib.contextmanager
def explained(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors about a file, or any error about an address, into DataError.

    kinds: further error types for a file, besides OSError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = redacted(" ".join(str(error).split()), name)[:300].rstrip(".") or type(error).__name__
        if is_address(name):
            raise DataError(
                f"{redacted(name)} cannot be read: {reason}. Check the address and the network, or download the file "
                "and give its path."
            ) from None  # the causing error contains the full address
        if not isinstance(error, (OSError, *kinds)):
            raise
        raise DataError(
            f"{name} cannot be read: {reason}. It is damaged, cut short, or of another type than its name says; copy "
            "it again."
        ) from error


def unpacked(name: str) -> Iterator[bytes]:
    """The bytes of a file or an address in pieces, unpacked if they are packed (see `read_pieces`).

    Raises DataError for a file that is missing, cut short or damaged, with the line; UserError for one that unpacks to
    too much.
    """
    line = 1
    try:
        if is_address(name):
            with explained(name), opened(name) as (file, size):
                for piece in pieces_of(file, redacted(name), size):
                    yield piece
                    line += piece.count(b"\n")
        else:
            for piece in read_pieces(Path(name)):
                yield piece
                line += piece.count(b"\n")
    except Unreadable as error:
        raise error.at(f"in line {line:,} or after it") from error


def _remedy(encoding: str = "") -> str:
    """encoding: that of the file, if it is known."""
    known = encoding or "latin-1, cp1252, utf-16, ..."
    return f"Convert it to UTF-8, for example with iconv, or name its encoding ({known}): {_WHERE}."


def check_encoding(name: str, encoding: str) -> None:
    """Raise DataError if there is no such text encoding."""
    try:
        bytes(4).decode(encoding, "replace")
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{name} cannot be read: there is no text encoding {shown(encoding)}. Give one such as utf-8, latin-1 "
            f"or cp1252 ({_WHERE})."
        ) from error


def characters(name: str, encoding: str) -> Iterator[str]:
    """The text of a file in pieces; line ends, tabs and a byte order mark are kept.

    Raises DataError as `unpacked` does, and one that names the byte if the text is not in this encoding.
    """
    check_encoding(name, encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    done, head = 0, b""
    for chunk in _small(unpacked(name)):
        head = head or chunk[:18]
        yield from _decode(name, encoding, decoder, chunk, done, head)
        done += len(chunk)
    yield from _decode(name, encoding, decoder, b"", done, head, final=True)


def _small(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


def _decode(
    name: str, encoding: str, decoder: Any, chunk: bytes, done: int, head: bytes, final: bool = False
) -> Iterator[str]:
    held = len(decoder.getstate()[0])
    try:
        text = decoder.decode(chunk, final)
        if not is_utf8(encoding):
            text.encode("utf-8")  # some encodings have incomplete characters
    except UnicodeDecodeError as error:
        # the decoder may have removed a byte order mark first
        at = held + len(chunk) - len(error.object) + error.start
        raise not_encoded(name, done - held + at, encoding, error.object[error.start], head) from error
    except UnicodeError as error:
        raise DataError(f"{name} is not {encoding.upper()} text: {error}. {_remedy()}") from error
    if text:
        yield text


def is_utf8(encoding: str) -> bool:
    """Whether this is a name of UTF-8 without a byte order mark."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8")


def not_encoded(name: str, offset: int, encoding: str, value: int, head: bytes) -> DataError:
    """The remedy for a byte that does not belong. head: the beginning of the file."""
    marked = next((other for mark, other in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None and marked != "utf-8-sig":
        remedy = f"It begins like {marked.upper()}. {_remedy(marked)}"
    elif b"\0" in head:
        remedy = "It does not seem to be text. Name another file, or leave it out."
    else:
        remedy = _remedy()
    return DataError(
        f"{name} is not {encoding.upper()} text: byte 0x{value:02x} at offset {offset:,} does not belong there. "
        f"{remedy}"
    )
