"""Datasets with a target for each base, or each bin of bases: classes from annotations, values from signals."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.baselines import Baseline
from mambaseq.data.cache import fingerprint, locate
from mambaseq.data.intervals import Group, Interval, Intervals
from mambaseq.data.windows import RandomWindows, group_label
from mambaseq.errors import ConfigError, cut_list, did_you_mean, shown
from mambaseq_dna.base import FastaData, Names
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.labels import UNKNOWN, Classes, Overlap, Runs, Unplaced, paint
from mambaseq_dna.signals import Signal, read_signal
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case

Read = Callable[[str, int, int], np.ndarray]
"""Targets of the bases `[start, stop)` of a sequence of the assembly: `(bases, ...)`; what is unknown is -100 among
integers and NaN among floats."""

_COUNTED = 1 << 20


class _Painted:
    """Classes, read from runs. It pickles, as loader workers need."""

    def __init__(self, runs: dict[str, Runs]) -> None:
        self.runs = runs

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.runs[name].read(start, stop)


class _Stacked:
    """Values, a column a signal."""

    def __init__(self, signals: Sequence[Signal]) -> None:
        self.signals = signals

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.stack([signal.read(name, start, stop) for signal in self.signals], axis=1)


class Targets:
    """Bases and the targets of windows.

    read: see `Read`. partners: the number of each class, or value, on the other strand. stride: bases that share a
        target. one_of: targets `(bases,)` are one of several classes; otherwise they have a column for each.
    """

    def __init__(self, read: Read, partners: Sequence[int], stride: int, one_of: bool) -> None:
        self.read, self.partners, self.stride, self.one_of = read, np.asarray(partners), stride, one_of

    def known(self, interval: Interval, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, upper case, and targets of `[start, stop)` of an interval's record; N and unknown outside of it."""
        ids = np.full(stop - start, N, np.uint8)
        first, last = max(start, interval.start), min(stop, interval.stop)
        ids[first - start : last - start] = fold_case(interval.read(first, last - first))
        targets = self.read(interval.store.names[interval.record], start, stop)
        targets[ids == N] = self.unknown(targets)
        return ids, targets

    def unknown(self, targets: np.ndarray) -> int | float:
        """The value that stands for unknown."""
        return UNKNOWN if targets.dtype.kind == "i" else float("nan")

    def other_strand(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The other strand, read in its own direction: positions turn, and classes and values are exchanged."""
        ids = BaseTokenizer().reverse_complement(ids)
        if not self.one_of:
            return ids, targets[::-1][:, self.partners]
        turned = targets[::-1].copy()
        known = turned != UNKNOWN
        turned[known] = self.partners[turned[known]]
        return ids, turned

    def binned(self, targets: np.ndarray) -> np.ndarray:
        """Targets of bins of `stride` bases, from `(bases, ...)`: the class that most known bases have (the first of
        several, and `other` last), whether any base has a label, or the mean of the known values."""
        if self.stride == 1:
            return targets
        bins = targets.reshape(-1, self.stride, *targets.shape[1:])
        if not self.one_of and targets.dtype.kind == "i":
            return bins.max(1)
        if not self.one_of:
            known = ~np.isnan(bins)
            counts = known.sum(1)
            total = np.where(known, bins, 0).sum(1, dtype=np.float64)
            return np.where(counts > 0, total / np.maximum(counts, 1), np.nan).astype(np.float32)
        counts = (bins[:, :, None] == np.arange(len(self.partners))).sum(1)
        order = np.roll(np.arange(len(self.partners)), -1)
        found = order[counts[:, order].argmax(1)]
        return np.where(counts.sum(1) > 0, found, UNKNOWN)

    def batch(self, ids: np.ndarray, targets: np.ndarray) -> Batch:
        return Batch(
            inputs=torch.from_numpy(ids.astype(np.int64))[None],
            targets=torch.from_numpy(np.ascontiguousarray(self.binned(targets)))[None],
            stride=self.stride,
        )


class RandomTargets:
    """Windows of `RandomWindows` with the targets of their bases. augment: one half as the other strand."""

    endless = True

    def __init__(self, windows: RandomWindows, targets: Targets, augment: bool) -> None:
        self.windows, self.targets, self.augment = windows, targets, augment

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        interval, start, _, rng = self.windows.draw(index)
        ids, targets = self.targets.known(interval, start, start + self.windows.span)
        if self.augment and rng.random() < 0.5:
            ids, targets = self.targets.other_strand(ids, targets)
        return self.targets.batch(ids, targets)


class CoveringTargets:
    """Windows that score every base of the intervals once: their middles follow each other, and `margin` bases on
    either side are read and have no target. What is outside of an interval is N.

    at_most: take at most so many windows, by a seeded draw. groups: the record of each.
    """

    def __init__(
        self,
        intervals: Sequence[Interval],
        targets: Targets,
        length: int,
        margin: int,
        at_most: int | None = None,
        seed: int = 0,
    ) -> None:
        self.intervals, self.targets = Intervals.of(intervals), targets
        self.length, self.margin = length, margin
        step = length - 2 * margin
        counts = -(-self.intervals.lengths // step)
        which = np.repeat(np.arange(len(counts)), counts)
        first = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
        self._places = np.stack((which, self.intervals.table[which, 2] + first), axis=1)
        if at_most is not None and at_most < len(self._places):
            chosen = np.random.default_rng(seed).choice(len(self._places), at_most, replace=False)
            self._places = self._places[np.sort(chosen)]
        self.groups = self.intervals.records()[self._places[:, 0]].tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Batch:
        which, start = self._places[index].tolist()
        ids, targets = self.targets.known(self.intervals[which], start - self.margin, start - self.margin + self.length)
        unknown = self.targets.unknown(targets)
        targets[: self.margin] = unknown
        targets[self.length - self.margin :] = unknown
        return self.targets.batch(ids, targets)


class PositionData(FastaData):
    """Windows of an assembly with a target for each base, or each bin of `stride` bases.

    Training windows are uniform over positions. Validation and test windows score every base once (see `margin`).

    Args:
        fasta: FASTA or 2bit files of the assembly (paths, patterns, `fetched:` or `mambaseq:` names).
        length: bases a window.
        stride: bases that share a target (a bin); `model.head.stride` must be the same.
        margin: bases at either end of a validation or test window that are read and not scored, so that every scored
            base has others around it.
        drop_n: leave out windows with N in them; otherwise N is read, and never scored.
        unplaced: what is on sequences that the assembly has not is an error (`refuse`), or left out (`drop`).
        options: see `FastaData`.
    """

    def __init__(
        self,
        fasta: list[str] | str,
        length: int = 8192,
        stride: int = 1,
        margin: int = 0,
        drop_n: bool = False,
        unplaced: Unplaced = "refuse",
        **options: Any,
    ) -> None:
        files = [fasta] if isinstance(fasta, str) else fasta
        super().__init__(files={"assembly": files}, length=length, drop_n=drop_n, **options)
        if stride < 1 or length % stride or margin % stride:
            raise ConfigError(
                f"data.length ({length:,}) and data.margin ({margin:,}) must be multiples of data.stride ({stride})."
            )
        if not 0 <= 2 * margin < length:
            raise ConfigError(f"data.margin must be from 0 to less than half of data.length, {length:,}; not {margin}.")
        self.stride, self.margin, self.unplaced = stride, margin, unplaced
        self.tokenizer = BaseTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self._targets: Targets | None = None
        self._annotations: dict[str, str] = {}

    def setup(self) -> None:
        """Read the assembly and what its bases are. Raises DataError."""
        super().setup()
        if self._targets is None:
            paths = self._paths()
            names = [path.name for path in paths]
            self._annotations = {
                path.name if names.count(path.name) == 1 else str(path): fingerprint(path, self.cache)["sha256"]
                for path in paths
            }
            assembly = Assembly([file for of in self.files.values() for file in of], self.cache)
            self._targets = self._read_targets(assembly)

    @abc.abstractmethod
    def _paths(self) -> list[Path]:
        """The files of targets."""

    @abc.abstractmethod
    def _read_targets(self, assembly: Assembly) -> Targets: ...

    @property
    def targets(self) -> Targets:
        """The targets of the assembly's bases."""
        self.setup()
        assert self._targets is not None
        return self._targets

    def sources(self) -> dict[str, str]:
        return {**super().sources(), **self._annotations}

    def train(self) -> RandomTargets:
        windows = self._random(self.length, group_label, by_position=True)
        return RandomTargets(windows, self.targets, self.reverse_complement)

    def _held_out(self, groups: Sequence[Group], at_most: int | None) -> CoveringTargets | None:
        intervals = [interval for group in groups for interval in group.intervals]
        if not intervals:
            return None
        return CoveringTargets(intervals, self.targets, self.length, self.margin, at_most, self.seed)

    def validation(self) -> CoveringTargets | None:
        return self._held_out(self.splits.validation, self.n_validation)

    def test(self) -> CoveringTargets | None:
        return self._held_out(self.splits.test, self.n_test)

    def baselines(self) -> dict[str, Baseline]:
        """What a reviewer asks for: see `mambaseq_dna.baselines`."""
        from mambaseq_dna.baselines.offered import baselines_of

        return baselines_of(self)


class AnnotatedData(PositionData):
    """A class for each base of an assembly, from BED, GFF3 or GTF files, for the head `token_classification`; or
    several labels, for `token_multilabel`.

    Args:
        fasta: FASTA or 2bit files of the assembly (paths, patterns, `fetched:` or `mambaseq:` names).
        annotation: BED, GFF3 or GTF files, plain or packed, by their endings.
        features: name of each class to what its intervals are called: types of a GFF (column 3, such as `CDS`), names
            of a BED (column 4); with `*` and `?`. A class that comes first wins where classes overlap.
        stranded: classes that are two, `NAME on +` and `NAME on -`; true for all. They are exchanged where a window is
            read as the other strand.
        overlap: bases of several classes have the first (`priority`; of one class on both strands, that on +), or no
            target (`ignore`).
        several: a base may have any of the labels; bases in no interval have none.
        other: the name of bases in no interval, the first class.
        options: see `PositionData` and `FastaData`.
    """

    def __init__(
        self,
        fasta: list[str] | str,
        annotation: list[str] | str,
        features: dict[str, list[str] | str],
        stranded: bool | list[str] = False,
        overlap: Overlap = "priority",
        several: bool = False,
        other: str = "other",
        test_records: Names = None,
        **options: Any,
    ) -> None:
        super().__init__(fasta, test_records=test_records, **options)
        self.annotation = [annotation] if isinstance(annotation, str) else annotation
        self._features, self._stranded, self._other = features, stranded, other
        classes = Classes(features, stranded, other)
        self.overlap, self.several = overlap, several
        self.class_names = classes.names[1:] if several else classes.names
        self.strand_classes = [one - 1 for one in classes.partners[1:]] if several else classes.partners
        self.task = "multilabels" if several else "labels"
        self.runs: dict[str, Runs] = {}

    def _paths(self) -> list[Path]:
        return [path for pattern in self.annotation for path in locate(pattern)]

    def _read_targets(self, assembly: Assembly) -> Targets:
        classes = Classes(self._features, self._stranded, self._other)
        self.runs = paint(
            assembly,
            self._paths(),
            classes,
            overlap=self.overlap,
            several=self.several,
            unplaced=self.unplaced,
        )
        return Targets(_Painted(self.runs), self.strand_classes or [], self.stride, one_of=not self.several)

    @cached_property
    def class_counts(self) -> list[tuple[int, int]]:  # type: ignore[override]
        """Bases of the training data of each class, and others; N left out."""
        counts = np.zeros((len(self.class_names), 2), np.int64)
        for targets in self._training_targets():
            if self.several:
                known = targets[targets[:, 0] != UNKNOWN] if len(self.class_names) else targets
                counts += np.stack((known.sum(0), len(known) - known.sum(0)), axis=1)
            else:
                known = targets[targets != UNKNOWN]
                of = np.bincount(known, minlength=len(counts))
                counts += np.stack((of, len(known) - of), axis=1)
        return [(int(own), int(rest)) for own, rest in counts]

    def _training_targets(self) -> Iterator[np.ndarray]:
        for group in self.splits.train:
            for interval in group.intervals:
                for start in range(interval.start, interval.stop, _COUNTED):
                    yield self.targets.known(interval, start, min(start + _COUNTED, interval.stop))[1]


class SignalData(PositionData):
    """Values for each base, or bin of bases, of an assembly, from bigWig or bedGraph files, for the head
    `token_regression`. A bin's value is the mean of the bases that have one; bases and bins without one are not scored.

    Args:
        fasta: FASTA or 2bit files of the assembly (paths, patterns, `fetched:` or `mambaseq:` names).
        signals: name of each value to its file, by its ending: .bw or .bigWig (needs the extra `dna`), .bedGraph or
            .bdg (also packed).
        strand_pairs: two names each of values that belong to the two strands; they are exchanged where a window is read
            as the other strand.
        options: see `PositionData` and `FastaData`.
    """

    def __init__(
        self,
        fasta: list[str] | str,
        signals: dict[str, str],
        strand_pairs: list[list[str]] | None = None,
        test_records: Names = None,
        **options: Any,
    ) -> None:
        super().__init__(fasta, test_records=test_records, **options)
        if not signals:
            raise ConfigError("data.signals names no file. Write, for instance, signals: {depth: depth.bw}.")
        self.signals, self.n_outputs = signals, len(signals)
        self.strand_classes = _exchanged(list(signals), strand_pairs or [])
        self.task = "values"

    def _paths(self) -> list[Path]:
        found = []
        for name, pattern in self.signals.items():
            paths = locate(pattern)
            if len(paths) > 1:
                raise ConfigError(
                    f"data.signals.{name} names {len(paths)} files: {cut_list(path.name for path in paths)}. Give each "
                    "value one file."
                )
            found += paths
        return found

    def _read_targets(self, assembly: Assembly) -> Targets:
        signals = [read_signal(assembly, path, self.unplaced) for path in self._paths()]
        return Targets(_Stacked(signals), self.strand_classes or [], self.stride, one_of=False)


def _exchanged(names: list[str], pairs: Sequence[Sequence[str]]) -> list[int]:
    """The number of each value on the other strand."""
    found = list(range(len(names)))
    for pair in pairs:
        for name in pair:
            if name not in names:
                raise ConfigError(
                    f"data.strand_pairs names {shown(name)}, which is not in data.signals."
                    f"{did_you_mean(str(name)[:80], names)} There are: {cut_list(names)}."
                )
        if len(set(pair)) != 2 or any(found[names.index(name)] != names.index(name) for name in pair):
            raise ConfigError(f"data.strand_pairs: {shown(pair)} are not two values that are in no other pair.")
        one, other = (names.index(name) for name in pair)
        found[one], found[other] = other, one
    return found
