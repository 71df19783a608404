"""Frames of a neural codec's codes as tokens: several codebooks a frame, each shifted by its number."""

from __future__ import annotations

from typing import Any

import numpy as np

from mambaseq.data.store import smallest_dtype
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.limits import check_setting

MOST_BOOKS, MOST_CODES = 256, 2**16


class CodeFrames(Tokenizer):
    """Frames of codes `(frames, books)` to rows of ids and back. With `delay`, book k is shifted by k rows, so that the
    code of a frame in one book is predicted from that in the book before it (Copet et al., arXiv:2306.05284, 2.2). The
    id `codes` stands where there is no code: in a first row, from which the first code is predicted, and beside the
    shifted ends.

    Of three frames of two books::

        row       0  1  2  3  4
        book 0    -  a  b  c  -
        book 1    -  -  A  B  C

    Args:
        books: codes of a frame.
        codes: number of codes in a book; they are from 0 to one less.
        delay: whether books are shifted.
    """

    def __init__(self, books: int, codes: int, delay: bool = True) -> None:
        check_setting("data.books", books, 1, MOST_BOOKS)
        check_setting("data.vocabulary", codes, 1, MOST_CODES)
        self.books, self.codes, self.delay = books, codes, delay
        self.vocab_size = codes + 1

    @property
    def options(self) -> dict[str, Any]:
        return {"books": self.books, "codes": self.codes, "delay": self.delay}

    @property
    def shift(self) -> int:
        """Rows that the last book is behind the first."""
        return self.books - 1 if self.delay else 0

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """`(frames, books)` integers to `(1 + frames + shift, books)` ids. Raises ValueError for another shape and
        codes out of range."""
        frames = np.asarray(raw)
        if frames.ndim != 2 or frames.shape[1] != self.books:
            raise ValueError(f"frames of {self.books} codes are wanted, not {frames.shape}.")
        if frames.size and not 0 <= int(frames.min()) <= int(frames.max()) < self.codes:
            raise ValueError(f"codes are in [0, {self.codes}), not in [{frames.min()}, {frames.max()}].")
        return self._rows(frames, len(frames), self.codes).astype(smallest_dtype(self.vocab_size))

    def _rows(self, frames: np.ndarray, count: int, unknown: int) -> np.ndarray:
        """The rows of `count` frames, int64; `unknown` stands for the codes of those after `frames`."""
        rows = np.full((1 + count + self.shift, self.books), self.codes, dtype=np.int64)
        for book in range(self.books):
            first = 1 + (book if self.delay else 0)
            rows[first : first + count, book] = unknown
            rows[first : first + len(frames), book] = frames[:, book]
        return rows

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Rows of ids, with or without the first one, to frames `(frames, books)` int64. What is cut short gives the
        frames that are whole. Raises ValueError for ids that `encode` does not give."""
        rows = np.asarray(ids).astype(np.int64)
        if rows.ndim != 2 or rows.shape[1] != self.books:
            raise ValueError(f"rows of {self.books} ids are wanted, not {rows.shape}.")
        if len(rows) and rows[0, 0] == self.codes:
            rows = rows[1:]
        count = max(len(rows) - self.shift, 0)
        firsts = range(self.books) if self.delay else [0] * self.books
        frames = np.stack([rows[first : first + count, book] for book, first in enumerate(firsts)], axis=1)
        if frames.size and not 0 <= int(frames.min()) <= int(frames.max()) < self.codes:
            raise ValueError(f"codes are in [0, {self.codes}), not in [{frames.min()}, {frames.max()}].")
        return frames

    def continued(self, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Tokenizer.continued`: `count` more frames. Codes of the last frames whose places come after the prompt's
        are given, and so are the places without a code."""
        known = self.decode(ids) if ids.ndim == 2 else np.zeros((0, self.books), dtype=np.int64)
        rows = self._rows(known, len(known) + count, -1)
        return rows[: 1 + len(known)], rows[1 + len(known) :]
