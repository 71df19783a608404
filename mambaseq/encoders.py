"""Encoders: from a dataset's inputs to embeddings. The contract, and the encoders of tokens, of codes and of continuous
signals."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from mambaseq.conditions import NO_NUMBER, NOT_GIVEN
from mambaseq.errors import ConfigError, check_positive, shown
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
        """condition: `(sequences,)` int64, or `(sequences, conditions)` (see `Batch`). cu_seqlens: `(sequences + 1,)`
        int32, packs sequences into batch 1; no position sees an input of another sequence."""


def refuse_condition(encoder: str, condition: Tensor | None, remedy: str = "") -> None:
    """Raise ConfigError for a condition, which an encoder of this name does not take. remedy: ends the message."""
    if condition is not None:
        raise ConfigError(f"The encoder {encoder} takes no condition, but the data have some.{remedy and f' {remedy}'}")


def output_bounds(cu_seqlens: Tensor, stride: int) -> Tensor:
    """The `cu_seqlens` of packed sequences in the output of an encoder with this stride."""
    if stride == 1:
        return cu_seqlens
    words = (cu_seqlens.diff() + stride - 1) // stride
    return torch.cat([cu_seqlens.new_zeros(1), words.cumsum(0, dtype=cu_seqlens.dtype)])


_MOST = 64  # conditions of a model


class ConditionTable(Embedding):
    """What each condition adds to a sequence's embeddings: a learned vector for each name, and for a number one that
    grows with it, beside one for its being there. What is not given adds nothing, which is learned like any value.

    Args:
        d_model: width.
        n_conditions: number of names, of all conditions together.
        sizes: names of each condition; None is one condition.
        means, stds: of each number, in its units: the model reads (number - mean) / std.
        dropout: share of the training sequences that are not told their conditions; of several, each is kept from as
            many sequences more.
    """

    def __init__(
        self,
        d_model: int,
        n_conditions: int,
        sizes: list[int] | None = None,
        means: list[float] | None = None,
        stds: list[float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        sizes = ([n_conditions] if n_conditions else []) if sizes is None else list(sizes)
        means, stds = list(means or ()), list(stds or ())
        if len(sizes) + len(means) > _MOST:
            raise ConfigError(f"A model has at most {_MOST} conditions, not {len(sizes) + len(means)}.")
        if sum(sizes) != n_conditions or any(size < 1 for size in sizes):
            raise ConfigError(
                f"condition_sizes must be counts that add up to n_conditions ({n_conditions}), not {shown(sizes)}."
            )
        if len(means) != len(stds):
            raise ConfigError(f"condition_means and condition_stds must be as many, not {len(means)} and {len(stds)}.")
        for std in stds:
            check_positive("condition_stds", std=std)
        if not 0 <= dropout < 1:
            raise ConfigError(f"condition_dropout must be at least 0 and below 1, not {dropout}.")
        super().__init__(n_conditions, d_model)
        self.sizes, self.means, self.stds, self.dropout = sizes, means, stds, dropout
        if self.means:
            self.slopes = nn.Parameter(torch.randn(len(self.means), d_model))
            self.there = nn.Parameter(torch.zeros(len(self.means), d_model))

    @property
    def single(self) -> bool:
        """Whether a condition is an id alone."""
        return len(self.sizes) == 1 and not self.means

    def forward(self, condition: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """condition: see `Batch`; or what this gave before, which is taken as it is. Gives `(sequences, d_model)`; with
        `cu_seqlens` `(positions, d_model)`.

        Raises ConfigError for another number of conditions than the model's, IndexError for an id beyond them (on a
        CPU; otherwise the ids are trusted).
        """
        if condition.is_floating_point():
            return _spread(condition, cu_seqlens)
        plain = condition.dim() == 1 and self.single
        if plain and not self.dropout:
            return super().forward(_spread(condition, cu_seqlens))
        rows = condition[:, None] if plain else condition
        if rows.dim() != 2 or rows.shape[1] != len(self.sizes) + len(self.means):
            raise ConfigError(
                f"The model has {len(self.sizes) + len(self.means)} conditions ({len(self.sizes)} of names and "
                f"{len(self.means)} numbers), but {tuple(condition.shape)} were given: a row of as many is needed."
                f"{_JOINED if self.single else ''}"
            )
        rows = _spread(self._kept(rows), cu_seqlens)
        x = self.weight.new_zeros(len(rows), self.embedding_dim)
        first = 0
        for which, size in zip(rows[:, : len(self.sizes)].unbind(1), self.sizes, strict=True):
            if which.device.type == "cpu" and not torch.compiler.is_compiling() and bool((which >= size).any()):
                raise IndexError(f"A condition's id is {int(which.max())}, but there are {size} names.")
            found = super().forward(which.clamp(min=0) + first)
            x, first = x + torch.where((which >= 0)[:, None], found, 0.0), first + size
        numbers = rows[:, len(self.sizes) :].view(torch.float64)
        for i, (value, mean, std) in enumerate(zip(numbers.unbind(1), self.means, self.stds, strict=True)):
            there = ~value.isnan()
            scaled = torch.where(there, (value - mean) / std, 0.0).to(x.dtype)
            x = x + torch.where(there[:, None], scaled[:, None] * self.slopes[i] + self.there[i], 0.0)
        return x

    def _kept(self, rows: Tensor) -> Tensor:
        """The rows without what dropout keeps from the model."""
        if not (self.training and self.dropout):
            return rows
        drawn = torch.rand(len(rows), 1 + rows.shape[1], device=rows.device) < self.dropout
        dropped = drawn[:, :1].expand_as(rows) if rows.shape[1] == 1 else drawn[:, :1] | drawn[:, 1:]
        split = len(self.sizes)
        names = torch.where(dropped[:, :split], NOT_GIVEN, rows[:, :split])
        return torch.cat([names, torch.where(dropped[:, split:], NO_NUMBER, rows[:, split:])], 1)


_JOINED = (
    " A model of an earlier version, which made one condition of several, can still generate and predict, but its run "
    "cannot go on, since its data keep them apart now."
)


def condition_table(
    d_model: int,
    n_conditions: int,
    sizes: list[int] | None,
    means: list[float] | None,
    stds: list[float] | None,
    dropout: float,
) -> ConditionTable | None:
    """See `ConditionTable`; None without conditions."""
    if not n_conditions and not sizes and not means and not stds:
        return None
    return ConditionTable(d_model, n_conditions, sizes, means, stds, dropout)


class TokenEncoder(Encoder):
    """Token ids `(batch, length)` to embeddings, plus what the conditions add at every position.

    Args:
        d_model: width.
        vocab_size: number of token ids.
        n_conditions: number of names of all conditions; 0 for none.
        condition_sizes: names of each condition. None: they are one condition's.
        condition_means: mean of each condition that is a number, in its units.
        condition_stds: standard deviation of each.
        condition_dropout: share of the training sequences that are not told their conditions, so that the model learns
            to do without; of several, each is kept from as many sequences more.
    """

    causal = True
    position_wise: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        n_conditions: int = 0,
        condition_sizes: list[int] | None = None,
        condition_means: list[float] | None = None,
        condition_stds: list[float] | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.condition = condition_table(
            d_model, n_conditions, condition_sizes, condition_means, condition_stds, condition_dropout
        )

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
        n_conditions: number of names of all conditions; 0 for none.
        condition_sizes: names of each condition. None: they are one condition's.
        condition_means: mean of each condition that is a number, in its units.
        condition_stds: standard deviation of each.
        condition_dropout: share of the training sequences that are not told their conditions, so that the model learns
            to do without; of several, each is kept from as many sequences more.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        n_codes: int,
        n_conditions: int = 0,
        condition_sizes: list[int] | None = None,
        condition_means: list[float] | None = None,
        condition_stds: list[float] | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        vectors = vocab_size * n_codes  # the tables one after the other
        super().__init__(
            d_model, vectors, n_conditions, condition_sizes, condition_means, condition_stds, condition_dropout
        )
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
        n_conditions: number of names of all conditions; 0 for none.
        condition_sizes: names of each condition. None: they are one condition's.
        condition_means: mean of each condition that is a number, in its units.
        condition_stds: standard deviation of each.
        condition_dropout: share of the training sequences that are not told their conditions, so that the model learns
            to do without; of several, each is kept from as many sequences more.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        fine: int = 256,
        n_conditions: int = 0,
        condition_sizes: list[int] | None = None,
        condition_means: list[float] | None = None,
        condition_stds: list[float] | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        coarse = level_sizes(vocab_size, fine, "model.encoder")
        vectors = coarse + fine  # two tables, one after the other
        super().__init__(
            d_model, vectors, n_conditions, condition_sizes, condition_means, condition_stds, condition_dropout
        )
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
        n_conditions: number of names of all conditions; 0 for none.
        condition_sizes: names of each condition. None: they are one condition's.
        condition_means: mean of each condition that is a number, in its units.
        condition_stds: standard deviation of each.
        condition_dropout: share of the training sequences that are not told their conditions, so that the model learns
            to do without; of several, each is kept from as many sequences more.
    """

    strands: ClassVar[int] = 2

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        complement: list[int],
        n_conditions: int = 0,
        condition_sizes: list[int] | None = None,
        condition_means: list[float] | None = None,
        condition_stds: list[float] | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            d_model, vocab_size, n_conditions, condition_sizes, condition_means, condition_stds, condition_dropout
        )
        self.complement: Tensor
        self.register_buffer("complement", complement_table(complement, vocab_size), persistent=False)

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        both = [self.embed(strand) for strand in (inputs, self.complement[inputs])]
        if condition is not None:
            added = _condition(self.condition, condition, cu_seqlens)
            both = [strand + added for strand in both]
        return torch.cat(both, dim=-1)


