"""Associative recall of several keys (MQAR: Arora et al., "Zoology", arXiv:2312.04927, section 3.2)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambaseq.data.drawing import below, distinct, words
from mambaseq.errors import ConfigError
from mambaseq_synthetic.drawing import DrawnAtLengths, check_sets

BLANK = 0


def draw(
    seed: int, items: Tensor, *, length: int = 256, n_pairs: int = 16, vocab_size: int = 8192
) -> tuple[Tensor, Tensor]:
    """Pairs of a key (ids 1 to vocab_size / 2 - 1, different ones) and a value (the ids above), in random order; then
    blanks (id 0), and each key once more at a random place among them, where the target is its value.

    items: `(items,)` int64 on any device, the numbers of the sequences; sequence i depends only on (seed, i). Returns
        inputs and labels, `(items, length)` int64 each; labels are -100 except at the keys that are asked for.

    >>> inputs, labels = draw(0, torch.tensor([0]), length=10, n_pairs=2, vocab_size=8)
    >>> inputs.tolist(), labels.tolist()
    ([[3, 4, 1, 7, 0, 3, 0, 0, 0, 1]], [[-100, -100, -100, -100, -100, 4, -100, -100, -100, 7]])
    """
    half = vocab_size // 2
    random = words(seed, items, 5 * n_pairs).unflatten(1, (5, n_pairs))
    order, asked = (random[:, number].argsort(dim=1) for number in (0, 1))
    keys = 1 + distinct(random[:, 2], half - 1).gather(1, order)
    values = half + below(random[:, 3], vocab_size - half)
    places = 2 * n_pairs + distinct(random[:, 4], length - 2 * n_pairs)
    inputs = torch.full((len(items), length), BLANK, device=items.device)
    inputs[:, : 2 * n_pairs] = torch.stack([keys, values], dim=2).flatten(1)
    inputs.scatter_(1, places, keys.gather(1, asked))
    labels = torch.full_like(inputs, -100).scatter_(1, places, values.gather(1, asked))
    return inputs, labels


class RecallData(DrawnAtLengths):
    """Which value went with each key? As many keys are asked for as there are, so that a state must hold them all.

    Trained at one length and tested at many; the metric `synthetic/accuracy_by_length` reports each.

    Args:
        length: tokens of a training and validation sequence.
        n_pairs: pairs of a key and a value.
        vocab_size: token ids: a blank, keys and values.
        test_lengths: lengths of the test sequences; `length` alone if not given.
        samples_per_epoch: training sequences that make an epoch.
        n_validation: validation sequences.
        n_test: test sequences of each length. A multiple of the batch size keeps lengths apart, so nothing is padded.
        seed: of the training sequences; validation and test sequences are the same for any seed.
    """

    def __init__(
        self,
        length: int = 256,
        n_pairs: int = 16,
        vocab_size: int = 8192,
        test_lengths: list[int] | None = None,
        samples_per_epoch: int = 65536,
        n_validation: int = 512,
        n_test: int = 512,
        seed: int = 0,
    ) -> None:
        self.test_lengths = [length] if test_lengths is None else test_lengths
        if n_pairs < 1 or not self.test_lengths or min(length, *self.test_lengths) < 3 * n_pairs:
            raise ConfigError(
                f"data.length and data.test_lengths must be at least three times data.n_pairs (key, value, the key "
                f"again), which is at least 1; they are {length}, {self.test_lengths} and {n_pairs}."
            )
        if vocab_size // 2 - 1 < n_pairs:
            raise ConfigError(
                f"data.vocab_size must be at least {2 * n_pairs + 2} for {n_pairs} pairs (a blank and keys in "
                f"one half, values in the other), not {vocab_size}."
            )
        check_sets(seed, samples_per_epoch, n_validation, n_test, max(length, *self.test_lengths), vocab_size)
        self.length, self.n_pairs, self.vocab_size, self.seed = length, n_pairs, vocab_size, seed
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self._draw = functools.partial(draw, n_pairs=n_pairs, vocab_size=vocab_size)
