"""Splits texts in pieces into lines and paragraphs, for any line ends; lines are not changed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mambaseq.limits import DOCUMENT_BYTES

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_END = re.compile(r"(?:\r\n|\r|\n)\Z")


def lines(name: str, pieces: Iterator[str]) -> Iterator[str]:
    """Lines with their ends: `\\n`, `\\r\\n` or `\\r`; the last may have none.

    name: of the file, for messages. Raises UserError for a line that exceeds the limit `DOCUMENT_BYTES`.
    """
    held: list[str] = []
    size = number = 0
    for piece in _whole_ends(pieces):
        for part in _LINE.findall(piece):
            held.append(part)
            size += len(part)
            if part[-1] in "\r\n":
                number += 1
                yield part if len(held) == 1 else "".join(held)
                held, size = [], 0
        DOCUMENT_BYTES.check(size, f"{name}, line {number + 1:,}")
    if held:
        yield "".join(held)


def byte_lines(name: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """As `lines`, of bytes that are not decoded yet: a character that does not belong there ends with its line."""
    held: list[bytes] = []
    size = number = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if b"\n" in piece or b"\r" in piece:
            found = b"".join(held).splitlines(keepends=True)
            # the last one may go on, and so may a line end
            held = [] if found[-1].endswith(b"\n") else [found.pop()]
            size = sum(map(len, held))
            for line in found:
                number += 1
                yield line
        DOCUMENT_BYTES.check(size, f"{name}, line {number + 1:,}")
    yield from b"".join(held).splitlines(keepends=True)


def paragraphs(name: str, pieces: Iterator[str]) -> Iterator[str]:
    """Paragraphs between blank lines, without the two line ends before the next; the last keeps its end.

    Raises UserError for a paragraph over the limit `DOCUMENT_BYTES`.
    """
    held: list[str] = []
    size = number = 0
    for line in lines(name, pieces):
        if held and line in ("\n", "\r\n", "\r"):
            number += 1
            held[-1] = _END.sub("", held[-1])
            if text := "".join(held):
                yield text
            held, size = [], 0
        else:
            held.append(line)
            size += len(line)
            DOCUMENT_BYTES.check(size, f"{name}, paragraph {number + 1:,}")
    if held:
        yield "".join(held)


def whole(name: str, pieces: Iterator[str]) -> Iterator[str]:
    """The whole text as one, unless it is empty. Raises UserError if it exceeds the limit `DOCUMENT_BYTES`."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        DOCUMENT_BYTES.check(size, name)
    if held:
        yield "".join(held)


def _whole_ends(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces, cut such that no `\\r\\n` is cut."""
    held = ""
    for piece in pieces:
        piece, held = held + piece, ""
        if piece.endswith("\r"):
            piece, held = piece[:-1], "\r"
        yield piece
    if held:
        yield held
