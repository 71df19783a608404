"""Predicts several codes at each position."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import check_positive
from mambaseq.heads.base import Head, Kind, check_targets
from mambaseq.heads.losses import label_loss


class CodesHead(Head):
    """A linear map for each of several codes at a position, and cross-entropy over the labels that are not -100. Given
    the past, codes of one position are independent; where they are not, data shift them to different positions.

    The last id of the vocabulary says that there is no code, and is never predicted.

    Args:
        d_model: width of the backbone's output.
        vocab_size: number of ids of a code, with that of no code.
        n_codes: codes at a position.
    """

    per_token: ClassVar[bool] = True
    learns: ClassVar[Kind | None] = "labels"
    continues: ClassVar[Literal["tokens", "values", ""] | None] = "tokens"
    position_wise: ClassVar[bool] = True

    def __init__(self, d_model: int, vocab_size: int, n_codes: int) -> None:
        super().__init__()
        check_positive("The codes head", d_model=d_model, vocab_size=vocab_size - 1, n_codes=n_codes)
        self.codes = n_codes
        self.n_labels: int = vocab_size - 1
        self.maps = nn.Linear(d_model, n_codes * self.n_labels, bias=False)
        nn.init.normal_(self.maps.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, length, n_codes)` int64 already shifted, -100 where there
        is nothing to predict. Returns (loss, logits): the mean loss in nats a code or None, and logits `(batch, length,
        n_codes, vocab_size - 1)` fp32 or None. Raises ConfigError for labels of another shape or type."""
        if labels is None and not return_logits:
            return None, None
        logits = self.maps(hidden).float().unflatten(-1, (self.codes, self.n_labels))
        loss = None
        if labels is not None:
            check_targets(self, labels, (*hidden.shape[:2], self.codes))
            loss = label_loss(logits, labels)
        return loss, logits if return_logits else None

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """See `Head.losses`; the sum over a position's codes."""
        logits = self.told(hidden)
        return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").sum(-1)

    def labels_of(self, ids: Tensor) -> Tensor:
        """See `Head.labels_of`."""
        return ids.masked_fill(ids >= self.n_labels, -100)

    def draw(self, told: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Head.draw`."""
        return torch.stack([pick(one) for one in told.unbind(1)], 1)
