"""Encoders: from a dataset's inputs to embeddings. The contract, and the encoders of tokens, of codes and of continuous
signals."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError
from mambaseq.heads.levels import level_sizes
from mambaseq.heads.reverse_complement import complement_table
from mambaseq.heads.scaling import ChannelScale
from mambaseq.ops.embedding import Embedding


class Encoder(nn.Module, abc.ABC):
    """Inputs `(batch, length)` int64, `(batch, length, codes)` int64 or `(batch, length, channels)` float to embeddings
    `(batch, length, d_model)`.

    causal: position t sees no input after t. There is no default, because next-token prediction depends on it.
    position_wise: position t sees input t alone. Only such an encoder can be run in parts, with a state (generation,
        long records), since encoders keep no state.
    takes_mask: whether `forward` takes a `mask=` of real positions, `(batch, length)` bool, because its positions
        depend on the padding after them. An encoder that is neither causal nor takes the mask gets no padded batches.
    stride: inputs for each position of the output, which has `ceil(length / stride)` positions for each sequence; those
        of packed sequences follow each other. min_length, max_length: the shortest and the longest sequence that it can
        read; None for any.
    strands: vectors of size d_model at a position (see `backbones/reverse_complement.py`).

    Another module may be an encoder too. What it does not declare, it is assumed not to do.
    """

    causal: bool
    position_wise: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False
    stride: int = 1
    min_length: int = 1
    max_length: int | None = None
    strands: ClassVar[int] = 1

    @abc.abstractmethod
    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """condition: `(sequences,)` int64. cu_seqlens: `(sequences + 1,)` int32, packs sequences into batch 1; no
        position sees an input of another sequence."""


def output_bounds(cu_seqlens: Tensor, stride: int) -> Tensor:
    """The `cu_seqlens` of packed sequences in the output of an encoder with this stride."""
    if stride == 1:
        return cu_seqlens
    words = (cu_seqlens.diff() + stride - 1) // stride
    return torch.cat([cu_seqlens.new_zeros(1), words.cumsum(0, dtype=cu_seqlens.dtype)])


class TokenEncoder(Encoder):
    """Token ids `(batch, length)` to embeddings, plus the embedding of a condition at every position.

    Args:
        d_model: width.
        vocab_size: number of token ids.
        n_conditions: number of conditions; 0 for none.
    """

    causal = True
    position_wise: ClassVar[bool] = True

    def __init__(self, d_model: int, vocab_size: int, n_conditions: int = 0) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.condition = Embedding(n_conditions, d_model) if n_conditions else None

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.embed(inputs)
        return x if condition is None else x + _condition(self.condition, condition, cu_seqlens)

    def embed(self, inputs: Tensor) -> Tensor:
        """`(batch, length, d_model)`, without a condition."""
        return self.embedding(inputs)


class CodesEncoder(TokenEncoder):
    """Several codes at each position, `(batch, length, n_codes)` int64: the sum of their embeddings, each from a table
    of its own.

    Args:
        d_model: width.
        vocab_size: number of ids of a code.
        n_codes: codes at a position.
        n_conditions: number of conditions; 0 for none.
    """

    def __init__(self, d_model: int, vocab_size: int, n_codes: int, n_conditions: int = 0) -> None:
        super().__init__(d_model, vocab_size * n_codes, n_conditions)  # the tables one after the other
        self.vocab_size, self.n_codes = vocab_size, n_codes

    def embed(self, inputs: Tensor) -> Tensor:
        first = self.vocab_size * torch.arange(self.n_codes, device=inputs.device)
        return self.embedding(inputs + first).sum(-2)


class LevelsEncoder(TokenEncoder):
    """Ids in order, such as 16-bit samples: the embedding of an id's coarse part (`id // fine`) plus that of its fine
    part (`id % fine`), plus a linear map of both as numbers.

    Args:
        d_model: width.
        vocab_size: number of ids.
        fine: ids that share a coarse part.
        n_conditions: number of conditions; 0 for none.
    """

    def __init__(self, d_model: int, vocab_size: int, fine: int = 256, n_conditions: int = 0) -> None:
        coarse = level_sizes(vocab_size, fine, "model.encoder")
        super().__init__(d_model, coarse + fine, n_conditions)  # two tables, one after the other
        self.coarse, self.fine = coarse, fine
        self.values = nn.Linear(2, d_model, bias=False)

    def embed(self, inputs: Tensor) -> Tensor:
        coarse, fine = inputs // self.fine, inputs % self.fine
        values = torch.stack([2 * coarse / self.coarse - 1, 2 * fine / self.fine - 1], -1)
        tables = self.embedding(coarse) + self.embedding(self.coarse + fine)
        return tables + self.values(values.to(self.values.weight.dtype))


class RCTokenEncoder(TokenEncoder):
    """Tokens of both strands of DNA: the embedding of each base next to that of its paired base, `(batch,
    length, 2 * d_model)` (see `backbones/reverse_complement.py`).

    Args:
        d_model: width of one strand.
        vocab_size: number of token ids.
        complement: the id that each id is paired with.
        n_conditions: number of conditions; 0 for none.
    """

    strands: ClassVar[int] = 2

    def __init__(self, d_model: int, vocab_size: int, complement: list[int], n_conditions: int = 0) -> None:
        super().__init__(d_model, vocab_size, n_conditions)
        self.complement: Tensor
        self.register_buffer("complement", complement_table(complement, vocab_size), persistent=False)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        strands = (inputs, self.complement[inputs])
        return torch.cat([super(RCTokenEncoder, self).forward(s, condition, cu_seqlens) for s in strands], dim=-1)


class SignalEncoder(Encoder):
    """A continuous signal `(batch, length, n_channels)` to embeddings, without quantising it.

    Args:
        d_model: width.
        n_channels: channels of the signal.
        n_conditions: number of conditions; 0 for none.
        channel_mean: mean of each channel, in its units: the model reads (value - mean) / std. The default is what the
            data say, otherwise the values are read as they are.
        channel_std: standard deviation of each channel, in its units.
    """

    causal = True
    position_wise: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        n_channels: int,
        n_conditions: int = 0,
        channel_mean: list[float] | None = None,
        channel_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.scale = ChannelScale(n_channels, channel_mean, channel_std)
        self.linear = nn.Linear(n_channels, d_model)
        self.condition = Embedding(n_conditions, d_model) if n_conditions else None

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.linear(self.scale(inputs).to(self.linear.weight.dtype))
        return x if condition is None else x + _condition(self.condition, condition, cu_seqlens)


def _condition(table: Embedding | None, condition: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if table is None:
        raise ConfigError(
            "A condition was given to a model without conditions. Set model.encoder.n_conditions to their number."
        )
    if cu_seqlens is None:
        return table(condition)[:, None]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return table(torch.repeat_interleave(condition, lengths))[None]
