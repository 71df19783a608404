"""Intervals of metrics by the bootstrap: sequences, or groups of them, are drawn again and again from the set; and
Wilson's, where only counts are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.errors import DataError
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric

DRAWS = 1000
_ROWS = 2**28  # of all draws together: more rows than 268,000 are drawn fewer times
_LEAST = 100
_GROUPS = 10  # fewer say little of what others would be like
_AT_ONCE = 2**22  # numbers that are drawn together


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


@dataclasses.dataclass
class Bootstrap:
    """Draws of the sequences of a set: the same ones for all that is measured on it, so that differences can be told.

    answers: of any model on the set. groups: `(sequences,)` a number for each sequence in `answers`; sequences of a
        number are drawn together. None: each alone.
        few_groups: how many groups there are, if they are too few to draw from: sequences are drawn then.
    n_units: how many sequences, or groups, are drawn from. draws: how often.
    """

    n_sequences: int
    groups: np.ndarray | None = None
    draws: int = DRAWS
    seed: int = 0
    few_groups: int = 0

    @classmethod
    def of(cls, answers: Answers, groups: Sequence[object] | None = None, seed: int = 0) -> Bootstrap:
        """groups: the group of every item of the data set, in its order. Raises DataError where one has none."""
        units, few = None, 0
        if groups is not None:
            numbers = answers.numbers.numpy()
            if len(groups) <= numbers.max(initial=-1):
                raise DataError(f"The set names groups for {len(groups):,} of its sequences; all must have one.")
            known: dict[object, int] = {}
            units = np.array([known.setdefault(groups[number], len(known)) for number in numbers], dtype=np.int64)
            if len(known) < _GROUPS:
                units, few = None, len(known)
        draws = int(np.clip(_ROWS // max(len(answers), 1), _LEAST, DRAWS))
        return cls(answers.n_sequences, units, draws, seed, few)

    @property
    def n_units(self) -> int:
        return self.n_sequences if self.groups is None else int(self.groups.max(initial=-1)) + 1

    def __iter__(self) -> Iterator[Tensor]:
        """How often each sequence is drawn, `(some draws, sequences)` int64, a part after the other."""
        rng, n = np.random.default_rng(self.seed), self.n_units
        step = max(min(_AT_ONCE // max(n, self.n_sequences, 1), self.draws), 1)
        for first in range(0, self.draws, step):
            rows = min(step, self.draws - first)
            places = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
            counts = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n)
            yield torch.from_numpy(counts if self.groups is None else counts[:, self.groups])

    def measure(self, metrics: Mapping[str, Metric], answers: Answers) -> dict[str, np.ndarray]:
        """Each metric of each draw, `(draws,)` float64; metrics that `answers` do not hold are left out."""
        found: dict[str, list[Tensor]] = {}
        for draws in self if self.n_units > 1 else ():
            for name, metric in metrics.items():
                if metric.scalar and (values := metric.drawn(answers, draws)) is not None:
                    found.setdefault(name, []).append(values.double())
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def interval(values: np.ndarray) -> Interval | None:
    """The middle 95% of what was drawn; None where most draws have no value."""
    finite = values[np.isfinite(values)]
    if 2 * len(finite) <= len(values):
        return None
    low, high = np.quantile(finite, (0.025, 0.975))
    return Interval(float(low), float(high))


def intervals(metrics: Mapping[str, Metric], answers: Answers, bootstrap: Bootstrap) -> dict[str, Interval]:
    """The interval of each metric that has one."""
    found = {name: interval(values) for name, values in bootstrap.measure(metrics, answers).items()}
    return {name: one for name, one in found.items() if one is not None}


def wilson(correct: int, n: int) -> Interval:
    """Wilson's 95% interval of a share: `correct` of n independent answers."""
    from scipy.stats import binomtest

    found = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return Interval(float(found.low), float(found.high))
