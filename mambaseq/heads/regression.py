"""Real values for a sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError
from mambaseq.heads.base import Pool, pool


class RegressionHead(nn.Module):
    """Pooled linear regression with mean squared error.

    Args:
        d_model: width of the backbone's output.
        n_outputs: values a sequence.
        pooling: "mean" over positions, or the "last" or "first" one.
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
        values `(sequences, n_outputs)` fp32). Raises ConfigError when the labels are not `n_outputs` a sequence."""
        values = self.linear(pool(hidden, self.pooling, mask, cu_seqlens).to(self.linear.weight.dtype)).float()
        if labels is None:
            return None, values
        if labels.numel() != values.numel() or labels.shape[0] != values.shape[0]:
            raise ConfigError(
                f"The regression head gives {values.shape[1]} value(s) a sequence (n_outputs), and the data's targets "
                f"are {tuple(labels.shape[1:]) or 'one'} a sequence. Set model.head.n_outputs to fit the data."
            )
        return F.mse_loss(values, labels.float().view_as(values)), values
