"""Finds texts that are both in training and held out. Texts are compared by their contents: line ends, a byte order
mark, blank lines at the end, packing and file names do not hide a copy. A text with any other change, or a part of a
longer text, is not found."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Literal

from mambaseq.errors import DataError

Duplicates = Literal["refuse", "drop"]

SHORT = 64
"""Characters. Shorter texts are not compared: they may be equal by chance ("Yes.")."""

logger = logging.getLogger(__name__)


class Content:
    """A hash of a text that comes in pieces; equal for texts with equal contents."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._begun = False
        self._return = False  # a \r that may be half of a line end
        self._ends = 0  # line ends that may be the last
        self.length = 0

    def update(self, text: str) -> None:
        if not self._begun and text:
            self._begun, text = True, text.removeprefix("\ufeff")
        if self._return:
            text = "\r" + text
        self._return = text.endswith("\r")
        text = text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        kept = text.rstrip("\n")
        if kept:
            self._hash.update(b"\n" * self._ends + kept.encode("utf-8"))
            self.length += self._ends + len(kept)
            self._ends = 0
        self._ends += len(text) - len(kept)

    def digest(self) -> bytes:
        """16 bytes."""
        return self._hash.digest()


def content(pieces: Iterable[str]) -> Content:
    """The hash of a text in pieces."""
    found = Content()
    for piece in pieces:
        found.update(piece)
    return found


class HeldOut:
    """The texts of validation and test, by their content.

    duplicates: what to do with a copy in training: `refuse` raises, `drop` leaves it out.
    """

    def __init__(self, duplicates: Duplicates = "refuse") -> None:
        self.duplicates = duplicates
        self.dropped = 0
        self._seen: dict[bytes, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, split: str, where: str, pieces: Iterable[str]) -> None:
        """Note a text of a split. Raises DataError if another split has it."""
        found = content(pieces)
        if found.length >= SHORT:
            other, earlier = self._seen.setdefault(found.digest(), (split, where))
            if other != split:
                raise _copy(where, split, earlier, other, "")

    def takes(self, where: str, pieces: Iterable[str]) -> bool:
        """Whether a text is for training. Raises DataError if it is held out and copies are refused."""
        if not self._seen or (found := content(pieces)).length < SHORT or found.digest() not in self._seen:
            return True
        if self.duplicates == "refuse":
            other, earlier = self._seen[found.digest()]
            raise _copy(
                where, "train", earlier, other, ", or set data.duplicates: drop to leave such texts out of training"
            )
        self.dropped += 1
        return False

    def tell(self) -> None:
        """Log in one line how many were left out."""
        if self.dropped:
            logger.warning("Left out of training: %s texts that are in validation or test.", f"{self.dropped:,}")


def _copy(where: str, split: str, earlier: str, other: str, remedy: str) -> DataError:
    return DataError(f"{where} ({split}) is a copy of {earlier}, which is in {other}. Remove one{remedy}.")
