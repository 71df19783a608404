"""Labels and values of positions, or of bins of them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Kind, check_targets
from mambaseq.heads.losses import BinaryLoss, LabelLoss, Weights, squared_loss
from mambaseq.limits import WINDOW, check_setting
from mambaseq.ops.chunks import padded


class PositionHead(Head):
    """Linear map of each position, or of the mean over each bin of `stride` positions, in fp32. The last bin of a
    sequence is a mean over the remaining positions."""

    per_token: ClassVar[bool] = True
    continues: ClassVar[Literal["tokens", "values", ""] | None] = ""

    def __init__(self, d_model: int, n_outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        check_positive(f"The head {type(self).__name__}", d_model=d_model, n_outputs=n_outputs)
        check_setting("model.head.stride", stride, 1, WINDOW.value)
        if not 0 <= dropout < 1:
            raise ConfigError(f"The head {type(self).__name__} needs a dropout from 0 to below 1, not {dropout}.")
        self.stride = stride
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, n_outputs)

    def _outputs(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """`(batch, bins, n_outputs)` fp32."""
        if self.stride > 1:
            hidden = bin_means(hidden, self.stride, mask, cu_seqlens)
        return self.linear(self.dropout(hidden).to(self.linear.weight.dtype)).float()


def bin_means(hidden: Tensor, stride: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Means over bins of `stride` positions, `(batch, bins, d_model)` fp32 from hidden `(batch, length, d_model)`: over
    real positions only (mask, right padding), or within each packed sequence, with bins end to end. A bin without a
    real position is 0. For packed sequences the host waits for the number of bins."""
    length = hidden.shape[1]
    if cu_seqlens is None:
        whole = length + -length % stride
        real = hidden.new_ones(1, length, dtype=torch.bool) if mask is None else mask
        x = padded(hidden.float() * real[..., None], 1, whole).unflatten(1, (-1, stride))
        counts = padded(real, 1, whole).unflatten(1, (-1, stride)).sum(2)
        return x.sum(2) / counts.clamp(min=1)[..., None]
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    bins = (ends - begins + stride - 1) // stride
    owner = torch.repeat_interleave(torch.arange(len(bins), device=hidden.device), bins)
    number = torch.arange(len(owner), device=hidden.device) - (bins.cumsum(0) - bins)[owner]
    places = (begins[owner] + number * stride)[:, None] + torch.arange(stride, device=hidden.device)
    inside = places < ends[owner][:, None]
    # positions after a sequence's end are read from a row of zeros, so that each position is read once
    rows = F.pad(hidden[0].float(), (0, 0, 0, 1))
    x = rows[torch.where(inside, places, length)]
    return (x.sum(1) / inside.sum(1).clamp(min=1)[:, None])[None]


class TokenClassificationHead(PositionHead):
    """One of several classes for each position, or bin of positions, with cross-entropy.

    Args:
        d_model: width of the backbone's output.
        n_classes: number of labels.
        stride: positions that share a label; it must equal the data's `Batch.stride`.
        dropout: applied before the linear map in training.
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
        stride: int = 1,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_classes, stride, dropout)
        self.loss = LabelLoss(n_classes, class_weights, label_smoothing, focal_gamma)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, bins)` int64, -100 where there is none. Returns (loss,
        logits), the loss a mean over labels, logits `(batch, bins, n_classes)` fp32. Raises ConfigError for labels that
        are not one int64 a bin."""
        logits = self._outputs(hidden, mask, cu_seqlens)
        if labels is None:
            return None, logits
        check_targets(self, labels, tuple(logits.shape[:2]))
        return self.loss(logits, labels), logits


class TokenMultilabelHead(PositionHead):
    """Any of several labels for each position, or bin of positions: a binary cross-entropy for each label.

    Args:
        d_model: width of the backbone's output.
        n_classes: number of labels.
        stride: positions that share labels; it must equal the data's `Batch.stride`.
        dropout: applied before the linear map in training.
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
        stride: int = 1,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        positive_weights: Weights = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_classes, stride, dropout)
        self.loss = BinaryLoss(n_classes, positive_weights, label_smoothing, focal_gamma)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, bins, n_classes)` int64: 1 where a label applies, 0 where
        not, -100 where unknown. Returns (loss, logits), logits of the labels' shape, fp32. Raises ConfigError for
        labels of another shape or kind."""
        logits = self._outputs(hidden, mask, cu_seqlens)
        if labels is None:
            return None, logits
        check_targets(self, labels, tuple(logits.shape))
        return self.loss(logits, labels), logits


class TokenRegressionHead(PositionHead):
    """Real values for each position, or bin of positions, with mean squared error over the known values.

    Args:
        d_model: width of the backbone's output.
        n_outputs: values a position.
        stride: positions that share values; it must equal the data's `Batch.stride`.
        dropout: applied before the linear map in training.
    """

    learns: ClassVar[Kind | None] = "values"

    def __init__(self, d_model: int, n_outputs: int = 1, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_outputs, stride, dropout)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, bins, n_outputs)` or `(batch, bins)` float, NaN where
        unknown. Returns (loss, values `(batch, bins, n_outputs)` fp32). Raises ConfigError when the labels are not
        `n_outputs` floats a bin."""
        values = self._outputs(hidden, mask, cu_seqlens)
        if labels is None:
            return None, values
        if values.shape[2] == 1 and labels.dim() == 2:
            labels = labels[..., None]
        check_targets(self, labels, tuple(values.shape))
        return squared_loss(values, labels), values
