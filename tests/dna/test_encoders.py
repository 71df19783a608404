"""Words of bases, by hand."""

from __future__ import annotations

import torch
from mambaseq_dna.encoders import KmerEncoder

NONE = 16  # 4^2


def words(encoder: KmerEncoder, *arguments) -> list[list[int]]:
    return encoder.words(*arguments).tolist()


def test_words_end_with_their_sequence() -> None:
    """ACGTNACA: AC 1, CG 6, GT 11, no word of TN and NA, AC, CA 4, and none that reaches over the end."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]])
    each, second = KmerEncoder(8, k=2, stride=1), KmerEncoder(8, k=2, stride=2)
    assert words(each, ids) == [[1, 6, 11, NONE, NONE, 1, 4, NONE]]
    assert words(second, ids) == [[1, 11, NONE, 4]]
    # three sequences in one row: ACG, T, NACA, and an empty one between them
    bounds = torch.tensor([0, 3, 4, 4, 8], dtype=torch.int32)
    assert words(each, ids, bounds) == [[1, 6, NONE, NONE, NONE, 1, 4, NONE]]
    assert words(second, ids, bounds) == [[1, NONE, NONE, NONE, 4]]
    mask = torch.tensor([[True] * 3 + [False] * 5])
    assert words(each, ids, None, mask) == [[1, 6] + [NONE] * 6]
    assert words(second, ids, None, mask) == [[1] + [NONE] * 3]


def test_the_encoder_says_that_it_looks_ahead() -> None:
    assert not KmerEncoder(8, k=2, stride=1).causal
    assert KmerEncoder(8, k=1, stride=1).causal
