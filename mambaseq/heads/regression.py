"""Real values for a sequence."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Kind, Pool, check_targets, pool
from mambaseq.heads.losses import squared_loss


class RegressionHead(Head):
    """Pooled linear regression with mean squared error over the known values.

    Args:
        d_model: width of the backbone's output.
        n_outputs: values a sequence.
        pooling: "mean" or "max" over positions, or the "last" or "first" one.
    """

    per_token: ClassVar[bool] = False
    splits_time: ClassVar[bool] = True
    learns: ClassVar[Kind | None] = "values"

    def __init__(self, d_model: int, n_outputs: int = 1, pooling: Pool = "mean") -> None:
        super().__init__()
        check_positive("The regression head", d_model=d_model, n_outputs=n_outputs)
        self.pooling: Pool = pooling
        self.linear = nn.Linear(d_model, n_outputs)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(sequences, n_outputs)` or `(sequences,)` float, NaN where
        unknown. Returns (loss, values `(sequences, n_outputs)` fp32). Raises ConfigError when the labels are not
        `n_outputs` floats a sequence."""
        values = self.linear(pool(hidden, self.pooling, mask, cu_seqlens).to(self.linear.weight.dtype)).float()
        if labels is None:
            return None, values
        if values.shape[1] == 1 and labels.dim() == 1:
            labels = labels[:, None]
        if labels.is_floating_point() and labels.dim() < 3 and labels.shape != values.shape:
            raise ConfigError(
                f"The regression head gives {values.shape[1]} value(s) a sequence (n_outputs), of which there are "
                f"{len(values)}, but the data's targets are {tuple(labels.shape)}. Set model.head.n_outputs to fit."
            )
        check_targets(self, labels, tuple(values.shape))
        return squared_loss(values, labels), values
