"""RMSNorm of a sum by PyTorch's own fused norm; fastest on CPU, and on a GPU what the kernels do not take."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.norm.arguments import AddNormArguments


def why_not_cpu(arguments: AddNormArguments) -> str | None:
    """The reason why this cannot run these arguments, or None."""
    device = arguments.residual.device
    return None if device.type == "cpu" else f"residual is on {device}"


def run(arguments: AddNormArguments) -> tuple[Tensor, Tensor]:
    """(y, new residual)."""
    x, residual, weight, eps, out_dtype = arguments
    wide = working_dtype(residual)
    total = residual.to(wide) if x is None else residual.to(wide) + x.to(wide)
    y = F.rms_norm(total, weight.shape, weight.to(wide), eps)
    return y.to(weight.dtype if out_dtype is None else out_dtype), total
