"""Embeddings of bases with their neighbours: words of k bases, and a convolution."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.encoders import Encoder, output_bounds, refuse_condition
from mambaseq.errors import ConfigError
from mambaseq.ops import sequences
from mambaseq.ops.embedding import Embedding

N = 4  # its id in mambaseq_dna.tokenizer


class KmerEncoder(Encoder):
    """Bases `(batch, length)` to embeddings of the k-mers that begin at every `stride`-th base.

    K-mers are computed here from base tokens, so data, windows and predictions stay in bases, while the backbone sees
    `ceil(length / stride)` positions. A position looks ahead by k - 1 bases, so the encoder is for classifiers, not for
    next-base models. Words with an N, or that extend past their sequence's end, share one embedding.

    Args:
        d_model: width.
        k: bases a word; the table has 4^k + 1 rows.
        stride: bases from one word to the next.
    """

    takes_mask: ClassVar[bool] = True

    def __init__(self, d_model: int, k: int = 6, stride: int = 3) -> None:
        super().__init__()
        if not 1 <= k <= 12 or not 1 <= stride <= k:
            raise ConfigError(f"The k-mer encoder needs 1 <= stride <= k <= 12, not k {k} and stride {stride}.")
        self.k, self.stride = k, stride
        self.causal = k == 1
        self.min_length = k  # a shorter window has no word
        self.embedding = Embedding(4**k + 1, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def words(self, inputs: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(batch, length)` base ids to `(batch, ceil(length / stride))` word ids; 4^k for words with an N or past the
        end. For packed sequences the words follow each other; if the stride is not 1, the host reads their number."""
        bases = inputs if mask is None else inputs.masked_fill(~mask, N)
        step = self.stride if cu_seqlens is None else 1
        windows = F.pad(bases, (0, self.k - 1), value=N).unfold(1, self.k, step)
        place = 4 ** torch.arange(self.k - 1, -1, -1, device=inputs.device)
        none = (windows >= N).any(-1)
        if cu_seqlens is not None:
            length = inputs.shape[1]
            sequences.check(cu_seqlens, len(inputs), length)
            left = cu_seqlens[1:][sequences.of_positions(cu_seqlens, length)] - torch.arange(
                length, device=inputs.device
            )
            none = none | (left < self.k)
        words = torch.where(none, 4**self.k, (windows * place).sum(-1))
        if cu_seqlens is None or self.stride == 1:
            return words
        bounds = output_bounds(cu_seqlens, self.stride)
        number = torch.arange(int(bounds[-1]), device=inputs.device)
        owner = sequences.of_positions(bounds, len(number))
        return words[:, cu_seqlens[owner] + (number - bounds[owner]) * self.stride]

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        refuse_condition("dna/kmer", condition, "Use the encoder tokens.")
        return self.embedding(self.words(inputs, cu_seqlens, mask))


class ConvEncoder(Encoder):
    """Bases `(batch, length)` to embeddings that see `width` bases around each: a convolution over one-hot bases, GELU,
    and a linear map.

    It looks ahead, so it is for classifiers and masked models. What lies outside of a sequence counts as no base.

    Args:
        d_model: width of the embeddings.
        vocab_size: number of token ids.
        width: bases that a position sees, an odd number.
        positions: for windows of one length (promoters around their start): a learned vector is added at each of so
            many positions; 0 for none. Longer sequences are refused.
    """

    takes_mask: ClassVar[bool] = True
    causal = False

    def __init__(self, d_model: int, vocab_size: int, width: int = 11, positions: int = 0) -> None:
        super().__init__()
        if not (1 <= width <= 101 and width % 2) or not 0 <= positions <= 2**20:
            raise ConfigError(
                f"The encoder dna/conv needs an odd width up to 101, and up to 2^20 positions, not width {width} and "
                f"positions {positions}."
            )
        self.vocab_size, self.width, self.positions = vocab_size, width, positions
        self.max_length = positions or None
        self.filters = nn.Linear(width * vocab_size, d_model)
        self.linear = nn.Linear(d_model, d_model)
        self.position = nn.Parameter(torch.zeros(positions, d_model)) if positions else None

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Raises ConfigError for a condition, and for sequences of more than `positions`."""
        refuse_condition("dna/conv", condition, "Use the encoder tokens.")
        length, reach = inputs.shape[1], self.width // 2
        if self.positions and length > self.positions and cu_seqlens is None:
            raise ConfigError(
                f"The encoder dna/conv has {self.positions} positions (model.encoder.positions), and was given "
                f"{length}. Give windows of that length, or set positions to 0."
            )
        outside = self.vocab_size  # no base
        bases = inputs if mask is None else inputs.masked_fill(~mask, outside)
        around = F.pad(bases, (reach, reach), value=outside).unfold(1, self.width, 1)  # (batch, length, width)
        place = torch.arange(length, device=inputs.device)
        if cu_seqlens is not None:
            sequences.check(cu_seqlens, len(inputs), length)
            of = sequences.of_positions(cu_seqlens, length)
            near = place[:, None] + torch.arange(-reach, reach + 1, device=inputs.device)
            within = (near >= cu_seqlens[of][:, None]) & (near < cu_seqlens[of + 1][:, None])
            around = around.masked_fill(~within, outside)
            place = place - cu_seqlens[of]
        one_hot = around[..., None] == torch.arange(self.vocab_size, device=inputs.device)
        x = self.linear(F.gelu(self.filters(one_hot.flatten(2).to(self.filters.weight.dtype))))
        if self.position is None:
            return x
        return x + self.position[place.clamp(max=self.positions - 1)]
