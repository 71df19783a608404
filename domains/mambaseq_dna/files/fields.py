"""What text formats share: endings of names, lines that are no data, and whole numbers."""

from __future__ import annotations

from pathlib import Path

from mambaseq.errors import shown

PACKED = (".gz", ".bgz", ".xz", ".bz2", ".zst")
"""Endings of packed files, in lower case."""

NOT_DATA = ("#", "track", "browser")
"""How lines of BED and bedGraph begin that hold no interval."""

_DIGITS = 18  # whole numbers of up to so many digits fit into 64 bits


def ending(path: str | Path) -> str:
    """The ending of a name in lower case, without that of packing.

    >>> ending(Path("a/genes.GFF3.XZ"))
    '.gff3'
    """
    name = Path(path).name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def whole(text: str) -> int:
    """A position: up to 18 digits and nothing else, so that it fits into 64 bits. Raises ValueError.

    >>> whole("1000")
    1000
    """
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise ValueError(f"{shown(text)} is not a whole number of up to {_DIGITS} digits")
    return int(text)