class SignalEncoder(Encoder):
    """A continuous signal `(batch, length, n_channels)` to embeddings, without quantising it.

    Args:
        d_model: width.
        n_channels: channels of the signal.
        n_conditions: number of names of all conditions; 0 for none.
        channel_mean: mean of each channel, in its units: the model reads (value - mean) / std. The default is what the
            data say, otherwise the values are read as they are.
        channel_std: standard deviation of each channel, in its units.
        condition_sizes: names of each condition. None: they are one condition's.
        condition_means: mean of each condition that is a number, in its units.
        condition_stds: standard deviation of each.
        condition_dropout: share of the training sequences that are not told their conditions, so that the model learns
            to do without; of several, each is kept from as many sequences more.
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
        condition_sizes: list[int] | None = None,
        condition_means: list[float] | None = None,
        condition_stds: list[float] | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale = ChannelScale(n_channels, channel_mean, channel_std)
        self.linear = nn.Linear(n_channels, d_model)
        self.condition = condition_table(
            d_model, n_conditions, condition_sizes, condition_means, condition_stds, condition_dropout
        )

    def forward(self, inputs: Tensor, condition: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.linear(self.scale(inputs).to(self.linear.weight.dtype))
        return x if condition is None else x + _condition(self.condition, condition, cu_seqlens)


def settled(encoder: nn.Module, condition: Tensor | None) -> Tensor | None:
    """A condition as an encoder in eval mode takes it too: of several conditions what they add, `(sequences, d_model)`,
    so that it is not made again at each step."""
    table = getattr(encoder, "condition", None)
    if condition is None or not isinstance(table, ConditionTable) or table.single:
        return condition
    made: Tensor = table(condition)
    return made


def _condition(table: ConditionTable | None, condition: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What conditions add, `(batch, 1, d_model)`, or `(1, positions, d_model)` of packed sequences."""
    if table is None:
        raise ConfigError(
            "A condition was given to a model without conditions. Set model.encoder.n_conditions to their number."
        )
    return table(condition, cu_seqlens)[:, None] if cu_seqlens is None else table(condition, cu_seqlens)[None]


def _spread(condition: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each position of packed sequences."""
    if cu_seqlens is None:
        return condition
    return torch.repeat_interleave(condition, (cu_seqlens[1:] - cu_seqlens[:-1]).long(), dim=0)
