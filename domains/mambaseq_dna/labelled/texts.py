"""Texts of many records, each different one once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def numbered(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different texts, in the order in which they come, and the number of each text, `(texts,)` int64."""
    known: dict[str, int] = {}
    numbers = np.fromiter((known.setdefault(text, len(known)) for text in texts), dtype=np.int64, count=len(texts))
    return list(known), numbers


def first_of(numbers: np.ndarray, number: int) -> int:
    """The first record with a number."""
    return int(np.argmax(numbers == number))
