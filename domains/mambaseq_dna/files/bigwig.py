"""bigWig files: read by pyBigWig, written by pybigtools (an extra)."""

from __future__ import annotations

import importlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.data.tables import LARGEST
from mambaseq.errors import DataError, UserError, shown

_BIGWIG, _TREE, _NODE = 0x888FFC26, 0x78CA8C91, 256


def pybigwig() -> Any:
    """The module pyBigWig, with NumPy, which reads. Raises UserError that says what to install."""
    module = _extra("pyBigWig")
    if not getattr(module, "numpy", 0):
        raise UserError("This pyBigWig was built without NumPy. Install its wheel: pip install --force pyBigWig.")
    return module


def pybigtools() -> Any:
    """The module pybigtools, which writes in bounded memory; pyBigWig keeps a file's zoom levels in memory, 14 bytes a
    base. Raises UserError that says what to install."""
    return _extra("pybigtools")


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"bigWig files need {name}, which is not installed: pip install 'mambaseq[dna]'.") from error


def name_sequences(path: Path, lengths: Mapping[str, int]) -> None:
    """Let a bigWig file list sequences without a value too, which pybigtools leaves out: genome browsers and tools that
    join tracks compare the lists of their files.

    lengths: of all sequences, by name; those of the file are among them. The list is a search tree (Kent et al.,
    Bioinformatics 26, 2010, supplement, tables 8 to 11), and is written anew at the file's end.
    """
    with path.open("r+b") as file:
        head = file.read(64)
        order = "<" if head[:4] == _BIGWIG.to_bytes(4, "little") else ">"
        with pybigwig().open(str(path)) as known:
            number = {name: place for place, name in enumerate(known.chroms())}
        if len(number) == len(lengths):
            return
        for name in lengths:
            number.setdefault(name, len(number))
        keys = sorted((name.encode(), number[name], length) for name, length in lengths.items())
        size = max(len(key) for key, _, _ in keys)
        at = file.seek(-4, os.SEEK_END)  # over the mark that ends the file
        file.write(struct.pack(f"{order}IIIIQQ", _TREE, _NODE, size, 8, len(keys), 0))
        file.write(_tree(order, size, keys, file.tell()))
        file.write(head[:4])
        file.seek(8)
        file.write(struct.pack(f"{order}Q", at))


def _tree(order: str, size: int, keys: list[tuple[bytes, int, int]], at: int) -> bytes:
    """The nodes of a tree, the root first: at most `_NODE` keys each, of `size` bytes. at: its place in the file."""
    levels = [[(key, struct.pack(f"{order}II", number, length)) for key, number, length in keys]]
    while len(levels[0]) > _NODE:  # the first keys of the level below
        levels.insert(0, [(key, b"") for key, _ in levels[0][::_NODE]])
    out = bytearray()
    each = 4 + _NODE * (size + 8)
    for depth, level in enumerate(levels):
        leaf = depth == len(levels) - 1
        below = at + len(out) + -(-len(level) // _NODE) * each
        for first in range(0, len(level), _NODE):
            some = level[first : first + _NODE]
            node = struct.pack(f"{order}BBH", leaf, 0, len(some))
            for place, (key, value) in enumerate(some, first):
                node += key.ljust(size, b"\0") + (value if leaf else struct.pack(f"{order}Q", below + place * each))
            out += node.ljust(each, b"\0")
    return bytes(out)


class BigWig:
    """A bigWig file, read by place. Pickles, and is opened again in each process.

    lengths: bases of its sequences, by name. Raises DataError for a file that is no bigWig, or damaged; UserError where
        pyBigWig is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: tuple[int, Any] = (0, None)
        self.lengths: dict[str, int] = {name: int(length) for name, length in self._file().chroms().items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": (0, None)}

    def _file(self) -> Any:
        process, file = self._open
        if process != os.getpid():
            try:
                file = pybigwig().open(str(self.path))
                kept = bool(file.isBigWig())
            except (RuntimeError, OSError) as error:
                raise DataError(
                    f"{self.path} cannot be read as bigWig: it is missing, damaged or another format. Check the file "
                    "(bigWigInfo tests it); bedGraph has the ending .bedGraph."
                ) from error
            if not kept:
                raise DataError(f"{self.path} is bigBed, not bigWig: it holds intervals. Convert it (bigBedToBed).")
            self._open = (os.getpid(), file)
        return self._open[1]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Values of bases `[start, stop)` of a sequence of the file, NaN where there is none; `(stop - start,)`
        float32. Raises DataError for a part that cannot be read, and for values beyond `LARGEST`."""
        out = np.full(stop - start, np.nan, np.float32)
        first, last = max(start, 0), min(stop, self.lengths[name])
        if last > first:
            try:
                out[first - start : last - start] = self._file().values(name, first, last, numpy=True)
            except RuntimeError as error:
                raise DataError(
                    f"{self.path}: {shown(name)}, {first:,} to {last:,}, cannot be read; the file is damaged. Copy or "
                    "make it again."
                ) from error
            if len(wrong := np.flatnonzero(np.abs(out) > LARGEST)):  # which is not true of NaN
                raise DataError(
                    f"{self.path}: {shown(name)} has the value {out[wrong[0]]:g} at {start + int(wrong[0]):,} (counted "
                    f"from 0), beyond {LARGEST:g}, the largest to learn. Scale the values, or leave it out."
                )
        return out
