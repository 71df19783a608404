"""Induction heads (arXiv:2312.00752, section 4.1.2 and appendix E.1; the task is that of arXiv:2212.14052)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambaseq.data.drawing import below, words
from mambaseq.errors import ConfigError
from mambaseq_synthetic.drawing import DrawnAtLengths, check_sets


def draw(seed: int, items: Tensor, *, length: int = 256, vocab_size: int = 16) -> tuple[Tensor, Tensor]:
    """Random tokens in which the special token (id vocab_size - 1) occurs twice: at a random place, and at the end,
    where the target is the token that followed it.

    items: `(items,)` int64 on any device, the numbers of the sequences; sequence i depends only on (seed, i). Returns
        inputs and labels, `(items, length)` int64 each; labels are -100 except at the last position.

    >>> inputs, labels = draw(0, torch.tensor([0, 1]), length=10, vocab_size=8)
    >>> inputs.tolist()
    [[6, 3, 0, 7, 0, 2, 1, 5, 1, 7], [4, 4, 2, 7, 5, 1, 5, 1, 2, 7]]
    >>> labels[:, -1].tolist(), labels[:, :-1].unique().tolist()
    ([0, 5], [-100])
    """
    random = words(seed, items, length + 1)
    place = below(random[:, -1:], length - 2)
    inputs = below(random[:, :-1], vocab_size - 1)
    inputs.scatter_(1, place, vocab_size - 1)
    inputs[:, -1] = vocab_size - 1
    labels = torch.full_like(inputs, -100)
    labels[:, -1:] = inputs.gather(1, place + 1)
    return inputs, labels


class InductionHeadsData(DrawnAtLengths):
    """Induction heads: which token followed the special one earlier?

    Only the last token counts in the loss. Trained at one length and tested at many, to see whether the model
    generalises to unseen lengths; the metric `synthetic/accuracy_by_length` reports each.

    Args:
        length: tokens of a training and validation sequence.
        vocab_size: number of token ids, including the special one.
        test_lengths: lengths of the test sequences; `length` alone if not given.
        samples_per_epoch: training sequences that make an epoch.
        n_validation: validation sequences.
        n_test: test sequences of each length. A multiple of the batch size keeps lengths apart, so nothing is padded.
        seed: of the training sequences; validation and test sequences are the same for any seed.
    """

    def __init__(
        self,
        length: int = 256,
        vocab_size: int = 16,
        test_lengths: list[int] | None = None,
        samples_per_epoch: int = 65536,
        n_validation: int = 512,
        n_test: int = 512,
        seed: int = 0,
    ) -> None:
        self.test_lengths = [length] if test_lengths is None else test_lengths
        if not self.test_lengths or min(length, *self.test_lengths) < 3:
            raise ConfigError(
                f"data.length and data.test_lengths must be at least 3 (special token, answer, special token), not "
                f"{length} and {self.test_lengths}."
            )
        if vocab_size < 3:
            raise ConfigError(f"data.vocab_size must be at least 3 (two tokens and the special one), not {vocab_size}.")
        check_sets(seed, samples_per_epoch, n_validation, n_test, max(length, *self.test_lengths), vocab_size)
        self.length, self.vocab_size = length, vocab_size
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self.seed = seed
        self._draw = functools.partial(draw, vocab_size=vocab_size)
