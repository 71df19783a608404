"""Embeddings of words of bases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError

N = 4  # its id in mambaseq_dna.tokenizer


class KmerEncoder(nn.Module):
    """Bases `(batch, length)` to embeddings of the k-mers that begin at every `stride`-th base.

    The k-mer is read off the base tokens here, so data, windows and predictions stay in bases while the backbone sees
    `ceil(length / stride)` positions. Positions look ahead by k - 1 bases: for classifiers, not for next-base models.
    A word with an N, or that reaches over the end, has an embedding of its own.

    Args:
        d_model: width.
        k: bases a word; the table has 4^k + 1 rows.
        stride: bases from one word to the next.
    """

    def __init__(self, d_model: int, k: int = 6, stride: int = 3) -> None:
        super().__init__()
        if not 1 <= k <= 12 or not 1 <= stride <= k:
            raise ConfigError(f"The k-mer encoder needs 1 <= stride <= k <= 12, not k {k} and stride {stride}.")
        self.k, self.stride = k, stride
        self.min_length = k  # a shorter window has no word
        self.embedding = nn.Embedding(4**k + 1, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def words(self, inputs: Tensor) -> Tensor:
        """`(batch, length)` base ids to `(batch, ceil(length / stride))` word ids; 4^k for words that are none."""
        windows = F.pad(inputs, (0, self.k - 1), value=N).unfold(1, self.k, self.stride)
        place = 4 ** torch.arange(self.k - 1, -1, -1, device=inputs.device)
        return torch.where((windows >= N).any(-1), 4**self.k, (windows * place).sum(-1))

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        if condition is not None:
            raise ValueError("The k-mer encoder takes no condition.")
        return self.embedding(self.words(inputs))
