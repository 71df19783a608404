"""One step of the ops for decode loops: length 1, states changed in place.

With a float32 state and without gradients each is one kernel, by Numba on CPU and Triton on GPU, instead of many small
operations of PyTorch. Everything else, `torch.compile` included, is computed by PyTorch.

A state may also be kept in bfloat16 between steps: it is read, computed with in float32, and rounded when it is
written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.errors import shown
from mambaseq.ops.causal_conv import Activation
from mambaseq.ops.cpu.flat import flat, rows_of, scratch
from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.eager import has_kernels
from mambaseq.ops.lti import Discretization, discretize
from mambaseq.ops.shapes import check_divide, check_step

_REAL = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read; they compute in float32


def selective_state_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    A_is_log: bool = False,
) -> Tensor:
    """One step of `mambaseq.ops.selective_scan`; changes `state` in place.

    Args:
        state: `(batch, channels, d_state)`, float32 or bfloat16, or complex64 if A is complex.
        x, dt, z: `(batch, channels)`.
        A: `(channels, d_state)`.
        B, C: `(batch, d_state)` or `(batch, groups, d_state)`.
        D, dt_bias: `(channels,)`.
        A_is_log: A holds log(-A), as `Mamba.A_log` does; spares the operations that make A of it.

    Returns:
        y `(batch, channels)` in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    B, C = (M[:, None] if M.ndim == 2 else M for M in (B, C))  # (batch, groups, d_state)
    one, of_groups = state.shape[:2], (state.shape[0], B.shape[1], state.shape[2])
    check_step("selective_state_update_", ("x", x, one), ("dt", dt, one), ("z", z, one), ("A", A, state.shape[1:]))
    check_step("selective_state_update_", ("B", B, of_groups), ("C", C, (*of_groups[:1], C.shape[1], of_groups[2])))
    check_step("selective_state_update_", ("D", D, one[1:]), ("dt_bias", dt_bias, one[1:]))
    for name, matrix in (("B", B), ("C", C)):
        check_divide("selective_state_update_", name, matrix.shape[1], one[1])
    if step_gpu.can_run(state, x, dt, A, B, C, D, z, dt_bias) and step_gpu.can_update(state):
        return step_gpu.selective_state_update_(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log)
    if state.dtype == torch.bfloat16:
        options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "A_is_log": A_is_log}
        return _widened(selective_state_update_, state, x, dt, A, B, C, **options)
    if A_is_log:
        A = -torch.exp(A.to(state.dtype))
    channels = x.shape[1]
    if _can_run_kernels(state, x, dt, A, B, C, D, z, dt_bias) and B.shape == C.shape:
        kernels: Any = importlib.import_module("mambaseq.ops.decoding.kernels")
        y = torch.empty(x.shape, dtype=torch.float32)
        kernels.selective_state_update(
            state.view(-1).numpy(),
            *rows_of(x),
            *rows_of(dt),
            flat(A),
            flat(B),
            flat(C),
            B.shape[1],
            flat(D),
            D is not None,
            *rows_of(z),
            flat(dt_bias),
            dt_bias is not None,
            dt_softplus,
            *state.shape,
            y.view(-1).numpy(),
            scratch(channels),
        )
        return y.to(x.dtype)
    delta = dt.to(state.real.dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(delta.dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    u = x.to(delta.dtype)
    # (batch, channels, d_state)
    B, C = (M.to(state.dtype).repeat_interleave(channels // M.shape[1], dim=1) for M in (B, C))
    # (batch, channels, d_state)
    state.mul_(torch.exp(delta[..., None] * A.to(state.dtype))).add_((delta * u)[..., None] * B)
    return _read_out(state, C, x, D, z)


def lti_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    discretization: Discretization = "zoh",
) -> Tensor:
    """One step of `mambaseq.ops.lti_scan`; changes `state` in place.

    Args:
        state: `(batch, channels, d_state)`, float32 or bfloat16, or complex64 if A is complex.
        x, z: `(batch, channels)`.
        dt, D: `(channels,)`.
        A, B, C: `(channels, d_state)`.

    Returns:
        y `(batch, channels)` in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    one, system = state.shape[:2], state.shape[1:]
    check_step("lti_update_", ("x", x, one), ("z", z, one), ("A", A, system), ("B", B, system), ("C", C, system))
    check_step("lti_update_", ("dt", dt, one[1:]), ("D", D, one[1:]))
    if step_gpu.can_run(state, x, dt, A, B, C, D, z) and step_gpu.can_update(state):
        return step_gpu.lti_update_(state, x, dt, A, B, C, D, z, discretization)
    if state.dtype == torch.bfloat16:
        return _widened(lti_update_, state, x, dt, A, B, C, D=D, z=z, discretization=discretization)
    wide = state.dtype
    log_decay, B = discretize(dt.to(state.real.dtype), A.to(wide), B.to(wide), discretization)
    decay = torch.exp(log_decay)
    decay = decay if wide.is_complex else decay.real if decay.is_complex() else decay
    state.mul_(decay).add_(B * x.to(wide)[..., None])  # (batch, channels, d_state)
    return _read_out(state, C.to(wide), x, D, z)


def ssd_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of `mambaseq.ops.ssd`; changes `state` in place.

    Args:
        state: `(batch, heads, head_dim, d_state)`, float32 or bfloat16.
        x: `(batch, heads, head_dim)`.
        dt: `(batch, heads)`.
        A, D, dt_bias: `(heads,)`.
        B, C: `(batch, groups, d_state)`.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    of_groups = (state.shape[0], B.shape[1], state.shape[3])
    check_step("ssd_update_", ("x", x, state.shape[:3]), ("dt", dt, state.shape[:2]))
    check_step("ssd_update_", ("B", B, of_groups), ("C", C, of_groups))
    check_step("ssd_update_", *((name, v, state.shape[1:2]) for name, v in (("A", A), ("D", D), ("dt_bias", dt_bias))))
    check_divide("ssd_update_", "B", B.shape[1], state.shape[1])
    if (
        state.dtype in (torch.float32, torch.bfloat16)
        and step_gpu.can_run(state, x, dt, A, B, C, D, dt_bias)
        and step_gpu.can_update(state)
    ):
        return step_gpu.ssd_update_(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    if state.dtype == torch.bfloat16:
        return _widened(ssd_update_, state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    wide, heads = state.dtype, x.shape[1]
    dt, u = dt.to(wide), x.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (M.to(wide).repeat_interleave(heads // M.shape[1], dim=1) for M in (B, C))  # (batch, heads, d_state)
    # (batch, heads, head_dim, d_state)
    state.mul_(torch.exp(dt * A.to(wide))[..., None, None]).add_((dt[..., None] * u)[..., None] * B[:, :, None])
    y = (state * C[:, :, None]).sum(-1)  # (batch, heads, head_dim)
    if D is not None:
        y = y + D.to(wide)[:, None] * u
    return y.to(x.dtype)


def causal_conv_update_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """One step of `mambaseq.ops.causal_conv`; changes `state` in place.

    Args:
        state: `(batch, channels, width - 1)`, float32, the latest inputs, oldest first.
        x: `(batch, channels)`.
        weight: `(channels, width)`.
        bias: `(channels,)`.
        activation: "silu" or None.

    Returns:
        y `(batch, channels)` in the dtype of x.

    Raises:
        ValueError: another activation, or shapes do not fit.
    """
    filters = (state.shape[1], state.shape[2] + 1)
    check_step(
        "causal_conv_update_", ("x", x, state.shape[:2]), ("weight", weight, filters), ("bias", bias, filters[:1])
    )
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', not {shown(activation)}")
    if step_gpu.can_run(state, x, weight, bias):
        return step_gpu.causal_conv_update_(state, x, weight, bias, activation == "silu")
    if _can_run_kernels(state, x, weight, bias):
        kernels: Any = importlib.import_module("mambaseq.ops.decoding.kernels")
        y = torch.empty(x.shape, dtype=torch.float32)
        kernels.causal_conv_update(
            state.view(-1).numpy(),
            *rows_of(x),
            flat(weight),
            flat(bias),
            bias is not None,
            activation == "silu",
            *state.shape,
            y.view(-1).numpy(),
        )
        return y.to(x.dtype)
    window = torch.cat([state, x.to(state.dtype)[..., None]], dim=-1)  # (batch, channels, width)
    state.copy_(window[..., 1:])
    y = (window * weight.to(state.dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _widened(update: Callable[..., Tensor], state: Tensor, *values: Any, **options: Any) -> Tensor:
    wide = state.float()
    y = update(wide, *values, **options)
    state.copy_(wide)
    return y


def _read_out(state: Tensor, C: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = (state * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def _can_run_kernels(state: Tensor, *values: Tensor | None) -> bool:
    if not has_kernels() or not state.is_contiguous() or state.dtype != torch.float32:
        return False
    needs_gradient = torch.is_grad_enabled()
    for value in (state, *values):
        if value is None:
            continue
        if value.device.type != "cpu" or value.dtype not in _REAL:
            return False
        if needs_gradient and value.requires_grad:
            return False
    return True
