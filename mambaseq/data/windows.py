"""Windows over long records: random ones to train on, fixed ones to validate and test on."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.intervals import Group, Interval, Intervals
from mambaseq.errors import ConfigError, DataError, shown

logger = logging.getLogger(__name__)

MakeBatch = Callable[[np.ndarray, int, np.random.Generator], Batch]
"""Tokens of a window, the number of its group and a random generator → a batch of one."""


def next_token(tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
    """`(length + 1,)` tokens → inputs and next-token targets, `(1, length)` int64 each."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return Batch(inputs=ids[None, :-1], targets=ids[None, 1:])


def group_label(tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
    """`(length,)` tokens → inputs `(1, length)` and the group as the class label, `(1,)` int64."""
    return Batch(inputs=torch.from_numpy(tokens.astype(np.int64))[None], targets=torch.tensor([group]))


def _too_short(group: Group, span: int, length: int, what: str) -> DataError:
    name = shown(group.name)
    if not len(group.intervals):
        return DataError(f"{what}: {name} has no sequence. Check its files and the split settings.")
    intervals = Intervals.of(group.intervals)
    longest = intervals[int(intervals.lengths.argmax())]
    fits = len(longest) - (span - length)
    lower = f"Lower data.length to at most {fits:,}, give" if fits > 0 else "Give"
    return DataError(
        f"{what}: no stretch of {name} is as long as a window, which reads {span:,} tokens; the longest has "
        f"{len(longest):,} ({longest.source}, from position {longest.start:,}). {lower} more of the data to this "
        "split, or add longer records."
    )


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning once in a process, however often it occurs."""
    logger.warning("%s", message)


_WORTH_TELLING = 0.01  # share of tokens in too short stretches that is reported when no whole record is too short


def _tell_left_out(groups: Sequence[Group], span: int, what: str) -> None:
    """Warn about records, and stretches of them, that are shorter than a window."""
    records = lost_records = tokens = lost_tokens = 0
    for group in groups:
        intervals = Intervals.of(group.intervals)
        lengths, number = intervals.lengths, intervals.records()
        fits = lengths >= span
        tokens += int(lengths.sum())
        lost_tokens += int(lengths[~fits].sum())
        has = np.zeros(int(number.max(initial=-1)) + 1, dtype=bool)
        has[number[fits]] = True
        records += len(has)
        lost_records += int((~has).sum())
    if lost_records or lost_tokens > _WORTH_TELLING * tokens:
        stretches = f"{lost_records:,} of {records:,} records" if lost_records else "some stretches of records"
        warn_once(
            f"{what}: {stretches} are left out, with {lost_tokens / tokens:.1%} of the tokens: they are shorter than a "
            f"window, which reads {span:,}. A lower data.length leaves out less."
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"data.seed must be at least 0, not {seed}.")


class RandomWindows:
    """Endless random windows. Item i depends only on `(seed, i)`.

    Drawn uniformly over groups, then over the group's records (or over its positions: see `by_position`),
    then over the positions in the record where a whole window fits into one interval.

    groups: what to draw from. span: tokens that a window reads (length + 1 for next-token targets).
    make_batch: see `MakeBatch`; `next_token`, `group_label`, or a domain's own (augmentation draws from the generator
        it gets). size: items that make an epoch.
    by_position: draw positions uniformly over the whole group, so that a record counts by its length.
    length: the set length of windows, for messages; span - 1 if not given.
    Raises DataError if a group has no interval of `span` tokens; logs a warning if some records have none.
    """

    endless = True

    def __init__(
        self,
        groups: Sequence[Group],
        span: int,
        make_batch: MakeBatch,
        *,
        size: int,
        seed: int = 0,
        by_position: bool = False,
        what: str = "training set",
        length: int | None = None,
    ) -> None:
        _check_seed(seed)
        if not 1 <= size < sys.maxsize:
            raise ConfigError(f"data.epoch_size must be at least 1 and below 2^63, not {size:,}.")
        if not groups:
            raise DataError(f"The {what} is empty. Check the split settings under data: and the input files.")
        self.span, self.make_batch, self.size, self.seed = span, make_batch, size, seed
        self._groups: list[tuple[Intervals, np.ndarray, np.ndarray]] = []
        for group in groups:
            intervals = Intervals.of(group.intervals)
            intervals = intervals.where(intervals.lengths >= span)
            if not len(intervals):
                raise _too_short(group, span, span - 1 if length is None else length, what)
            record = np.zeros(len(intervals), np.int64) if by_position else intervals.records()
            order = np.argsort(record, kind="stable")
            intervals = intervals.where(order)
            # intervals of record k: bounds[k] to bounds[k + 1]; cumulative positions of the intervals
            bounds = np.searchsorted(record[order], np.arange(int(record.max()) + 2))
            positions = np.concatenate(([0], np.cumsum(intervals.lengths - span + 1)))
            self._groups.append((intervals, bounds, positions))
        _tell_left_out(groups, span, what)

    def __len__(self) -> int:
        return self.size

    def draw(self, index: int) -> tuple[Interval, int, int, np.random.Generator]:
        """Interval, start and group of item `index`, and the generator for `make_batch`."""
        rng = np.random.default_rng((self.seed, index))
        group = int(rng.integers(len(self._groups)))
        intervals, bounds, positions = self._groups[group]
        record = int(rng.integers(len(bounds) - 1))
        first, last = bounds[record], bounds[record + 1]
        position = int(positions[first] + rng.integers(int(positions[last] - positions[first])))
        which = int(np.searchsorted(positions, position, side="right")) - 1
        interval = intervals[which]
        return interval, interval.start + position - int(positions[which]), group, rng

    def __getitem__(self, index: int) -> Batch:
        interval, start, group, rng = self.draw(index)
        return self.make_batch(interval.read(start, self.span), group, rng)


class GridWindows:
    """Fixed windows: each interval is tiled from its start, without overlap; a rest that is shorter than a window is
    left out.

    groups, span, make_batch, length: as in `RandomWindows`. stride: distance of the tiles' starts, `span` if not given;
        span - 1 for next-token targets, so that every token but the first is a target exactly once.
    balanced: take as many of each group as the smallest group has. at_most: take at most this many of a group. A seeded
        draw decides what is left out.
    Raises DataError if a group has no tile; logs a warning if some records have none.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        span: int,
        make_batch: MakeBatch,
        *,
        stride: int | None = None,
        balanced: bool = False,
        at_most: int | None = None,
        seed: int = 0,
        what: str = "test set",
        length: int | None = None,
    ) -> None:
        _check_seed(seed)
        self.span, self.make_batch, self.seed = span, make_batch, seed
        self._intervals = [Intervals.of(group.intervals) for group in groups]
        step = stride or span
        tiles: list[np.ndarray] = []  # a group: (tiles, 3) of interval, start, group
        for number, (group, intervals) in enumerate(zip(groups, self._intervals, strict=True)):
            counts = np.maximum((intervals.lengths - span) // step + 1, 0)
            if not counts.sum():
                raise _too_short(group, span, span - 1 if length is None else length, what)
            which = np.repeat(np.arange(len(intervals)), counts)
            place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
            starts = intervals.table[which, 2] + place * step
            tiles.append(np.stack(np.broadcast_arrays(which, starts, number), axis=1))
        _tell_left_out(groups, span, what)
        fewest = min(map(len, tiles)) if balanced else None
        for number, found in enumerate(tiles):
            wanted = min(n for n in (len(found), fewest, at_most) if n is not None)
            chosen = np.random.default_rng((seed, number)).choice(len(found), size=wanted, replace=False)
            tiles[number] = found[np.sort(chosen)]
        self._tiles = np.concatenate(tiles)

    def __len__(self) -> int:
        return len(self._tiles)

    def place(self, index: int) -> tuple[Interval, int, int]:
        """Interval, start and group of window `index`."""
        which, start, group = self._tiles[index].tolist()
        return self._intervals[group][which], start, group

    def places(self) -> Iterator[tuple[Interval, int, int]]:
        """`place` of every window, in order."""
        return (self.place(index) for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        interval, start, group = self.place(index)
        return self.make_batch(interval.read(start, self.span), group, np.random.default_rng((self.seed, index)))
