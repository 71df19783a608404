"""A data set of a few tokens, for tests of everything around it."""

from __future__ import annotations

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.data.records import Record


class Items:
    def __init__(self, seed: int, size: int, length: int, vocab_size: int, endless: bool) -> None:
        self.seed, self.size, self.length, self.vocab_size = seed, size, length, vocab_size
        self.endless = endless

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        start, step = rng.integers(self.vocab_size), rng.integers(1, 3)
        tokens = torch.from_numpy((start + step * np.arange(self.length + 1)) % self.vocab_size)[None]
        return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])


class TinyTokens(SequenceData):
    """Arithmetic sequences modulo the vocabulary.

    Args:
        length: tokens a sequence.
        size: sequences an epoch.
        endless: whether sequences are drawn anew for ever.
    """

    def __init__(self, length: int = 16, size: int = 20, endless: bool = False) -> None:
        self.length, self.size, self.endless = length, size, endless
        self.vocab_size = 7

    def setup(self) -> None:
        pass

    def train(self) -> Items:
        return Items(0, self.size, self.length, 7, self.endless)

    def validation(self) -> Items:
        return Items(1, 6, self.length, 7, False)

    def test(self) -> Items:
        return Items(2, 6, self.length, 7, False)


class TinyRagged(TinyTokens):
    """Such sequences of different lengths.

    Args:
        length: tokens of the longest.
        shortest: tokens of the shortest.
        size: sequences an epoch.
    """

    def __init__(self, length: int = 60, shortest: int = 4, size: int = 64) -> None:
        super().__init__(length, size)
        self.shortest = shortest

    def train(self) -> list[Batch]:  # type: ignore[override]
        span = self.length - self.shortest + 1
        lengths = [self.shortest + number * 17 % span for number in range(self.size)]
        return [Items(0, self.size, length, 7, False)[number] for number, length in enumerate(lengths)]

    def extremes(self) -> list[tuple[int, str]]:
        return [(self.shortest, "row 1"), (self.length, "the validation set")]


class TinyValues(TinyTokens):
    """Values to be regressed: first and last token and their sum, over the vocabulary."""

    reader = "tiny:read_digits"

    def _valued(self, items: Items) -> list[Batch]:
        def valued(ids: torch.Tensor) -> Batch:
            ends = ids[:, [0, -1]].float()
            return Batch(inputs=ids, targets=torch.cat([ends, ends.sum(1, keepdim=True)], dim=1) / 7)

        return [valued(items[index].inputs) for index in range(len(items))]

    def train(self) -> list[Batch]:  # type: ignore[override]
        return self._valued(super().train())

    def validation(self) -> list[Batch]:  # type: ignore[override]
        return self._valued(super().validation())


class TinySeries(SequenceData):
    """Two channels of a wave, from anywhere in it: the next values of a signal.

    Args:
        length: steps a window.
    """

    n_channels = 2
    reader, writer = "csv", "csv"

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def setup(self) -> None:
        pass

    def _windows(self, first: int, count: int) -> list[Batch]:
        steps = first + 3 * torch.arange(count)[:, None] + torch.arange(self.length + 1)
        waves = torch.stack([(steps / 4).sin(), (steps / 4).cos()], -1)
        return [Batch(inputs=one[None, :-1], targets=one[None, 1:]) for one in waves]

    def train(self) -> list[Batch]:
        return self._windows(0, 40)

    def validation(self) -> list[Batch]:
        return self._windows(1000, 4)

    def reader_options(self) -> dict[str, list[str]]:
        return {"columns": ["sine", "cosine"]}

    writer_options = reader_options


def read_digits(path, tokenizer):
    """A record of a line of digits."""
    for number, line in enumerate(path.read_text().split()):
        yield Record(f"line {number}", ids=np.array([int(digit) for digit in line], dtype=np.uint8))
