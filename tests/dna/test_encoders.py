"""Words of bases, by hand."""

from __future__ import annotations

import pytest
import torch
from mambaseq_dna.encoders import ConvEncoder, KmerEncoder
from mambaseq_dna.frames import frame_features
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.errors import ConfigError

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


def test_the_convolution_equals_pytorchs() -> None:
    """The filters over one-hot bases, as a convolution with zeros around the sequence."""
    encoder = ConvEncoder(8, vocab_size=5, width=5, positions=12)
    torch.nn.init.normal_(encoder.position)
    ids = torch.randint(0, 5, (2, 12))
    one_hot = torch.nn.functional.one_hot(ids, 5).float().transpose(1, 2)  # (batch, 5, length)
    weight = encoder.filters.weight.view(8, 5, 5).transpose(1, 2)  # (d_model, vocab_size, width)
    convolved = torch.nn.functional.conv1d(one_hot, weight, encoder.filters.bias, padding=2).transpose(1, 2)
    expected = encoder.linear(torch.nn.functional.gelu(convolved)) + encoder.position
    torch.testing.assert_close(encoder(ids), expected)
    with pytest.raises(ConfigError, match="has 12 positions"):
        encoder(torch.zeros(1, 13, dtype=torch.int64))


def test_reading_frames_by_hand() -> None:
    """TAA CCC ATG GGG TGA: an open frame of four codons, from the stop at 0 to the one at 12, with its ATG at 6."""
    ids = torch.from_numpy(BaseTokenizer().encode("TAACCCATGGGGTGA").copy()).long()[None]
    features = frame_features(ids)[0]
    logs = torch.expm1(features * 8).round().int()
    for base in range(15):
        back = base % 3  # the codon in this frame began so many bases before
        length, reach, left = logs[base, 4 * back : 4 * back + 3].tolist()
        started = bool(features[base, 4 * back + 3])
        codon = base - back
        assert (length, left) == ((3, 0) if codon == 0 else (12, 12 - codon))
        assert (reach, started) == ((6, True) if codon >= 6 else (0, False))
    turned = frame_features(torch.where(ids < 4, 3 - ids, ids).flip(1))[0].flip(0)
    torch.testing.assert_close(torch.cat([turned[:, 12:], turned[:, :12]], 1), features)
