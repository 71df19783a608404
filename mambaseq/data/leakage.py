"""Finds tokens that are in two splits. Records are compared by their contents, not by their names or files.

Records are identified by checksums (see `TokenStore.checksums`): another name, file, line length, compression or case
does not hide a copy, nor does the other strand, if the data have one. A copy inside a longer record, or with any
difference, is not found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mambaseq.data.intervals import Group, Interval, Intervals
from mambaseq.errors import DataError

PROTECTED = ("test", "validation", "train")
"""Of copies in two splits, those of the split that is named first here are kept."""


@dataclasses.dataclass(frozen=True)
class _Claims:
    """All intervals of all splits, one for each row.

    owners: (split, group) of the numbers in `owner`, the most protected split first. intervals: their intervals.
    owner, index: whose interval this is, and which. content: the same number for records with equal contents.
    start, stop: in the direction of the smaller of the record's two checksums.
    record: the same number for intervals of one record.
    """

    owners: list[tuple[str, str]]
    intervals: list[Intervals]
    owner: np.ndarray
    index: np.ndarray
    content: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    record: np.ndarray

    @classmethod
    def of(cls, splits: Mapping[str, Sequence[Group]]) -> _Claims:
        ordered = sorted(splits, key=lambda split: PROTECTED.index(split) if split in PROTECTED else len(PROTECTED))
        owners = [(split, group.name) for split in ordered for group in splits[split]]
        intervals = [Intervals.of(group.intervals) for split in ordered for group in splits[split]]
        rows: list[np.ndarray] = [np.zeros((0, 6), np.int64)]
        checksums: list[np.ndarray] = [np.zeros(0, np.uint64)]
        folders: dict[str, int] = {}
        for owner, found in enumerate(intervals):
            for number, store in enumerate(found.stores):
                (index,) = np.nonzero(found.table[:, 0] == number)
                record, start, stop = found.table[index, 1:].T
                both = store.checksums[record]
                turned = both[:, 0] > both[:, 1]
                length = store.lengths[record]
                start, stop = np.where(turned, length - stop, start), np.where(turned, length - start, stop)
                folder = folders.setdefault(str(store.folder), len(folders))
                columns = np.broadcast_arrays(owner, index, start, stop, record, folder)
                rows.append(np.stack(columns, axis=1))
                checksums.append(both.min(axis=1))
        table = np.concatenate(rows)
        content = np.unique(np.concatenate(checksums), return_inverse=True)[1].reshape(-1)
        of_folder = table[:, 5] * (int(table[:, 4].max(initial=0)) + 1) + table[:, 4]
        record = np.unique(of_folder, return_inverse=True)[1].reshape(-1)
        owner, index, start, stop = table[:, :4].T
        return cls(owners, intervals, owner, index, content, start, stop, record)

    def interval(self, row: int) -> Interval:
        return self.intervals[self.owner[row]][int(self.index[row])]

    def where(self, row: int) -> str:
        return "{} ({})".format(*self.owners[self.owner[row]])

    def overlapping(self, key: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which rows begin before an earlier row of the same key ends; rows are sorted by key and start."""
        span = int(self.stop.max(initial=0)) + 1
        ends = np.maximum.accumulate(key[rows] * span + self.stop[rows])
        return rows[1:][key[rows][1:] * span + self.start[rows][1:] < ends[:-1]]


