"""RMSNorm in fp32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), computed in fp32 whatever comes in.

    The output has the weight's dtype: the residual stream that comes in is fp32, what the mixer gets is not.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(self.weight.dtype)
