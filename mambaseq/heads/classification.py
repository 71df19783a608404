"""One label a sequence."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Pool, check_targets, label_loss, pool


class ClassificationHead(Head):
    """Pooled linear classifier with cross-entropy.

    Args:
        d_model: width of the backbone's output.
        n_classes: number of labels.
        pooling: "mean" over positions, or the "last" or "first" one.
        scale: multiplies the pooled vector. A mean over many positions differs little between sequences; a scale
            of about the square root of the length / 4 lets the classifier learn as fast as the rest.
        dropout: applied to the pooled vector in training.
        label_smoothing: of the cross-entropy.
    """

    per_token: ClassVar[bool] = False
    learns: ClassVar[Literal["labels", "values"] | None] = "labels"

    def __init__(
        self,
        d_model: int,
        n_classes: int,
        pooling: Pool = "mean",
        scale: float = 1.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("The classification head", d_model=d_model, n_classes=n_classes)
        if not math.isfinite(scale) or not 0 <= dropout < 1 or not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"The classification head needs a finite scale, and dropout and label_smoothing from 0 to below 1, not "
                f"{scale}, {dropout} and {label_smoothing}."
            )
        self.pooling: Pool = pooling
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, n_classes)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(sequences,)` int64, -100 where there is none. Returns (loss,
        logits), the loss a mean over labels, logits `(sequences, n_classes)` fp32. Raises ConfigError for labels that
        are not one int64 a sequence."""
        pooled = self.dropout(self.scale * self._pool(hidden, mask, cu_seqlens))
        logits = self.linear(pooled.to(self.linear.weight.dtype)).float()
        if labels is None:
            return None, logits
        check_targets(self, labels, (len(logits),))
        return label_loss(logits, labels, self.label_smoothing if self.training else 0.0), logits

    def _pool(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return pool(hidden, self.pooling, mask, cu_seqlens)
