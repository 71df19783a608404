"""Random tokens: how fast a model trains does not depend on them."""

from __future__ import annotations

import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData


class Random:
    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, self.vocab_size, (1, self.length + 1), generator=generator)
        return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])


class RandomTokens(SequenceData):
    """Sequences of random tokens, a million of them.

    Args:
        vocab_size: how many tokens there are.
        length: tokens a sequence.
    """

    def __init__(self, vocab_size: int = 50280, length: int = 2048) -> None:
        self.vocab_size, self.length = vocab_size, length

    def setup(self) -> None:
        pass

    def train(self) -> Random:
        return Random(self.vocab_size, self.length)

    def validation(self) -> None:
        return None

    def test(self) -> None:
        return None
