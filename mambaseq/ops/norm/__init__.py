"""Root-mean-square norms (arXiv:1910.07467) with what stands before them, a sum or a gate; vectors of one length."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.norm import arguments as _arguments
from mambaseq.ops.norm import fused, gpu, reference, unit
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments, UnitNormArguments

ADD_OP = dispatch.Op(
    name="add_rms_norm",
    backends=(
        dispatch.Backend("cpu", fused.run, fused.why_not_cpu),
        dispatch.Backend("triton", gpu.run_add, gpu.why_not_add),
        dispatch.Backend("torch", fused.run, dispatch.never),
        dispatch.Backend("reference", reference.run_add, dispatch.never),
    ),
    samples=_arguments.add_samples,
)
GATED_OP = dispatch.Op(
    name="gated_rms_norm",
    backends=(
        # as on every CPU, also where Triton's interpreter is on, which is for its kernels' tests and slow
        dispatch.Backend("cpu", reference.run_gated, reference.why_not_cpu),
        dispatch.Backend("triton", gpu.run_gated, gpu.why_not_gated),
        dispatch.Backend("reference", reference.run_gated, dispatch.never),
    ),
    samples=_arguments.gated_samples,
)

UNIT_OP = dispatch.Op(
    name="unit_norm",
    backends=(
        dispatch.Backend("cpu", reference.run_unit, reference.why_not_cpu),
        dispatch.Backend("triton", unit.run, unit.why_not),
        dispatch.Backend("reference", reference.run_unit, dispatch.never),
    ),
    samples=_arguments.unit_samples,
)


def add_rms_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum.

        r = residual + x
        y = r / sqrt(mean(r²) + eps) · weight

    Args:
        x: what is added, `(..., d_model)`, any floating dtype; None adds nothing.
        residual: the stream, the shape of x; float32 as a rule. Float64 is computed in float64, all else in float32.
        weight: `(d_model,)`.
        eps: keeps a row of zeros from division by zero.
        out_dtype: of y; None for the weight's.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        (y, r): y in `out_dtype`, r in float32 (float64 if the residual is). r may be the residual itself where
        there is nothing to add. Both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = AddNormArguments(x, residual, weight, eps, out_dtype)
    _arguments.check_add(arguments)
    return dispatch.run(ADD_OP, arguments, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    gate: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """The norm of Mamba-2's blocks (Dao and Gu, arXiv:2405.21060), over groups of neighbouring channels.

        y = rms_norm(x · silu(z)) · weight        (norm_before_gate: rms_norm(x) · weight · silu(z))

    Args:
        x: `(..., channels)`, any floating dtype. Float64 is computed in float64, all else in float32.
        z: the gate, the shape of x.
        weight: `(channels,)`.
        eps: keeps a row of zeros from division by zero.
        group_size: channels a mean is taken over; None for all.
        norm_before_gate: gate what is normed instead of norming what is gated.
        gate: silu, or sigmoid in its place, as in Kimi Delta Attention.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shapes, dtypes, group_size or devices do not fit, or the backend asked for cannot run these
            arguments.
    """
    arguments = GatedNormArguments(x, z, weight, eps, group_size, norm_before_gate, gate)
    _arguments.check_gated(arguments)
    return dispatch.run(GATED_OP, arguments, backend)[0]


def unit_norm(
    x: Tensor, group_size: int, *, scale: float = 1.0, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Neighbouring channels as vectors of one length: queries and keys of delta rules (arXiv:2406.06484, section 3).

        y = scale · x / sqrt(sum(x²) + eps)

    Args:
        x: `(..., channels)`, any floating dtype. Float64 is computed in float64, all else in float32.
        group_size: channels of a vector, such as those of a head.
        scale: the length of y.
        eps: keeps vectors of zeros from division by zero.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shape, dtype or group_size do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = UnitNormArguments(x, group_size, scale, eps)
    _arguments.check_unit(arguments)
    return dispatch.run(UNIT_OP, arguments, backend)[0]
