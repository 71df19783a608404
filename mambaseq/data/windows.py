"""Windows over long records: random ones to train on, fixed ones to validate and test on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.store import TokenStore
from mambaseq.errors import DataError


@dataclasses.dataclass(frozen=True)
class Interval:
    """Tokens `[start, stop)` of a store's record. No window crosses the borders of its interval."""

    store: TokenStore
    record: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def source(self) -> str:
        """File and record, for messages."""
        files = ", ".join(str(source.get("name")) for source in self.store.meta.get("sources", []))
        return f"record {self.store.names[self.record]!r} of {files or self.store.folder}"

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start` on, counted from the record's begin; a copy."""
        if start < self.start or start + length > self.stop:
            raise IndexError(f"[{start}, {start + length}) leaves the interval [{self.start}, {self.stop})")
        return np.array(self.store[self.record][start : start + length])


@dataclasses.dataclass(frozen=True)
class Group:
    """Intervals that are drawn as often as any other group's: the sequences of one species, say."""

    name: str
    intervals: Sequence[Interval]


def check_disjoint(**splits: Sequence[Group]) -> None:
    """Raise DataError when a token is in two of the splits, or twice in one of them.

    Records are told apart by what their store was built from, so a copy of a file under another name is seen.
    """
    claimed: dict[tuple[str, int], list[tuple[int, int, str, Interval]]] = {}
    for split, groups in splits.items():
        for group in groups:
            for interval in group.intervals:
                sources = interval.store.meta.get("sources", [])
                hashes = ",".join(str(source.get("sha256")) for source in sources if "sha256" in source)
                key = (hashes or str(interval.store.folder), interval.record)
                where = f"{split} ({group.name})"
                claimed.setdefault(key, []).append((interval.start, interval.stop, where, interval))
    for taken in claimed.values():
        taken.sort(key=lambda claim: claim[:2])
        for (_, stop, before, interval), (start, end, after, _) in itertools.pairwise(taken):
            if start < stop:
                raise DataError(
                    f"Positions {start} to {min(stop, end)} of {interval.source} are in {before} and in "
                    f"{after}. Give every region to one split and one group only."
                )


MakeBatch = Callable[[np.ndarray, int, np.random.Generator], Batch]
"""Tokens of a window, the number of its group and a generator of its own → a batch of one."""


def next_token(tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
    """`(length + 1,)` tokens → inputs and next-token targets, `(1, length)` int64 each."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return Batch(inputs=ids[None, :-1], targets=ids[None, 1:])


def group_label(tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
    """`(length,)` tokens → inputs `(1, length)` and the group as the class label, `(1,)` int64."""
    return Batch(inputs=torch.from_numpy(tokens.astype(np.int64))[None], targets=torch.tensor([group]))


def _too_short(group: Group, span: int, what: str) -> DataError:
    if not group.intervals:
        return DataError(f"{what}: {group.name!r} has no sequence at all. Check its files and the split settings.")
    longest = max(group.intervals, key=len)
    return DataError(
        f"{what}: no stretch of {group.name!r} is as long as a window, which reads {span:,} tokens; the "
        f"longest has {len(longest):,} ({longest.source}, from position {longest.start:,}). Lower "
        f"data.length to at most {max(len(longest) - 1, 0):,}, give more of the data to this split, or add "
        "longer records."
    )


class RandomWindows:
    """Endless random windows. Item i is drawn by a generator seeded with `(seed, i)` and depends on nothing
    else.

    Drawn uniformly over groups, then over the group's records (or over its positions: see `by_position`),
    then over the positions in the record where a whole window fits into one interval.

    groups: what to draw from. span: tokens that a window reads (length + 1 for next-token targets).
    make_batch: see `MakeBatch`; `next_token`, `group_label`, or a domain's own (augmentation draws from the
        generator it gets). size: items that make an epoch.
    by_position: draw positions uniformly over the whole group, so that a record counts by its length.
    Raises DataError when a group has no interval of `span` tokens.
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
    ) -> None:
        self.span, self.make_batch, self.size, self.seed = span, make_batch, size, seed
        self._groups: list[list[tuple[list[Interval], np.ndarray]]] = []
        for group in groups:
            records: dict[tuple[str, int], list[Interval]] = {}
            for interval in group.intervals:
                if len(interval) >= span:
                    key = ("", 0) if by_position else (str(interval.store.folder), interval.record)
                    records.setdefault(key, []).append(interval)
            if not records:
                raise _too_short(group, span, what)
            self._groups.append(
                [(fit, np.cumsum([len(interval) - span + 1 for interval in fit])) for fit in records.values()]
            )

    def __len__(self) -> int:
        return self.size

    def draw(self, index: int) -> tuple[Interval, int, int, np.random.Generator]:
        """Interval, start and group of item `index`, and the generator that goes on to `make_batch`."""
        rng = np.random.default_rng((self.seed, index))
        group = int(rng.integers(len(self._groups)))
        records = self._groups[group]
        intervals, positions = records[int(rng.integers(len(records)))]
        position = int(rng.integers(positions[-1]))
        which = int(np.searchsorted(positions, position, side="right"))
        offset = position - (int(positions[which - 1]) if which else 0)
        return intervals[which], intervals[which].start + offset, group, rng

    def __getitem__(self, index: int) -> Batch:
        interval, start, group, rng = self.draw(index)
        return self.make_batch(interval.read(start, self.span), group, rng)


class GridWindows:
    """Fixed windows: each interval is tiled from its start, without overlap; a rest shorter than a window is
    left out.

    groups, span, make_batch: as in `RandomWindows`. stride: distance of the tiles' starts, `span` if not
        given; span - 1 for next-token targets, so that every token but the first is a target exactly once.
    balanced: take as many of every group as the one with the fewest has. at_most: take at most this many of a
        group. What is left out is decided by a seeded draw.
    Raises DataError when a group has no tile.
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
    ) -> None:
        self.span, self.make_batch, self.seed = span, make_batch, seed
        self._intervals = [interval for group in groups for interval in group.intervals]
        step = stride or span
        tiles: list[np.ndarray] = []  # a group: (tiles, 3) of interval, start, group
        first = 0
        for number, group in enumerate(groups):
            rows = [
                np.stack(np.broadcast_arrays(first + k, starts, number), axis=1)
                for k, interval in enumerate(group.intervals)
                if len(starts := np.arange(interval.start, interval.stop - span + 1, step))
            ]
            first += len(group.intervals)
            if not rows:
                raise _too_short(group, span, what)
            tiles.append(np.concatenate(rows))
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
        which, start, group = (int(value) for value in self._tiles[index])
        return self._intervals[which], start, group

    def places(self) -> Iterator[tuple[Interval, int, int]]:
        """`place` of every window, in order."""
        return (self.place(index) for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        interval, start, group = self.place(index)
        return self.make_batch(interval.read(start, self.span), group, np.random.default_rng((self.seed, index)))
