"""Long sequences on disk while they are used, so that memory does not grow with them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable

import numpy as np

from mambaseq.errors import UserError

_IN_MEMORY = 1 << 20  # bytes; what is shorter stays an array


class Spooled:
    """A sequence in a temporary file that nobody else sees; gone with this object. Parts are read when they are asked
    for: `spooled[start:stop]` is an array of its own."""

    def __init__(self, pieces: Iterable[np.ndarray]) -> None:
        """pieces: one after the other, of one dtype and the same shape beyond the first dimension.

        Raises UserError if the disk for temporary files is full, or too many files are open.
        """
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        except OSError as error:
            remedy = (
                "Raise the limit (ulimit -n), or give fewer long sequences at once."
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else "Set TMPDIR to another folder."
            )
            raise UserError(
                f"A temporary file for a long sequence cannot be made: {error.strerror}. {remedy}"
            ) from error
        self._length, self._dtype, self._shape = 0, np.dtype(np.int64), ()
        try:
            for piece in pieces:
                self._dtype, self._shape = piece.dtype, piece.shape[1:]
                self._file.write(np.ascontiguousarray(piece).data)
                self._length += len(piece)
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise UserError(
                f"A temporary file for a long sequence cannot be written: {error.strerror}. Make room in "
                f"{tempfile.gettempdir()}, or set TMPDIR to another folder."
            ) from error
        self._size = self._dtype.itemsize * int(np.prod(self._shape, dtype=np.int64))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._length)
        assert step == 1
        n = max(stop - start, 0)
        found = os.pread(self._file.fileno(), n * self._size, start * self._size)
        return np.frombuffer(found, self._dtype).reshape(n, *self._shape)


def spooled(pieces: Iterable[np.ndarray]) -> np.ndarray | Spooled:
    """The pieces, `(n, ...)` each of one dtype, as one sequence: in memory while they are short, else in a file."""
    held: list[np.ndarray] = []
    rest = iter(pieces)
    for piece in rest:
        held.append(piece)
        if sum(one.nbytes for one in held) > _IN_MEMORY:
            return Spooled(_chained(held, rest))
    return np.concatenate(held)


def _chained(held: list[np.ndarray], rest: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    while held:
        yield held.pop(0)
    yield from rest
