"""Faults of the rows of a file, told together: who mends them wants all of them, not one a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from mambaseq.data.records import Refuse, raised
from mambaseq.errors import DataError, cut, cut_causes

Lines = Iterable[tuple[int, str]]
"""Numbers and texts of lines, see `text_lines`."""

T = TypeVar("T")

_NAMED = 10  # causes
_READ = 500  # faults whose cause is read
_MOST = 10_000
_AT = re.compile(r" at position [\d,]+")  # what differs between equal causes
_LONGEST = 420  # characters of the first fault, whose row may be quoted in it


class Faults:
    """Collects faults. Raises them at the end, or when there are so many that the file is another kind of file.

    refuse: given, each fault is told to it at once instead, and rows without one are used.
    count: how many there are to raise.
    """

    def __init__(self, refuse: Refuse = raised) -> None:
        self.refuse = None if refuse is raised else refuse
        self.count = 0
        self._first = self._file = self._cause = ""
        self._others: list[tuple[str, str]] = []
        self._causes: set[str] = set()

    @property
    def named(self) -> bool:
        """Whether as many are known as are told; what is wrong with others need not be said."""
        return len(self._causes) >= _NAMED or self.count >= _READ

    def add(self, place: str, error: DataError | str = "") -> None:
        """A fault. place: of the row, such as `line 7`, or `a.csv, line 7`. error: what is wrong with it, after
        its file and place; it is not read once enough are named."""
        if self.refuse is not None:
            self.refuse(error if isinstance(error, DataError) else DataError(error))
            return
        if not self.count or (error and not self.named):
            text = str(error)
            cause = _AT.sub("", (text.partition(f"{place}: ")[2] or text).partition(". ")[0])
            file, _, line = place.rpartition(", ")
            if not self.count:
                self._first, self._file, self._cause = cut(text, _LONGEST), file, cause
            else:
                self._others.append((line if file == self._file else place, cause))
            self._causes.add(cause)
        self.count += 1
        if self.count >= _MOST:
            self.check()

    def check(self) -> None:
        """Raise DataError if there are any."""
        if not self.count:
            return
        if self.count == 1:
            raise DataError(self._first)
        more = self.count - 1
        told = cut_causes(self._others, _NAMED, longest=36, first=self._cause, count=more)
        many = " or more" if self.count >= _MOST else ""
        raise DataError(f"{self._first} {more:,}{many} other row(s) cannot be used either: {told}.")


def parsed(lines: Lines, parse: Callable[[int, str], Iterable[T]]) -> Iterator[T]:
    """What `parse` makes of lines, in order. Its DataErrors, which begin with the file and `line 7: `, are told
    together; nothing is returned after the first."""
    faults = Faults()
    for number, line in lines:
        try:
            found = parse(number, line)
        except DataError as error:
            faults.add(f"line {number:,}", error)
            continue
        if not faults.count:
            yield from found
    faults.check()