def check_disjoint(*, remedy: str = "", **splits: Sequence[Group]) -> None:
    """Raise DataError if a token is in two splits or two groups, or twice in one of them.

    Copies of a record (see above) within one group of one split are not a leak, and are left alone.
    remedy: a sentence for the message about copies.
    """
    claims = _Claims.of(splits)
    _refuse_twice(claims)
    copies = np.flatnonzero(_copies(claims))
    if not len(copies):
        return
    row = int(copies[0])
    same = np.flatnonzero(claims.content == claims.content[row])
    meets = (claims.start[same] < claims.stop[row]) & (claims.stop[same] > claims.start[row])
    other = int(same[meets & (claims.owner[same] != claims.owner[row])][0])
    number = len(np.unique(claims.record[copies]))
    more = f" This is so for {number:,} records." if number > 1 else ""
    one, two = claims.interval(row), claims.interval(other)
    if (one.store.folder, one.record) == (two.store.folder, two.record):
        start, stop = max(one.start, two.start), min(one.stop, two.stop)
        told = (
            f"Positions {start:,} to {stop:,} of {one.source} are in {claims.where(other)} and in {claims.where(row)}."
        )
    else:
        told = (
            f"{two.source[0].upper()}{two.source[1:]}, in {claims.where(other)}, holds the same as {one.source}, in "
            f"{claims.where(row)}."
        )
    raise DataError(f"{told}{more} Give every region to only one split and one group{remedy}.")


def without_copies(splits: Mapping[str, Sequence[Group]]) -> tuple[dict[str, list[Group]], int, int]:
    """The splits without copies (see above) that are in two splits or groups, and the number of intervals and tokens
    left out.

    Of copies in two splits, test data are kept before validation data, and these before training data. Of copies in two
    groups of a split none is kept, because it is unknown which group is right.
    Raises DataError if a token is twice in one group of a split.
    """
    claims = _Claims.of(splits)
    _refuse_twice(claims)
    copies = _copies(claims)
    kept: dict[str, list[Group]] = {split: [] for split in splits}
    for number, ((split, name), intervals) in enumerate(zip(claims.owners, claims.intervals, strict=True)):
        keep = np.ones(len(intervals), dtype=bool)
        keep[claims.index[copies & (claims.owner == number)]] = False
        kept[split].append(Group(name, intervals.where(keep)))
    return kept, int(copies.sum()), int((claims.stop - claims.start)[copies].sum())


def _refuse_twice(claims: _Claims) -> None:
    """Raise DataError if one group of one split has a position of a record twice."""
    key = claims.record * len(claims.owners) + claims.owner
    order = np.lexsort((claims.start, key))
    if len(twice := claims.overlapping(key, order)):
        row = int(twice[0])
        interval, where = claims.interval(row), claims.where(row)
        raise DataError(
            f"Positions {interval.start:,} to {interval.stop:,} of {interval.source} are in {where} and, at least in "
            f"part, in {where} again. Name every file once."
        )


def _copies(claims: _Claims) -> np.ndarray:
    """The rows to leave out, `(rows,)` bool, so that nothing is in two splits or groups."""
    found = np.zeros(len(claims.owner), dtype=bool)
    order = np.lexsort((claims.start, claims.content))
    suspicious = np.unique(claims.content[claims.overlapping(claims.content, order)])
    (rows,) = np.nonzero(np.isin(claims.content, suspicious) & (claims.start < claims.stop))
    owner = claims.owner[rows]
    # all contents on one line; places by rank, so that one number can hold an owner and a place
    line = claims.content[rows] * (int(claims.stop.max(initial=0)) + 1)
    places, ranks = np.unique(np.stack((line + claims.start[rows], line + claims.stop[rows])), return_inverse=True)
    spans = ranks.reshape(2, -1)
    spans_by_owner = spans + owner * len(places)
    splits = np.array([split for split, _ in claims.owners])[owner] if len(rows) else np.zeros(0, str)
    copied, taken = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for split in dict.fromkeys(split for split, _ in claims.owners):  # in order of protection
        own = splits == split
        of_others = _meeting(spans[:, own], spans[:, own]) - _meeting(spans_by_owner[:, own], spans_by_owner[:, own])
        copied[own] = (of_others > 0) | (_meeting(spans[:, own], spans[:, taken]) > 0)
        taken |= own & ~copied
    found[rows[copied]] = True
    return found


def _meeting(spans: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The number of other spans that overlap each of these, `(spans,)`. Both are `(2, n)`, start and end, none empty.
    Overlapping spans are those that start before a span ends, minus those that end before it starts."""
    begun = np.searchsorted(np.sort(others[0]), spans[1], side="left")
    return begun - np.searchsorted(np.sort(others[1]), spans[0], side="right")
