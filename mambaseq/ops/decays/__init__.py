"""Log-decays of Kimi Delta Attention (arXiv:2510.26692, section 3): what a map of the input says, made negative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.decays import gpu
from mambaseq.ops.decays.arguments import DecayArguments, check
from mambaseq.ops.dtypes import working_dtype


def _run_reference(arguments: DecayArguments) -> Any:
    """(g,): the definition, in float64 if f is float64, otherwise in float32."""
    f, A_log, dt_bias, lower_bound = arguments
    wide = working_dtype(f)
    u = (f.to(wide) + dt_bias.to(wide)).unflatten(-1, (len(A_log), -1))  # (..., heads, channels)
    A = torch.exp(A_log.to(wide))[:, None]
    return (-A * F.softplus(u) if lower_bound is None else lower_bound * torch.sigmoid(A * u),)


def _why_not_cpu(arguments: DecayArguments) -> str | None:
    """The reason why a CPU is not what runs these arguments, or None."""
    device = arguments.f.device
    return None if device.type == "cpu" else f"f is on {device}"


def _samples(device: torch.device) -> Iterator[tuple[str, DecayArguments]]:
    """Small float32 inputs that use every argument."""
    draw = torch.Generator().manual_seed(0)
    f, A_log, dt_bias = (torch.randn(*shape, generator=draw).to(device) for shape in ((2, 7, 18), (3,), (18,)))
    yield "softplus", DecayArguments(f, A_log, dt_bias)
    yield "lower bound", DecayArguments(f, A_log, dt_bias, -5.0)


OP = dispatch.Op(
    name="log_decays",
    backends=(
        # as on every CPU, also where Triton's interpreter is on, which is for its kernels' tests and slow
        dispatch.Backend("cpu", _run_reference, _why_not_cpu),
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("reference", _run_reference, dispatch.never),
    ),
    samples=_samples,
)


def log_decays(
    f: Tensor, A_log: Tensor, dt_bias: Tensor, *, lower_bound: float | None = None, backend: str | None = None
) -> Tensor:
    """What a state's channels decay by at a step, as logarithms.

        g = -exp(A_log) softplus(f + dt_bias)      (or lower_bound sigmoid(exp(A_log) (f + dt_bias)))

    Args:
        f: `(..., heads * channels)`, any floating dtype. Float64 is computed in float64, all else in float32.
        A_log: `(heads,)`.
        dt_bias: `(heads * channels,)`.
        lower_bound: what g stays above; None for no bound.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        g `(..., heads, channels)` in float32 (float64 if f is).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = DecayArguments(f, A_log, dt_bias, lower_bound)
    check(arguments)
    return dispatch.run(OP, arguments, backend)[0]
