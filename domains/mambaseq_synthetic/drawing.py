"""Sets of random sequences that depend only on (seed, item)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq.limits import EPOCH, SEEDS, WINDOW, check_setting

VALIDATION, TEST = -1, -2
"""The seeds of validation and test sets, for any run; a run's own seed is never negative."""


class DrawnSet(Dataset[Batch]):
    """Sequences drawn by a function of (seed, items).

    draw: seed and `(items,)` int64 → inputs `(items, length)` and targets, of tokens `(items, length)` or of sequences
        `(items,)`. size: items of the set; for an endless one, items that make an epoch.
    """

    def __init__(
        self, draw: Callable[[int, Tensor], tuple[Tensor, Tensor]], seed: int, size: int, *, endless: bool = False
    ) -> None:
        self.draw, self.seed, self.size, self.endless = draw, seed, size, endless

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        (item,) = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """The items of a batch at once, as a torch `DataLoader` asks for them."""
        if not self.endless and not all(0 <= index < self.size for index in indices):
            raise IndexError(f"The set has {self.size} items; asked for {list(indices)}.")
        inputs, targets = self.draw(self.seed, torch.tensor(indices, dtype=torch.int64))
        pairs = zip(inputs.split(1), targets.split(1), strict=True)
        return [Batch(inputs=ids, targets=labels) for ids, labels in pairs]


def check_sets(
    seed: int, samples_per_epoch: int, n_validation: int, n_test: int, length: int, vocab_size: int = 1
) -> None:
    """Raise ConfigError for a negative seed, an empty set, or one too large for any machine.

    length: of the longest sequence.
    """
    if seed < 0:
        raise ConfigError(f"data.seed must not be negative (validation and test sets have such seeds); it is {seed}.")
    if min(samples_per_epoch, n_validation, n_test) < 1:
        raise ConfigError(
            f"data.samples_per_epoch, data.n_validation and data.n_test must be at least 1, not {samples_per_epoch}, "
            f"{n_validation} and {n_test}."
        )
    check_setting("data.seed", seed, *SEEDS)
    for key, size in (("samples_per_epoch", samples_per_epoch), ("n_validation", n_validation), ("n_test", n_test)):
        check_setting(f"data.{key}", size, *EPOCH)
    check_setting("data.length", length, 1, WINDOW.value)
    check_setting("data.vocab_size", vocab_size, 1, 2**31 - 1)


class DrawnAtLengths(SequenceData):
    """Data that are drawn: training and validation sequences of one length, test sequences of several.

    A subclass sets length, test_lengths, samples_per_epoch, n_validation, n_test and seed.
    """

    length: int
    test_lengths: list[int]
    samples_per_epoch: int
    n_validation: int
    n_test: int
    seed: int
    _draw: Callable[..., tuple[Tensor, Tensor]]
    """As `DrawnSet` draws, with the argument `length`."""

    def setup(self) -> None:
        """Nothing is read."""

    def _set(self, seed: int, size: int, length: int, endless: bool = False) -> DrawnSet:
        return DrawnSet(functools.partial(self._draw, length=length), seed, size, endless=endless)

    def train(self) -> DrawnSet:
        return self._set(self.seed, self.samples_per_epoch, self.length, endless=True)

    def validation(self) -> DrawnSet:
        return self._set(VALIDATION, self.n_validation, self.length)

    def test(self) -> ConcatDataset:
        """All lengths, in the order in which they are given."""
        return ConcatDataset([self._set(TEST, self.n_test, length) for length in self.test_lengths])
