"""Faults of the rows of a file, told together: who mends them wants all of them, not one a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from mambaseq.data.records import Refuse, raised
from mambaseq.errors import DataError, cut, cut_list

Lines = Iterable[tuple[int, str]]
"""Numbers and texts of lines, see `text_lines`."""

T = TypeVar("T")

_NAMED = 10
_MOST = 10_000
_LONGEST = 420  # characters of the first fault, whose row may be quoted in it


class Faults:
    """Collects faults. Raises them at the end, or when there are so many that the file is another kind of file.

    refuse: given, each fault is told to it at once instead, and rows without one are used.
    count: how many there are to raise.
    """

    def __init__(self, refuse: Refuse = raised) -> None:
        self.refuse = None if refuse is raised else refuse
        self.count = 0
        self._first = self._file = ""
        self._others: list[str] = []

    @property
    def named(self) -> bool:
        """Whether as many are known as are named; what is wrong with others need not be said."""
        return self.count >= _NAMED

    def add(self, place: str, error: DataError | str = "") -> None:
        """A fault. place: of the row, such as `line 7`, or `a.csv, line 7`. error: what is wrong with it, after
        its file and place; it is not read once enough are named."""
        if self.refuse is not None:
            self.refuse(error if isinstance(error, DataError) else DataError(error))
            return
        self.count += 1
        if self.count == 1:
            self._first, self._file = cut(error, _LONGEST), place.rpartition(", ")[0]
        elif self.count <= _NAMED:
            what = str(error)
            what = what.partition(f"{place}: ")[2] or what
            file, _, line = place.rpartition(", ")
            place = line if file == self._file else place
            self._others.append(f"{place} ({cut(what, 36)})")
        if self.count >= _MOST:
            self.check()

    def check(self) -> None:
        """Raise DataError if there are any."""
        if not self.count:
            return
        if self.count == 1:
            raise DataError(self._first)
        more = self.count - 1
        told = cut_list([*self._others, *[""] * (more - len(self._others))], len(self._others), 450, "; ")
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
