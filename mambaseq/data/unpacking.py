"""Files as they are or gzipped, read in pieces: no more in memory than a piece, and nothing lost in silence."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mambaseq.errors import DataError
from mambaseq.limits import UNPACKED_RATIO, UNRATED

PIECE = 1 << 22
_PACKED_PIECE = 1 << 18
_MAGIC = b"\x1f\x8b"

logger = logging.getLogger(__name__)


class Unreadable(DataError):
    """A file that cannot be read to its end.

    path: the file. what: what is wrong with it, to follow its name. remedy: a sentence.
    """

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        self.path, self.what, self.remedy = path, what, remedy
        super().__init__(f"{path} {what}. {remedy}.")

    def at(self, place: str) -> Unreadable:
        """The same, saying where in the file ("in record 'x'")."""
        return Unreadable(self.path, f"{self.what}, {place}", self.remedy)


def read_pieces(path: Path) -> Iterator[bytes]:
    """What a file holds, in order, in pieces of at most a few MiB; unpacked when it is gzip or bgzip by its content.

    A gzip file may have several members and zeros at its end, as for `gzip -t`. A bgzip file without the block that
    ends every such file is read with a warning when its text ends with a line's end, and is cut short otherwise.
    Everything that came before a fault is handed out before it is raised.
    Raises Unreadable for what is missing, cut short or damaged, UserError for what unpacks to more than
    `limits.UNPACKED_RATIO` allows.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_PACKED_PIECE)
            if head.startswith(_MAGIC):
                yield from _unpacked(path, file, head)
                return
            while head:
                yield head
                head = file.read(PIECE)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Check the path.") from error
    except OSError as error:
        remedy = "Check the file and its permissions"
        raise Unreadable(path, f"cannot be read: {error.strerror or error}", remedy) from error


def _unpacked(path: Path, file: BinaryIO, data: bytes) -> Iterator[bytes]:
    again = f"Copy or download it again (`gzip -t {path.name}` tests it)"
    size = max(path.stat().st_size, 1)
    consumed, total = len(data), 0
    pending: list[bytes] = []
    gathered = 0
    last = b""  # the last byte of the text
    needs_end = False  # the member before is a block of bgzip with something in it

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
                what = f"holds something else than gzip after its packed data, from byte {consumed - len(data):,} on"
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
            "is cut short: it is bgzip without the block that ends such files, and its text stops within a line",
            "Copy or download it again; if it is whole, pack it anew: gzip -dc FILE | bgzip",
        )
    if needs_end:
        logger.warning(
            "%s is bgzip without the block that ends such files. All that it holds is read; if it was cut between two "
            "blocks, the rest is missing: compare its size with the original.",
            path,
        )
