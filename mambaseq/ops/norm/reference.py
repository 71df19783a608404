"""The definition of the norms, on any device: in float64 if the stream is float64, otherwise in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments


def run_add(arguments: AddNormArguments) -> tuple[Tensor, Tensor]:
    """(y, new residual)."""
    x, residual, weight, eps, out_dtype = arguments
    wide = working_dtype(residual)
    total = residual.to(wide) if x is None else residual.to(wide) + x.to(wide)
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return y.to(weight.dtype if out_dtype is None else out_dtype), total


def run_gated(arguments: GatedNormArguments) -> Any:
    """(y,)."""
    x, z, weight, eps, _, norm_before_gate = arguments
    wide = working_dtype(x)
    u, gate = x.to(wide), F.silu(z.to(wide))
    if not norm_before_gate:
        u = u * gate
    grouped = u.unflatten(-1, (-1, arguments.width))  # (..., groups, width)
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = normed.flatten(-2) * weight.to(wide)  # (..., channels)
    return ((y * gate if norm_before_gate else y).to(x.dtype),)


def why_not_cpu(arguments: GatedNormArguments) -> str | None:
    """The reason why a CPU is not what runs these arguments, or None."""
    device = arguments.x.device
    return None if device.type == "cpu" else f"x is on {device}"
