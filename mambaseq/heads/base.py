"""The contract of heads, and pooling."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq import parallel
from mambaseq.errors import ConfigError

Pool = Literal["mean", "max", "last", "first"]
Kind = Literal["labels", "multilabels", "values"]


class Head(nn.Module, abc.ABC):
    """Turns a backbone's output into predictions and a loss.

    per_token: whether it predicts for each position instead of each sequence.
    learns: what its targets are (see `Batch.kind`): "labels" (int64, one of several classes), "multilabels" (int64,
        whether each of several labels applies) or "values" (float32); None if a plugin's head does not say.
    continues: what it can continue a sequence with: "tokens", "values", or "" for neither; None if a plugin's head does
        not say.
    stride: positions that share a prediction; see `Batch.stride`.
    strands: vectors of d_model at a position (see `backbones/reverse_complement.py`).
    codes: labels that it predicts at each position, where they are several (see `Batch.target_of`); otherwise 0.
    n_labels: classes of a label; None for those of its map `linear`.
    position_wise: whether what it says of a position depends on nothing else, so that positions may be given in parts.
    splits_time: whether it can be given a rank's part of sequences that are split along time (see `mambaseq.parallel`)
        although it is not position-wise, because all that it knows of a sequence comes from `pool`.
    """

    per_token: ClassVar[bool]
    learns: ClassVar[Kind | None] = None
    continues: ClassVar[Literal["tokens", "values", ""] | None] = None
    stride: int = 1
    strands: ClassVar[int] = 1
    codes: int = 0
    n_labels: int | None = None
    position_wise: ClassVar[bool] = False
    splits_time: ClassVar[bool] = False

    @abc.abstractmethod
    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, strands * d_model)` to (loss, logits), the loss None without labels.

        The loss is the mean over the batch's known targets (labels that are not -100, values that are not NaN;
        `Batch.n_targets` is their number, by which batches are weighted). Without any it is 0, with gradients of 0."""

    def told(self, hidden: Tensor) -> Tensor:
        """What `draw` needs to know of the next tokens: the logits, `(batch, length, ...)` fp32. In generation this is
        what a step gives. A head whose logits are costly may give less."""
        _, logits = self(hidden)
        assert logits is not None
        return logits

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden `(batch, d_model)`, of one position, to its likeliest token `(batch,)` int64 and that one's logit
        `(batch,)` fp32, which is not finite if one of the logits is NaN. For heads that pick one token."""
        peak, chosen = self.told(hidden[:, None])[:, -1].max(-1)
        return chosen, peak

    def draw(self, told: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The next token of each sequence, `(batch,)` int64, or its codes, `(batch, codes)`.

        told: `(batch, ...)`, of one position. pick: chooses by logits `(batch, n)`, as `(batch,)` int64. It may be
        called several times, each time with logits that are given what was picked before."""
        return pick(told)

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Nats of the labels of each position, `(batch, length)` fp32; 0 where a label is -100."""
        logits = self.told(hidden)
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def labels_of(self, ids: Tensor) -> Tensor:
        """Ids as labels: -100 for those that are never predicted."""
        return ids


def check_targets(head: Head, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless labels have the head's type (floats or integers) and this shape. Reads no values."""
    kind = "values" if labels.is_floating_point() else "labels"
    learns = "labels" if head.learns == "multilabels" else head.learns
    if kind == learns and len(shape) > 1 and labels.shape[:-1] == shape[:-1] and labels.shape[-1] != shape[-1]:
        several = f"{labels.shape[-1]} {kind} for each sequence, position or bin"
        channels = hasattr(head, "n_channels")
        remedy = {
            "values": "Give the next values of all channels (n_channels)" if channels else "Set model.head.n_outputs",
            "multilabels": "Name the data's labels (class_names)",
        }
        if head.learns in remedy:
            raise ConfigError(
                f"{type(head).__name__} predicts {shape[-1]}, but the data's targets are {several}. "
                f"{remedy[head.learns]} to fit, or choose other data."
            )
    if kind != learns or tuple(labels.shape) != shape:
        raise ConfigError(
            f"{type(head).__name__} learns {learns} {shape}, but the targets are {kind} {tuple(labels.shape)}. Choose "
            "a head that fits the data (`mambaseq list heads`), or other data."
        )


