"""The definition of the norms, on any device: in float64 if the stream is float64, otherwise in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments, UnitNormArguments


def run_add(arguments: AddNormArguments) -> tuple[Tensor, Tensor]:
    """(y, new residual)."""
    x, residual, weight, eps, out_dtype = arguments
    wide = working_dtype(residual)
    total = residual.to(wide) if x is None else residual.to(wide) + x.to(wide)
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return y.to(weight.dtype if out_dtype is None else out_dtype), total


def run_gated(arguments: GatedNormArguments) -> Any:
    """(y,)."""
    x, z, weight, eps, _, norm_before_gate, activation = arguments
    wide = working_dtype(x)
    u, gate = x.to(wide), z.to(wide)
    gate = F.silu(gate) if activation == "silu" else torch.sigmoid(gate)
    if not norm_before_gate:
        u = u * gate
    grouped = u.unflatten(-1, (-1, arguments.width))  # (..., groups, width)
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = normed.flatten(-2) * weight.to(wide)  # (..., channels)
    return ((y * gate if norm_before_gate else y).to(x.dtype),)


def run_unit(arguments: UnitNormArguments) -> Any:
    """(y,)."""
    x, size, scale, eps = arguments
    wide = x.to(working_dtype(x)).unflatten(-1, (-1, size))  # (..., groups, size)
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return ((y if scale == 1 else y * scale).flatten(-2).to(x.dtype),)


def why_not_cpu(arguments: GatedNormArguments | UnitNormArguments) -> str | None:
    """The reason why a CPU is not what runs these arguments, or None."""
    device = arguments.x.device
    return None if device.type == "cpu" else f"x is on {device}"
