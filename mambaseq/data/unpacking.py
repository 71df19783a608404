"""Reads plain or packed files in pieces: only a piece is in memory, and nothing is lost silently."""

from __future__ import annotations

import bz2
import io
import logging
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mambaseq.errors import DataError
from mambaseq.limits import UNPACKED_RATIO, UNRATED, check_unpacked

PIECE = 1 << 20  # what a processor's cache holds, so that parsing runs from there
_PACKED_PIECE = 1 << 18
_MAGIC = b"\x1f\x8b"
_OTHERS = {
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or a skippable one
}
XZ_MEMORY = 256 * 2**20  # `xz -9` needs a quarter of it; a header may ask for 4 GiB

logger = logging.getLogger(__name__)


class Unreadable(DataError):
    """A file that cannot be read to its end.

    path: the file. what: what is wrong with it, put after its name. remedy: a sentence.
    """

    def __init__(self, path: Path | str, what: str, remedy: str) -> None:
        self.path, self.what, self.remedy = path, what, remedy
        super().__init__(f"{path} {what}. {remedy}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what, self.remedy)

    def at(self, place: str) -> Unreadable:
        """The same error with the place in the file ("in record 'x'")."""
        return Unreadable(self.path, f"{self.what}, {place}", self.remedy)


def read_pieces(path: Path) -> Iterator[bytes]:
    """The contents of a file, in order, in pieces of at most a few MiB; unpacked if the contents are gzip, bgzip, xz,
    bzip2 or zstandard.

    A gzip file may have several members and zeros at its end, as for `gzip -t`. A bgzip file without its end block is
    read with a warning if its text ends with a complete line; otherwise it counts as cut short. Everything before a
    fault of a gzip file is returned before the error is raised.
    Raises Unreadable for a file that is missing, cut short or damaged, UserError for one that unpacks to more than
    `limits.UNPACKED_RATIO` allows.
    """
    try:
        with path.open("rb") as file:
            yield from pieces_of(file, path, path.stat().st_size)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Check the path.") from error
    except OSError as error:
        remedy = "Check the file and its permissions"
        raise Unreadable(path, f"cannot be read: {error.strerror or error}", remedy) from error


def pieces_of(file: BinaryIO, name: Path | str, size: int) -> Iterator[bytes]:
    """The same for an open file. name: for messages. size: of the file, in bytes; 0 if unknown."""
    head = file.read(_PACKED_PIECE)
    if head.startswith(_MAGIC):
        yield from _unpacked(name, file, head, size)
        return
    for kind, magic in _OTHERS.items():
        if magic.match(head):
            yield from _unpacked_otherwise(kind, name, file, head, size)
            return
    while head:
        yield head
        head = file.read(PIECE)


def packed_by(head: bytes) -> bool:
    """Whether a file with this beginning (at least 18 bytes) is packed in a way that `read_pieces` unpacks."""
    return head.startswith(_MAGIC) or any(magic.match(head) for magic in _OTHERS.values())


class _Rejoined(io.RawIOBase):
    """A file whose beginning has already been read. consumed: bytes that were asked for."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file, self.consumed = head, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        self.consumed += len(data)
        return len(data)


def _unpacked_otherwise(kind: str, name: Path | str, file: BinaryIO, head: bytes, size: int) -> Iterator[bytes]:
    import pyarrow

    joined = _Rejoined(head, file)
    total = 0
    try:
        if kind == "zst":
            with pyarrow.CompressedInputStream(io.BufferedReader(joined), "zstd") as stream:
                pieces = iter(lambda: stream.read(PIECE), b"")
                for piece in pieces:
                    total += len(piece)
                    check_unpacked(total, max(size, joined.consumed), str(name))
                    yield piece
        else:
            for piece in _decompressed(kind, joined):
                total += len(piece)
                check_unpacked(total, max(size, joined.consumed), str(name))
                yield piece
    except EOFError as error:
        again = "Copy or download it again"
        raise Unreadable(name, "is cut short: the packed data end too early", again) from error
    except (OSError, ValueError, MemoryError, lzma.LZMAError, pyarrow.ArrowException) as error:
        cut = "runcated" in str(error)
        what = "is cut short" if cut else "is damaged"
        again = "Copy or download it again"
        raise Unreadable(name, f"{what}: it cannot be unpacked ({str(error).rstrip('.')})", again) from error


def _decompressed(kind: str, file: io.RawIOBase, most: int = PIECE) -> Iterator[bytes]:
    """Streams end to end, without zeros between and after them, as `xz` and `bzip2` write and read them."""
    data = b""
    while True:
        while not (data := data.lstrip(b"\0")):
            if not (data := file.read(_PACKED_PIECE) or b""):
                return
        stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY) if kind == "xz" else bz2.BZ2Decompressor()
        while not stream.eof:
            if stream.needs_input and not data and not (data := file.read(_PACKED_PIECE) or b""):
                raise EOFError("the packed data end too early")
            if piece := _decompress(stream, data, most):
                yield piece
            data = b""
        data = stream.unused_data


def _decompress(stream: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes, most: int) -> bytes:
    try:
        return stream.decompress(data, most)
    except lzma.LZMAError as error:
        if "limit" not in str(error):
            raise
        raise lzma.LZMAError(
            f"its header asks for more than {XZ_MEMORY // 2**20} MiB of memory, more than xz -9 needs"
        ) from error


class XzFile(io.BufferedReader):
    """An xz file read in order, as `lzma.open` would, with at most `XZ_MEMORY`, whatever its header asks for. Reading
    raises lzma.LZMAError for a file that needs more or is damaged, EOFError for one that is cut short."""

    def __init__(self, path: Path, mode: str = "rb") -> None:
        self._file = path.open("rb", buffering=0)
        super().__init__(_Gathered(_decompressed("xz", self._file, _PACKED_PIECE)))

    def close(self) -> None:
        super().close()
        self._file.close()


class _Gathered(io.RawIOBase):
    """A stream of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        data = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _unpacked(path: Path | str, file: BinaryIO, data: bytes, size: int) -> Iterator[bytes]:
    again = f"Copy or download it again (`gzip -t {Path(path).name}` tests it)"
    consumed, total = len(data), 0
    pending: list[bytes] = []
    gathered = 0
    last = b""  # the last byte of the text
    needs_end = False  # the member before is a bgzip block with contents

    def more() -> bytes:
        nonlocal consumed
        found = file.read(_PACKED_PIECE)
        consumed += len(found)
        return found

    try:
        while True:
            data = data.lstrip(b"\0") or more()
            if not data:
                break
            if data[:1] == b"\0":
                continue
            if len(data) < 18:  # a header of bgzip
                data += more()
            if not data.startswith(_MAGIC) and data != _MAGIC[:1]:
                what = f"has data that are not gzip after its packed data, from byte {consumed - len(data):,} on"
                raise Unreadable(path, what, "Remove that, or copy or download the file again")
            blocked = len(data) > 13 and bool(data[3] & 4) and data[12:14] == b"BC"
            member = zlib.decompressobj(wbits=31)
            length = 0
            while not member.eof:
                if not data and not (data := more()):
                    raise Unreadable(path, "is cut short: the packed data end too early", again)
                piece = member.decompress(data, PIECE)
                data = member.unconsumed_tail
                if piece:
                    length += len(piece)
                    total += len(piece)
                    if total > UNRATED:
                        UNPACKED_RATIO.check(total / max(size, consumed), str(path))
                    pending.append(piece)
                    gathered += len(piece)
                    last = piece[-1:]
                    if gathered >= PIECE // 4:
                        yield b"".join(pending)
                        pending, gathered = [], 0
            data = member.unused_data
            needs_end = blocked and length > 0
    except (zlib.error, Unreadable) as error:
        if pending:
            yield b"".join(pending)
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(path, f"is damaged: it cannot be unpacked ({error})", again) from error
    if pending:
        yield b"".join(pending)
    if needs_end and last not in b"\r\n":
        raise Unreadable(
            path,
            "is cut short: it is bgzip without an end block, and its text stops within a line",
            "Copy or download it again; if it is complete, pack it again: gzip -dc FILE | bgzip",
        )
    if needs_end:
        logger.warning(
            "%s is bgzip without an end block. All of it is read, but if it was cut between two blocks, the rest is "
            "missing: compare its size with the original.",
            path,
        )