def pool(hidden: Tensor, how: Pool, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """One vector for each sequence: `(sequences, d_model)` fp32 from hidden `(batch, length, d_model)`.

    mean: over the real positions (mask, right padding), or over each packed sequence. max: the largest of each feature
        there. last: the last real position. first: position 0. An empty packed sequence gives zeros.
    Of sequences that are split over ranks it is that of whole ones, on every rank.
    """
    if (part := parallel.current()) is not None and part.context.size > 1:
        return _pool_of_parts(part, hidden, how, mask)
    if cu_seqlens is not None:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        if how in ("last", "first"):
            ends = cu_seqlens[1:].long() - 1 if how == "last" else cu_seqlens[:-1].long()
            rows = hidden[0, ends.clamp(0, hidden.shape[1] - 1)].float()
            return torch.where(lengths[:, None] > 0, rows, 0.0)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        total = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
        if how == "max":
            of = owner[:, None].expand(-1, hidden.shape[-1])
            return total.scatter_reduce(0, of, hidden[0].float(), "amax", include_self=False)
        return total.index_add(0, owner, hidden[0].float()) / lengths.clamp(min=1)[:, None]
    if how == "first":
        return hidden[:, 0].float()
    if mask is None:
        if how == "max":
            return hidden.float().amax(1)
        return hidden.float().mean(1) if how == "mean" else hidden[:, -1].float()
    lengths = mask.sum(1)
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), (lengths - 1).clamp(min=0)].float()
    if how == "max":
        return hidden.float().masked_fill(~mask[..., None], -torch.inf).amax(1)
    return (hidden.float() * mask[..., None]).sum(1) / lengths.clamp(min=1)[:, None]


def _pool_of_parts(part: parallel.Part, hidden: Tensor, how: Pool, mask: Tensor | None) -> Tensor:
    """See `pool`; hidden `(batch, length, d_model)` and the mask are this rank's."""
    device, n, bounds = hidden.device, part.n_sequences, part.bounds
    here = part.positions(device)
    row = torch.arange(len(hidden), device=device)[:, None]  # (batch, 1)
    if bounds is None:
        owner = row.expand(hidden.shape[:2])  # the sequence of each position, (batch, length)
    else:
        starts = torch.tensor(bounds, device=device)
        owner = torch.searchsorted(starts[1:], here, right=True)[None]
    real = torch.ones_like(owner, dtype=torch.bool) if mask is None else mask

    def summed(x: Tensor) -> Tensor:
        """Over the positions of each sequence; a GPU adds to few places one after the other, so only where packed."""
        return x.sum(1) if bounds is None else x.new_zeros(n, *x.shape[2:]).index_add(0, owner[0], x[0])

    counts = part.context.sum(summed(real.long()))
    wide = hidden.float()
    if how == "mean":
        return part.context.add(summed(wide * real[..., None])) / counts.clamp(min=1)[:, None]
    if how == "max":
        wide = wide.masked_fill(~real[..., None], -torch.inf)
        least = wide.new_full((n, hidden.shape[-1]), -torch.inf)
        of = owner.flatten()[:, None].expand(-1, hidden.shape[-1])
        own = wide.amax(1) if bounds is None else least.scatter_reduce(0, of, wide[0], "amax")
        holds = (own == part.context.largest(own)) & (counts > 0)[:, None]
        return part.context.add(torch.where(holds, own, 0.0)) / part.context.sum(holds.float()).clamp(min=1)
    begin = counts.new_zeros(n) if bounds is None else starts[:-1]
    wanted = begin if how == "first" else begin + counts - 1
    at = torch.searchsorted(here, wanted.clamp(min=0)).clamp(max=len(here) - 1)
    owned = (here[at] == wanted) & (counts > 0)
    found = wide[torch.arange(n, device=device) if bounds is None else 0, at]  # (sequences, d_model)
    return part.context.add(torch.where(owned[:, None], found, 0.0))
