"""Labels of a sequence: one of several classes, or any of several labels."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Kind, Pool, check_targets, pool
from mambaseq.heads.losses import BinaryLoss, LabelLoss, Weights


class _PooledHead(Head):
    """Pooled linear map, `(sequences, n_classes)`."""

    per_token: ClassVar[bool] = False
    splits_time: ClassVar[bool] = True
    loss: nn.Module

    def __init__(self, d_model: int, n_classes: int, pooling: Pool, scale: float, dropout: float) -> None:
        super().__init__()
        check_positive("The classification head", d_model=d_model, n_classes=n_classes)
        if not 0 < scale < math.inf or not 0 <= dropout < 1:
            raise ConfigError(
                f"The classification head needs a finite scale above 0, and a dropout in [0, 1), not {scale} and "
                f"{dropout}."
            )
        self.pooling: Pool = pooling
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, n_classes)

    def _logits(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        pooled = self.dropout(self.scale * self._pool(hidden, mask, cu_seqlens))
        return self.linear(pooled.to(self.linear.weight.dtype)).float()

    def _pool(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return pool(hidden, self.pooling, mask, cu_seqlens)


class ClassificationHead(_PooledHead):
    """Pooled linear classifier with cross-entropy.

    Args:
        d_model: width of the backbone's output.
        n_classes: number of labels.
        pooling: "mean" or "max" over positions, or the "last" or "first" one.
        scale: multiplies the pooled vector. A mean over many positions differs little between sequences; a scale of
            about the square root of the length / 4 lets the classifier learn as fast as the rest.
        dropout: applied to the pooled vector in training.
        label_smoothing: of the cross-entropy, in training.
        class_weights: weight of each class's targets in training, in the order of the data's classes; 1 each if not
            given, `balanced` for what makes up for the counts of the training data.
        focal_gamma: in training a target's loss is multiplied by (1 - its probability) to this power; 0 is off.
    """

    learns: ClassVar[Kind | None] = "labels"

    def __init__(
        self,
        d_model: int,
        n_classes: int,
        pooling: Pool = "mean",
        scale: float = 1.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_classes, pooling, scale, dropout)
        self.loss = LabelLoss(n_classes, class_weights, label_smoothing, focal_gamma)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(sequences,)` int64, -100 where unknown. Returns (loss, logits):
        the mean loss over labels, and logits `(sequences, n_classes)` fp32. Raises ConfigError for labels that are not
        one int64 for each sequence."""
        logits = self._logits(hidden, mask, cu_seqlens)
        if labels is None:
            return None, logits
        check_targets(self, labels, (len(logits),))
        return self.loss(logits, labels), logits


class MultilabelHead(_PooledHead):
    """Any of several labels a sequence: pooled linear map with a binary cross-entropy for each label.

    Args:
        d_model: width of the backbone's output.
        n_classes: number of labels.
        pooling: "mean" or "max" over positions, or the "last" or "first" one.
        scale: multiplies the pooled vector; see the head classification.
        dropout: applied to the pooled vector in training.
        label_smoothing: in training the target of a label that applies is 1 - label_smoothing / 2, of another
            label_smoothing / 2.
        positive_weights: weights, in training, of labels that apply, in the order of the data's classes; 1 each if not
            given, `balanced` for what makes up for the counts of the training data.
        focal_gamma: in training a label's loss is multiplied by (1 - its probability) to this power; 0 is off.
    """

    learns: ClassVar[Kind | None] = "multilabels"

    def __init__(
        self,
        d_model: int,
        n_classes: int,
        pooling: Pool = "mean",
        scale: float = 1.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        positive_weights: Weights = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_classes, pooling, scale, dropout)
        self.loss = BinaryLoss(n_classes, positive_weights, label_smoothing, focal_gamma)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(sequences, n_classes)` int64: 1 where a label applies, 0 where
        not, -100 where that is unknown. Returns (loss, logits), the loss a mean over labels, logits `(sequences,
        n_classes)` fp32. Raises ConfigError for labels of another shape or kind."""
        logits = self._logits(hidden, mask, cu_seqlens)
        if labels is None:
            return None, logits
        check_targets(self, labels, tuple(logits.shape))
        return self.loss(logits, labels), logits
