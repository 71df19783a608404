"""bigWig files: read by pyBigWig, written by pybigtools (an extra)."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.errors import DataError, UserError, shown


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
        float32."""
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
        return out
