"""Texts of many records, each different one once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mambaseq_dna.files.faults import Faults

MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "."))
"""Texts, in lower case, that say that a label, value or group is not known."""

Where = Callable[[int], str]
"""The file and line of a record, by its number."""


def is_missing(text: str) -> bool:
    """Whether a cell says that its value is not known."""
    return text.strip().lower() in MISSING


def numbered(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different texts, in the order in which they come, and the number of each text, `(texts,)` int64."""
    known: dict[str, int] = {}
    numbers = np.fromiter((known.setdefault(text, len(known)) for text in texts), dtype=np.int64, count=len(texts))
    return list(known), numbers


def refuse(
    texts: Sequence[str], index: np.ndarray, bad: Callable[[str], bool], where: Where, wrong: Callable[[str], str]
) -> None:
    """Raise DataError for the records whose text is bad, all at once. texts, index: see `numbered`. wrong: what is
    wrong with a text, and the remedy."""
    faults = Faults()
    for row in np.flatnonzero(np.array([bad(text) for text in texts], dtype=bool)[index]).tolist():
        place = where(row)
        faults.add(place, "" if faults.named else f"{place}: {wrong(texts[index[row]])}")
    faults.check()
