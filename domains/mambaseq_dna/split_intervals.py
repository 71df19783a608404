"""Splits by intervals: a BED file says which parts of a genome are training, validation and test data.

The layout is that of Basenji, Enformer and HyenaDNA: sequence, start, end, split.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from mambaseq.errors import DataError, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import read_bed
from mambaseq_dna.ranges import covered, difference, union

Extend = Literal["none", "within", "hyenadna", "mamba"]
PUBLISHED: tuple[Extend, ...] = ("hyenadna", "mamba")

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "valid": "validation",
    "val": "validation",
    "eval": "validation",
    "validation": "validation",
    "test": "test",
}
"""What files and folders call splits, and what they are."""


@dataclasses.dataclass(frozen=True)
class SplitIntervals:
    """The intervals of a file, in its order.

    names: of the sequences. table: `(intervals, 4)` int64: split (index in SPLITS), sequence (index in names), start,
        stop. lines: their numbers in the file.
    """

    path: Path
    names: list[str]
    table: np.ndarray
    lines: np.ndarray

    @classmethod
    def read(cls, path: Path) -> SplitIntervals:
        """Raises DataError as `read_bed`, for a split of another name, and for a file without training data."""
        numbers: dict[str, int] = {}
        rows, lines = [], []
        for bed in read_bed(path):
            word = SPLIT_WORDS.get(bed.name.lower())
            if word is None:
                raise DataError(
                    f"{path}, line {bed.line:,}: the split (column 4) is {shown(bed.name)}. It must be train, valid or "
                    "test."
                )
            rows.append((SPLITS.index(word), numbers.setdefault(bed.chrom, len(numbers)), bed.start, bed.stop))
            lines.append(bed.line)
        table = np.array(rows, dtype=np.int64)
        if not (table[:, 0] == 0).any():
            raise DataError(f"{path} has no interval of training data: none has train in column 4.")
        return cls(path, list(numbers), table, np.array(lines, dtype=np.int64))

    def placed(self, assembly: Assembly) -> SplitIntervals:
        """The same with the sequences of an assembly, by its own names, in its order.

        Raises DataError for a sequence that the assembly has not, and an interval that ends behind its sequence.
        """
        known, lengths = assembly.names, np.array(list(assembly.lengths.values()))
        places = {name: number for number, name in enumerate(known)}
        first = {number: int(line) for number, line in zip(self.table[::-1, 1], self.lines[::-1], strict=True)}
        number_of = np.array(
            [
                places[assembly.resolve(name, f"{self.path}, line {first[number]:,}")]
                for number, name in enumerate(self.names)
            ],
            dtype=np.int64,
        )
        table = self.table.copy()
        table[:, 1] = number_of[table[:, 1]]
        if len(beyond := np.flatnonzero(table[:, 3] > lengths[table[:, 1]])):
            _, sequence, start, stop = table[beyond[0]].tolist()
            raise DataError(
                f"{self.path}, line {self.lines[beyond[0]]:,}: the interval {start:,} to {stop:,} ends behind "
                f"{shown(known[sequence])}, which has {lengths[sequence]:,} bases. Give the assembly that the file "
                "refers to."
            )
        return SplitIntervals(self.path, known, table, self.lines)

    @property
    def _line(self) -> int:
        """All sequences are laid on one line, this far apart."""
        return int(self.table[:, 3].max()) + 2

    def _ranges(self, table: np.ndarray, line: int) -> np.ndarray:
        """`(n, 3)` sequence, start, stop → places on the line."""
        return table[:, 1:] + table[:, :1] * line

    def sets(self, *, refuse: bool) -> list[np.ndarray]:
        """The bases of each split, as ranges on one line.

        refuse: raise DataError if a base is in two splits; otherwise it counts as test before validation before
            training data.
        """
        line = self._line
        sets = [union(self._ranges(self.table[self.table[:, 0] == split, 1:], line)) for split in range(3)]
        for split, stronger in ((0, 1), (0, 2), (1, 2)):
            shared = int(covered(sets[split], sets[stronger]).sum())
            if shared and refuse:
                raise DataError(
                    f"{self.path}: {shared:,} bases are in {SPLITS[split]} and in {SPLITS[stronger]} intervals. Give "
                    "every base to one split, or set data.duplicates to drop, which takes them out of the "
                    f"{SPLITS[split]} data."
                )
            sets[split] = difference(sets[split], sets[stronger])
        return sets

    def stretches(self, lengths: np.ndarray, extend: Extend, *, refuse: bool) -> np.ndarray:
        """What windows may be cut from, `(stretches, 4)`: split, sequence, start, stop; no base is in two of them.

        lengths: of the sequences. extend: `none`: the intervals; those of a split that overlap or adjoin are one
            stretch. `within`: with the bases between two intervals of one split, and up to a sequence's ends.
        refuse: see `sets`. Raises DataError as `sets` does.
        """
        line = max(self._line, int(lengths.max()) + 2)
        of_splits = [union(self._ranges(self._rows(part, self._line), line)) for part in self.sets(refuse=refuse)]
        if extend == "within":
            of_splits = _grown(of_splits, lengths, line)
        rows = [np.insert(self._rows(part, line), 0, split, axis=1) for split, part in enumerate(of_splits)]
        return np.concatenate(rows)

    @staticmethod
    def _rows(ranges: np.ndarray, line: int) -> np.ndarray:
        """Places on the line → `(n, 3)` sequence, start, stop."""
        sequence = ranges[:, 0] // line
        return np.stack((sequence, ranges[:, 0] - sequence * line, ranges[:, 1] - sequence * line), axis=1)

    def windows(self, span: int, rule: Extend, lengths: np.ndarray | None = None) -> np.ndarray:
        """Windows as published, which read what is there, `(windows, 4)`: split, sequence, start, stop.

        rule: `hyenadna` (its loader): a window an interval: its first bases, or, where it is shorter, the interval and
            as much to both sides. `mamba` (arXiv:2312.00752, E.3.1): an interval is tiled, or, where it is shorter,
            gives two windows, one that begins and one that ends with it.
        lengths: of the sequences: windows are then moved into them, or left out where a sequence is too short; without
            it, they are cut at position 0.
        """
        size = self.table[:, 3] - self.table[:, 2]
        shorter = size < span
        if rule == "mamba":
            tiles = np.where(shorter, 2, size // span)
            of = np.repeat(np.arange(len(size)), tiles)
            number = np.arange(len(of)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
            place = np.where(shorter[of], number * (size[of] - span), number * span)
        else:
            of, place = np.arange(len(size)), -(np.where(shorter, span - size, 0) // 2)
        table = self.table[of]
        table[:, 2] += place
        table[:, 3] = table[:, 2] + span
        if lengths is None:
            table[:, 2] = np.maximum(table[:, 2], 0)
            return table
        table = table[lengths[table[:, 1]] >= span]
        table[:, 2] = np.clip(table[:, 2], 0, lengths[table[:, 1]] - span)
        table[:, 3] = table[:, 2] + span
        return table

    def leaks(self, span: int, rule: Extend) -> list[Leak]:
        """What a published rule (see `windows`) lets training windows of `span` bases see of validation and test
        intervals; for those of them that there are."""
        windows = self.windows(span, rule)
        line = max(self._line, int(windows[:, 3].max()) + 2)
        seen = union(self._ranges(windows[windows[:, 0] == 0, 1:], line))
        found = []
        for split in (1, 2):
            held_out = union(self._ranges(self.table[self.table[:, 0] == split, 1:], line))
            own = self._ranges(windows[windows[:, 0] == split, 1:], line)
            if len(own):
                touched = int((covered(own, seen) > 0).sum())
                bases = int((held_out[:, 1] - held_out[:, 0]).sum())
                found.append(Leak(SPLITS[split], span, bases, int(covered(held_out, seen).sum()), len(own), touched))
        return found


@dataclasses.dataclass(frozen=True)
class Leak:
    """Bases of a split's intervals, and how many of them are in training windows; windows of the split, and how many of
    them hold a base that is in a training window."""

    split: str
    span: int
    bases: int
    leaked: int
    windows: int
    touched: int

    def __str__(self) -> str:
        return (
            f"{self.leaked:,} of {self.bases:,} bases of the {self.split} intervals ({self.leaked / self.bases:.1%}) "
            f"are in training windows of {self.span:,}"
        )


def _grown(sets: list[np.ndarray], lengths: np.ndarray, line: int) -> list[np.ndarray]:
    """Each split's stretches with the gaps between two of them, and what is before the first and behind the last of
    a sequence. A gap between two splits stays out, so that no base is in two splits."""
    blocks = np.concatenate([np.insert(part, 0, split, axis=1) for split, part in enumerate(sets)])
    blocks = blocks[np.argsort(blocks[:, 1])]
    sequence = blocks[:, 1] // line
    starts, stops = blocks[:, 1].copy(), blocks[:, 2].copy()
    first = np.concatenate(([True], sequence[1:] != sequence[:-1]))
    last = np.append(first[1:], True)
    starts[first] = sequence[first] * line
    stops[last] = sequence[last] * line + lengths[sequence[last]]
    joins = ~first[1:] & (blocks[1:, 0] == blocks[:-1, 0])
    starts[1:][joins] = stops[:-1][joins]
    grown = np.stack((starts, stops), axis=1)
    return [union(grown[blocks[:, 0] == split]) for split in range(len(sets))]
