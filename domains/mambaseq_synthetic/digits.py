"""Handwritten digits, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq.limits import SEEDS, check_setting

SIDE, LEVELS = 8, 17


class LabelledRows:
    """A table's rows as sequences: inputs `(rows, length)` int64 or `(rows, length, 1)` float32, labels `(rows,)`."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"The set has {len(self)} items; asked for {index}.")
        return Batch(inputs=self.inputs[index : index + 1], targets=self.labels[index : index + 1])


class DigitsData(SequenceData):
    """The 1,797 handwritten digits of scikit-learn (8 by 8 pixels of 0 to 16, the test half of the UCI set "Optical
    Recognition of Handwritten Digits") as sequences of 64 pixels, row by row, with their labels 0 to 9.

    >>> data = DigitsData()
    >>> data.setup()
    >>> [len(part) for part in (data.train(), data.validation(), data.test())]
    [1257, 180, 360]
    >>> data.train()[0].inputs.reshape(8, 8)
    tensor([[ 0,  0,  6, 14,  8,  0,  0,  0],
            [ 0,  6, 16, 10, 14,  4,  0,  0],
            [ 0, 11,  5,  0, 11,  4,  0,  0],
            [ 0,  4,  6,  2, 16,  2,  0,  0],
            [ 0,  0,  0, 13,  7,  0,  0,  0],
            [ 0,  0,  7, 14,  0,  0,  0,  0],
            [ 0,  0, 12, 10,  8,  8,  4,  0],
            [ 0,  0,  7, 14, 14, 14, 13,  0]])
    >>> data.class_names[data.train()[0].targets.item()]
    '2'

    Args:
        permuted: put the pixels into a random order, the same for all images (as in permuted sequential MNIST,
            arXiv:1504.00941), so that neighbours in the image are far from each other.
        continuous: give pixels as a signal of one channel in [0, 1] instead of 17 tokens; for the encoder `signal`.
        n_validation: images of the validation set.
        n_test: images of the test set.
        split_seed: of the split and the order of pixels; independent of the run's seed.
    """

    class_names = tuple("0123456789")
    length = SIDE * SIDE

    def __init__(
        self,
        permuted: bool = False,
        continuous: bool = False,
        n_validation: int = 180,
        n_test: int = 360,
        split_seed: int = 0,
    ) -> None:
        if min(n_validation, n_test) < 1 or split_seed < 0:
            raise ConfigError(
                f"data.n_validation and data.n_test must be at least 1 and data.split_seed at least 0, not "
                f"{n_validation}, {n_test} and {split_seed}."
            )
        check_setting("data.split_seed", split_seed, *SEEDS)
        self.permuted, self.continuous = permuted, continuous
        self.n_validation, self.n_test, self.split_seed = n_validation, n_test, split_seed
        self.vocab_size = None if continuous else LEVELS
        self.n_channels = 1 if continuous else None
        self._parts: dict[str, LabelledRows] | None = None

    def setup(self) -> None:
        """Read the images. Raises ConfigError if none is left for training."""
        if self._parts is not None:
            return
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        if self.n_validation + self.n_test >= len(labels):
            raise ConfigError(
                f"data.n_validation and data.n_test leave no image for training: {self.n_validation} + {self.n_test} "
                f"of {len(labels)}."
            )
        if self.permuted:
            pixels = pixels[:, self.order()]
        order = np.random.default_rng((self.split_seed, 0)).permutation(len(labels))
        cuts = np.cumsum([self.n_test, self.n_validation])
        test, validation, train = np.split(order, cuts)

        def rows(members: np.ndarray) -> LabelledRows:
            chosen = torch.from_numpy(pixels[members])
            inputs = (chosen[..., None] / (LEVELS - 1)).float() if self.continuous else chosen.long()
            return LabelledRows(inputs, torch.from_numpy(labels[members]).long())

        self._parts = {"train": rows(train), "validation": rows(validation), "test": rows(test)}

    def order(self) -> np.ndarray:
        """The permuted order: position t of a sequence holds pixel `order()[t]`."""
        return np.random.default_rng((self.split_seed, 1)).permutation(self.length)

    def _part(self, split: str) -> LabelledRows:
        assert self._parts is not None, "setup comes first"
        return self._parts[split]

    def train(self) -> LabelledRows:
        return self._part("train")

    def validation(self) -> LabelledRows:
        return self._part("validation")

    def test(self) -> LabelledRows:
        return self._part("test")
