"""Real values for a sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.heads.base import Pool, pool


class RegressionHead(nn.Module):
    """Pooled linear regression with mean squared error.

    Args:
        d_model: width of the backbone's output.
        n_outputs: values a sequence.
        pooling: "mean" over positions, or the "last" one.
    """

    per_token = False

    def __init__(self, d_model: int, n_outputs: int = 1, pooling: Pool = "mean") -> None:
        super().__init__()
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
        """hidden `(batch, length, d_model)`, labels `(sequences, n_outputs)` or `(sequences,)` float. Returns (loss,
        values `(sequences, n_outputs)`)."""
        values = self.linear(pool(hidden, self.pooling, mask, cu_seqlens).to(self.linear.weight.dtype)).float()
        loss = None if labels is None else F.mse_loss(values, labels.float().view_as(values))
        return loss, values
