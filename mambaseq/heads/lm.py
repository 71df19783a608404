"""Predicts a token at each position: the next or a masked one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Kind, check_targets
from mambaseq.heads.losses import label_loss
from mambaseq.ops import linear_cross_entropy
from mambaseq.ops.decoding.gpu import can_choose, likeliest
from mambaseq.ops.eager import is_eager
from mambaseq.ops.linear import apply_linear, is_plain


class LMHead(Head):
    """Linear map to the vocabulary, and cross-entropy over the labels that are not -100.

    The weight may be the embedding's own (tied): `SequenceModel` does this by assigning it.

    Args:
        d_model: width of the backbone's output.
        vocab_size: number of token ids.
        most_labels: labels that a sequence of a batch has at most (all of a packed batch are one), where they are few,
            as in answers to long questions: where no logits are asked for, the loss is computed of so many positions
            only, which a GPU cannot count for itself without being waited for. None for all positions.
    """

    per_token: ClassVar[bool] = True
    learns: ClassVar[Kind | None] = "labels"
    continues: ClassVar[Literal["tokens", "values", ""] | None] = "tokens"
    position_wise: ClassVar[bool] = True

    def __init__(self, d_model: int, vocab_size: int, most_labels: int | None = None) -> None:
        super().__init__()
        check_positive("The lm head", d_model=d_model, vocab_size=vocab_size)
        if most_labels is not None:
            check_positive("The lm head", most_labels=most_labels)
        self.most_labels = most_labels
        self.linear = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, length)` int64 already shifted, -100 where there is
        nothing to predict. Returns (loss, logits): the mean loss in nats a label or None, and logits `(batch, length,
        vocab_size)` fp32 or None. Without `return_logits`, large losses are computed in chunks, so that the logits of a
        whole batch never exist (except with an adapter or hooks on the linear map, which must see them). Raises
        ConfigError for labels that are not one int64 for each position, and on a CPU for more of them in a sequence
        than `most_labels`; a GPU, which nobody waits for, and what is compiled give a loss that is NaN."""
        if labels is not None:
            check_targets(self, labels, tuple(hidden.shape[:2]))
            if not return_logits and self.most_labels is not None and self.most_labels < labels.shape[1]:
                hidden, labels = self._labelled(hidden, labels, self.most_labels)
        if return_logits or (labels is not None and not is_plain(self.linear)):
            logits = apply_linear(self.linear, hidden[:, 0])[:, None] if hidden.shape[1] == 1 else self.linear(hidden)
            logits = logits.float()
            if labels is None:
                return None, logits
            return label_loss(logits, labels), logits if return_logits else None
        if labels is None:
            return None, None
        total = linear_cross_entropy(hidden.flatten(0, 1), self.linear.weight, labels.flatten())
        return total / (labels != -100).sum().clamp(min=1), None

    def _labelled(self, hidden: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The same `(batch, most, ...)`: positions with labels, then others."""
        has = labels != -100
        too_many = (has.sum(1) > most).any()
        if labels.is_cpu and is_eager(labels) and too_many:
            raise ConfigError(
                f"A sequence has {int(has.sum(1).max())} labels, but model.head.most_labels is {most}. Set it to the "
                "most that a sequence of the data has, or leave it out."
            )
        at = has.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return hidden.masked_fill(too_many, torch.nan), labels.gather(1, at)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Head.likeliest`. On a GPU the logits are read as the map makes them."""
        if hidden.is_cuda and type(self) is LMHead and is_plain(self.linear) and _is_called_plainly(self):
            logits = apply_linear(self.linear, hidden)
            if can_choose(logits):
                return likeliest(logits)
        return super().likeliest(hidden)


def _is_called_plainly(module: nn.Module) -> bool:
    state = module.__dict__
    own = any(name in state for name in ("forward", "told"))
    return not (own or state["_forward_hooks"] or state["_forward_pre_hooks"])
