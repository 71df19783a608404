"""Parses FASTA in pieces: bases become ids while the file is read, for any length and number of records."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mambaseq.data.records import Refuse, raised
from mambaseq.data.unpacking import Unreadable, read_pieces
from mambaseq.errors import DataError, shown
from mambaseq_dna.tokenizer import InvalidBase

_LONGEST_HEADER = 1 << 20
_LINE_END, _HEADER = ord("\n"), ord(">")
_BETWEEN_BASES = b" \t\n\v\f"
_BLANK_LINES = re.compile(rb"(?:[ \t\v\f]*\n)*")
_COMMENT = re.compile(rb"^;.*", re.MULTILINE)
_INVALID = b"\xff"  # see mambaseq_dna.tokenizer
_BOM = b"\xef\xbb\xbf"
_PROTEIN_ONLY = set(b"EFILPQXZJO*")
_LOOKS_LIKE = {
    b"@": "it looks like FASTQ; convert it (seqtk seq -A)",
    b"PK\x03\x04": "it is a zip archive; unpack it (unzip)",
    b"\x43\x27\x41\x1a": "it is 2bit; unpack it if it is packed, or convert it (twoBitToFa)",
    b"\x1a\x41\x27\x43": "it is 2bit; unpack it if it is packed, or convert it (twoBitToFa)",
    b"LOCUS": "it looks like GenBank; convert it to FASTA",
    b"ID ": "it looks like EMBL; convert it to FASTA",
    b"##gff": "it looks like GFF, which holds positions, not bases",
    b"\xff\xfe": "it looks like UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "it looks like UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
}

Piece = tuple[str | None, str, bytes]


def fasta_pieces(path: Path, table: bytes, refuse: Refuse = raised) -> Iterator[Piece]:
    """(name, description, ids) in file order; for a long record, (None, "", more of its ids) follow.

    table: the id of each of the 256 bytes; 255 for those that are not a base. Lines may end in any way; blank lines,
        spaces and tabs between bases, lines that begin with `;` (comments) and a UTF-8 byte order mark are passed over.
        Names and descriptions are UTF-8.
    refuse: called for a record that cannot be used. If it returns, the record is to be left out, as `usable` says.
    Raises DataError that names file and record: for a missing or empty file, a cut or damaged gzip, no header, a header
    without a name or in another encoding than UTF-8, a name that occurs twice, a record without sequence, a letter that
    is not a base.
    """
    parser = _Parser(path, table, refuse)
    tail, mid = b"", False  # the beginning of a line, and whether it is a line of bases returned so far
    try:
        for piece in _text_pieces(path):
            parser.untouched = False
            data = tail + piece
            cut = data.rfind(b"\n") + 1
            last = data[cut : cut + 1]  # of what begins a line: a header and a comment are read whole
            if (last in b">;" or not parser.number) and (cut or not mid):
                tail = data[cut:]
                if not cut:
                    parser.check_line(tail)
                    continue
                yield from parser.lines(data[:cut], mid)
                mid = False
            else:
                yield from parser.lines(data, mid)
                tail, mid = b"", True
    except Unreadable as error:
        raise error.at(parser.place) from error
    if tail:
        yield from parser.lines(tail, mid)
    parser.finish()


def usable(pieces: list[bytes]) -> bool:
    """Whether the pieces of a record are whole: none of them was refused."""
    return any(pieces) and _INVALID not in pieces


def _text_pieces(path: Path) -> Iterator[bytes]:
    """The file's contents in pieces, with a line feed at every line's end and without a byte order mark."""
    first, returned = True, False  # whether a piece ended in the first half of \r\n
    for piece in read_pieces(path):
        if first:
            piece, first = piece.removeprefix(_BOM), False
        if returned:
            piece = piece.removeprefix(b"\n")
        returned = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield piece


class _HeaderLines:
    """The lines of the headers, for messages. To count them costs a sixth of reading, so it is done where one is asked
    for, in a reading of its own, which goes no further than that header."""

    def __init__(self, path: Path) -> None:
        self._path, self._found, self._more = path, array("q"), self._read(path)

    def of(self, number: int) -> int:
        """The line of the header of record `number`; both are counted from 1. Raises DataError if it is gone."""
        while len(self._found) < number:
            if (more := next(self._more, None)) is None:
                raise DataError(
                    f"{self._path} was changed while it was read. Let nothing write to it, and read it again."
                )
            self._found.extend(more)
        return self._found[number - 1]

    @staticmethod
    def _read(path: Path) -> Iterator[list[int]]:
        line, before = 0, b"\n"  # ends of lines that were passed, and the last byte that was
        for piece in _text_pieces(path):
            data = np.frombuffer(before + piece, dtype=np.uint8)
            (ends,) = (data[:-1] == _LINE_END).nonzero()
            yield (line + 1 + (data[ends + 1] == _HEADER).nonzero()[0]).tolist()
            line, before = line + len(ends), data[-1:].tobytes()


class _Parser:
    """The parser's state. place: the current place, for messages."""

    def __init__(self, path: Path, table: bytes, refuse: Refuse) -> None:
        self.path, self.table, self.refuse = path, table, refuse
        self.name, self.number, self.length = "", 0, 0
        self.lines_of_headers = _HeaderLines(path)
        self.refused = False  # the record
        self.seen: set[str] = set()
        self.untouched, self.comments = True, False

    @property
    def place(self) -> str:
        return f"in or after record {self.named} (number {self.number:,})" if self.number else "before any record"

    @property
    def header(self) -> str:
        """The file and the line of the record's header."""
        return f"{self.path}, line {self.lines_of_headers.of(self.number):,}"

    @property
    def named(self) -> str:
        """The record's name for a message."""
        return shown(self.name)

    def lines(self, data: bytes, mid: bool) -> Iterator[Piece]:
        """The contents of complete lines; with `mid`, the first is the rest of a line of bases."""
        if b";" in data and (b"\n;" in data or data.startswith(b";")):  # searching for one byte is ten times faster
            first = (data.find(b"\n") + 1 or len(data)) if mid else 0
            left = _COMMENT.sub(b"", data[first:])
            self.comments |= len(left) < len(data) - first
            data = data[:first] + left
        if not self.number:
            data = data[_BLANK_LINES.match(data).end() :]  # type: ignore[union-attr]
            if not data.strip():
                return
            if not data.startswith(b">"):
                raise self._no_header(data)
        more, *records = data.split(b"\n>") if b">" in data else [data]
        if not mid and more.startswith(b">"):
            records.insert(0, more[1:])
        elif more:
            ids = self._ids(more)
            self.length += len(ids)
            yield None, "", ids
        for record in records:
            header, _, letters = record.partition(b"\n")
            name, description = self._begin(header)
            ids = self._ids(letters)
            self.length = len(ids)
            yield name, description, ids

    def _ids(self, letters: bytes) -> bytes:
        """The bases among letters; `_INVALID` in a record that is refused."""
        if self.refused:
            return _INVALID
        ids = letters.translate(self.table, _BETWEEN_BASES)
        if _INVALID in ids:
            self._refuse(self._no_base(letters))
            return _INVALID
        return ids

    def _refuse(self, error: DataError) -> None:
        self.refuse(error)
        self.refused = True

    def _begin(self, header: bytes) -> tuple[str, str]:
        if self.number and not self.length:
            self._refuse(self._without_sequence())
        self.number += 1
        self.length, self.refused = 0, False
        words = header.split(None, 1)
        if not words:
            self._refuse(DataError(f"{self.header}: record {self.number:,} has no name. Write one after its '>'."))
            self.name = ""
            return "", ""
        try:
            self.name = words[0].decode()
            description = words[1].decode().rstrip() if len(words) > 1 else ""
        except UnicodeDecodeError as error:
            raw = error.object
            raise DataError(
                f"{self.header}: the header of record {self.number:,} is not UTF-8: byte "
                f"0x{raw[error.start]:02x} in {shown(raw.decode(errors='replace'))}. Convert the file "
                "(iconv -f ISO-8859-1 -t UTF-8, if that is its encoding)."
            ) from error
        if self.name in self.seen:
            self._refuse(
                DataError(
                    f"{self.header}: two records are named {self.named} (the second is record "
                    f"{self.number:,}). The name is the header's first word; make it unique."
                )
            )
        self.seen.add(self.name)
        return self.name, description

    def _no_base(self, letters: bytes) -> DataError:
        position = letters.translate(self.table, _BETWEEN_BASES).index(_INVALID)
        letters = letters.translate(None, _BETWEEN_BASES)
        for size in range(1, 5):
            try:
                letter = letters[position : position + size].decode()
                break
            except UnicodeDecodeError:
                letter = f"\\x{letters[position]:02x}"
        protein = len(_PROTEIN_ONLY.intersection(letters[:100_000].upper())) > 1
        return DataError(
            f"{self.path}, record {self.named}: {InvalidBase(letter, self.length + position)}"
            + (" This record looks like a protein; give the nucleotide sequence." if protein else "")
        )

    def _no_header(self, data: bytes) -> DataError:
        if self.comments:
            kind = "lines that begin with ';' are comments; write '>' for headers"
        else:
            kind = next((told for begin, told in _LOOKS_LIKE.items() if data.startswith(begin)), "is it FASTA?")
        begin = data[:200].partition(b"\n")[0].decode(errors="replace").strip()[:30]
        return DataError(
            f"{self.path} has no FASTA header: the first line that is not blank must start with '>' and a name, and is "
            f"{shown(begin)} ({kind})."
        )

    def _without_sequence(self) -> DataError:
        return DataError(f"{self.header}: record {self.named} has a header and no sequence. Remove it, or complete it.")

    def check_line(self, line: bytes) -> None:
        """Refuse an overlong line before the first header, header or comment."""
        if len(line) <= _LONGEST_HEADER:
            return
        if not self.number and not line.startswith((b">", b";")) and line.strip():
            raise self._no_header(line.lstrip())
        raise DataError(
            f"{self.path} has a line of more than {_LONGEST_HEADER:,} bytes where a header is expected ({self.place}). "
            "Is it FASTA, with line ends?"
        )

    def finish(self) -> None:
        """Refuse a file that ends too early."""
        if self.untouched:
            unpacked = " once unpacked" if self.path.stat().st_size else ""
            raise DataError(
                f"{self.path} is empty (0 bytes{unpacked}). Check that it was copied or downloaded completely."
            )
        if not self.number:
            only = "blank lines and comments" if self.comments else "blank lines"
            raise DataError(f"{self.path} has no sequence: only {only}. Check that it is the right file.")
        if not self.length:
            self._refuse(self._without_sequence())
