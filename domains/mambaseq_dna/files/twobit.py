"""Reads UCSC's 2bit: four bases a byte, with lists of the stretches of N and of lower case.

Either byte order; 32-bit offsets (version 0) and 64-bit ones (version 1). The format is described in the UCSC Genome
Browser's FAQ, data file formats.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mambaseq.errors import DataError, shown
from mambaseq_dna.files.parsing import Piece

_SIGNATURE = 0x1A412743
_ORDERS = {_SIGNATURE.to_bytes(4, "little"): "<", _SIGNATURE.to_bytes(4, "big"): ">"}
_LETTERS = b"TCAG"
_PACKED_PIECE = 1 << 18


def is_twobit(path: Path) -> bool:
    """Whether a file begins as 2bit does; False for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) in _ORDERS
    except OSError:
        return False


def twobit_pieces(path: Path, table: bytes) -> Iterator[Piece]:
    """The sequences of a 2bit file as `fasta_pieces` gives those of a FASTA file, in the order of its index.

    table: the id of each of the 256 letters, in upper and lower case.
    Raises DataError that names file and sequence: for a file that is cut short or damaged, has no sequence or an empty
    one, or one name twice.
    """
    try:
        with path.open("rb") as file:
            yield from _Reader(path, file, table).pieces()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the file.") from error


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Stretches of a sequence, in order, without overlap."""

    starts: np.ndarray
    stops: np.ndarray

    def within(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the bases `[start, stop)` are in one, bool; None if none is."""
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if first >= last:
            return None
        edges = np.zeros(stop - start + 1, dtype=np.int8)
        edges[np.maximum(self.starts[first:last] - start, 0)] += 1
        edges[np.minimum(self.stops[first:last], stop) - start] -= 1
        return np.cumsum(edges[:-1], dtype=np.int8).view(bool)


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, table: bytes) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.order = _ORDERS[file.read(4)]
        ids = np.frombuffer(table, dtype=np.uint8)
        upper = ids[list(_LETTERS)]
        places = np.arange(256)[:, None] >> np.array([6, 4, 2, 0]) & 3
        self.unpacked = np.ascontiguousarray(upper[places]).view(np.uint32).reshape(-1)  # four ids of each byte
        self.n = ids[ord("N")]
        self.lower = np.arange(256, dtype=np.uint8)
        self.lower[ids[list(b"TCAGN")]] = ids[list(b"tcagn")]

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path} is damaged, or no 2bit file: {what}. Copy or download it again.")

    def _read(self, n_bytes: int, what: str) -> bytes:
        data = self.file.read(n_bytes) if n_bytes <= self.size else b""
        if len(data) < n_bytes:
            raise DataError(
                f"{self.path} is cut short: it has {self.size:,} bytes, and ends within {what}. Copy or download it "
                "again."
            )
        return data

    def _numbers(self, count: int, what: str, size: int = 4) -> np.ndarray:
        """Whole numbers of `size` bytes, `(count,)` int64."""
        return np.frombuffer(self._read(count * size, what), dtype=f"{self.order}u{size}").astype(np.int64)

    def _index(self) -> list[tuple[str, int]]:
        version, count, _ = self._numbers(3, "its header").tolist()
        if version not in (0, 1):
            raise self._damaged(f"its version is {version}, not 0 or 1")
        if not count:
            raise DataError(f"{self.path} has no sequence. Check that it is the right file.")
        offset_size = 8 if version else 4
        if count * (2 + offset_size) > self.size:
            raise self._damaged(f"it cannot hold the {count:,} sequences that it announces")
        found: dict[str, int] = {}
        for number in range(1, count + 1):
            raw = self._read(self._read(1, "its index")[0], "its index")
            try:
                name = raw.decode()
            except UnicodeDecodeError as error:
                raise self._damaged(f"the name of sequence {number:,} is not UTF-8") from error
            if not name.strip():
                raise DataError(f"{self.path}: sequence {number:,} has no name. Make the file again with names.")
            if name in found:
                raise DataError(
                    f"{self.path}: two sequences are named {shown(name)} (the second is sequence {number:,}). Make the "
                    "file again with unique names."
                )
            found[name] = int(self._numbers(1, "its index", offset_size)[0])
        return list(found.items())

    def _blocks(self, length: int, where: str, what: str) -> _Blocks:
        count = int(self._numbers(1, where)[0])
        starts, sizes = self._numbers(count, where), self._numbers(count, where)
        stops = starts + sizes
        if count and (int(stops[-1]) > length or (starts[1:] < stops[:-1]).any() or not sizes.all()):
            raise self._damaged(f"the stretches of {what} in {where} overlap, are empty or leave it")
        return _Blocks(starts, stops)

    def pieces(self) -> Iterator[Piece]:
        left = self.size  # sequences that share bytes would unpack to any size
        for name, offset in self._index():
            where = f"sequence {shown(name)}"
            if offset > self.size:
                raise self._damaged(f"{where} is said to begin behind the file's end")
            self.file.seek(offset)
            length = int(self._numbers(1, where)[0])
            unknown, masked = self._blocks(length, where, "N"), self._blocks(length, where, "lower case")
            self._numbers(1, where)  # reserved
            if not length:
                raise DataError(f"{self.path}: {where} has no bases. Leave it out, and make the file again.")
            left -= -(-length // 4)
            if left < 0:
                raise self._damaged("its sequences are longer than the file, so they overlap")
            begins: str | None = name
            for start in range(0, length, 4 * _PACKED_PIECE):
                stop = min(start + 4 * _PACKED_PIECE, length)
                packed = np.frombuffer(self._read(-(-(stop - start) // 4), where), dtype=np.uint8)
                ids = self.unpacked[packed].view(np.uint8)[: stop - start]
                if (hidden := unknown.within(start, stop)) is not None:
                    ids[hidden] = self.n
                if (hidden := masked.within(start, stop)) is not None:
                    ids[hidden] = self.lower[ids[hidden]]
                yield begins, "", ids.tobytes()
                begins = None
