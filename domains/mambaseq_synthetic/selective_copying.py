"""Selective copying (arXiv:2312.00752, section 4.1.1 and appendix E.1)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambaseq.data.drawing import below, distinct, words
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq_synthetic.drawing import TEST, VALIDATION, DrawnSet, check_sets

NOISE = 0


def draw(
    seed: int, items: Tensor, *, length: int = 4096, n_data: int = 16, vocab_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Sequences of noise (id 0) with `n_data` data tokens (ids 1 to vocab_size - 2) at random places, and `n_data`
    markers (id vocab_size - 1) at the end, where the targets are the data tokens in order.

    items: `(items,)` int64 on any device, the numbers of the sequences; sequence i depends only on (seed, i). Returns
        inputs and labels, `(items, length)` int64 each; labels are -100 except at the markers.

    >>> inputs, labels = draw(0, torch.tensor([0, 1]), length=12, n_data=3, vocab_size=6)
    >>> inputs.tolist()
    [[4, 0, 2, 0, 0, 0, 1, 0, 0, 5, 5, 5], [0, 3, 0, 0, 3, 0, 2, 0, 0, 5, 5, 5]]
    >>> labels[:, -3:].tolist()
    [[4, 2, 1], [3, 3, 2]]
    >>> labels[:, :-3].unique().tolist()
    [-100]
    """
    random = words(seed, items, 2 * n_data)
    data = 1 + below(random[:, :n_data], vocab_size - 2)
    places = distinct(random[:, n_data:], length - n_data)
    inputs = torch.full((len(items), length), NOISE, device=items.device)
    inputs.scatter_(1, places, data)
    inputs[:, -n_data:] = vocab_size - 1
    labels = torch.full_like(inputs, -100)
    labels[:, -n_data:] = data
    return inputs, labels


class SelectiveCopyingData(SequenceData):
    """Selective copying: data tokens are at random places among noise, and must be repeated in order at the end.

    A time-invariant model cannot do it: which inputs to remember depends on their values, not on their times. The
    metrics `token_accuracy` and `synthetic/sequence_accuracy` count only the data tokens.

    Args:
        length: tokens of a sequence, including the markers at its end.
        n_data: data tokens of a sequence.
        vocab_size: token ids: noise, data tokens and the marker.
        samples_per_epoch: training sequences that make an epoch.
        n_validation: validation sequences.
        n_test: test sequences.
        seed: of the training sequences; validation and test sequences are the same for any seed.
    """

    def __init__(
        self,
        length: int = 4096,
        n_data: int = 16,
        vocab_size: int = 16,
        samples_per_epoch: int = 65536,
        n_validation: int = 256,
        n_test: int = 1024,
        seed: int = 0,
    ) -> None:
        if n_data < 1 or length < 2 * n_data:
            raise ConfigError(
                f"data.length must be at least twice data.n_data, which is at least 1; they are {length} and {n_data}."
            )
        if vocab_size < 4:
            raise ConfigError(f"data.vocab_size must be at least 4 (noise, two data tokens, marker), not {vocab_size}.")
        check_sets(seed, samples_per_epoch, n_validation, n_test, length, vocab_size)
        self.length, self.vocab_size = length, vocab_size
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self.seed = seed
        self._draw = functools.partial(draw, length=length, n_data=n_data, vocab_size=vocab_size)

    def setup(self) -> None:
        """Nothing is read."""

    def _set(self, seed: int, size: int, endless: bool = False) -> DrawnSet:
        return DrawnSet(self._draw, seed, size, endless=endless)

    def train(self) -> DrawnSet:
        return self._set(self.seed, self.samples_per_epoch, endless=True)

    def validation(self) -> DrawnSet:
        return self._set(VALIDATION, self.n_validation)

    def test(self) -> DrawnSet:
        return self._set(TEST, self.n_test)
