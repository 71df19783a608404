"""What a stretch of time does to a state, without its outputs: what it adds to the state behind it, what it adds to the
gradient of the state before it, and by how much it decays what comes in.

All are sums over positions, each weighted by exp(A S), S the step sizes between it and the stretch's end. So they need
no order, and positions that are so far from it that their weights are no numbers in float32 are passed over: what is
computed is what can be remembered, not what has been.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.gpu import portable

# positions whose weights are held at once
_STEPS = 256
# weights below 2^-126 are no normal numbers of float32
LEAST = -126.0
# of the kernels: positions that a program takes, and of a tile; channels
_SPLIT, _TILE, _CHANNELS, _STATES = 512, 16, 16, 32


def state_behind(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None = None, dt_softplus: bool = False
) -> tuple[Tensor, Tensor]:
    """The state `(batch, channels, d_state)` after these positions, from zeros, and what they decay a state by.

    Arguments are those of `selective_scan`. Both results have the dtype of its states. Without gradients.
    """
    total, sums = _sums(dt, dt_bias, dt_softplus)
    return _weighted(x, dt, A, B, None, dt_bias, dt_softplus, sums, back=False), _decay(A, total)


def gradient_before(
    dy: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """The gradient `(batch, channels, d_state)` of the state before these positions that the one of their outputs, dy
    `(batch, length, channels)`, makes. Without gradients."""
    _, sums = _sums(dt, dt_bias, dt_softplus)
    found = _weighted(dy, dt, A, C, z, dt_bias, dt_softplus, sums, back=True)
    return 2 * found.conj().resolve_conj() if A.is_complex() else found


def decay(dt: Tensor, A: Tensor, dt_bias: Tensor | None = None, dt_softplus: bool = False) -> Tensor:
    """What these positions decay a state by, `(batch, channels, d_state)`."""
    return _decay(A, _sums(dt, dt_bias, dt_softplus)[0])


def _decay(A: Tensor, total: Tensor) -> Tensor:
    """total `(batch, channels)`, the sum of step sizes. Angles of a whole stretch may be thousands of turns."""
    if not A.is_complex():
        return torch.exp(A.detach() * total[..., None])
    A = A.detach()
    exact = total.double()[..., None]
    angle = torch.remainder(A.imag.double() * exact, 2 * torch.pi)
    return torch.polar(torch.exp(A.real.double() * exact), angle).to(working_dtype(total, A))


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    wide = working_dtype(dt)
    delta = dt.detach().to(wide)
    if bias is not None:
        delta = delta + bias.detach().to(wide)
    return F.softplus(delta) if softplus else delta


def _runs_kernel(dt: Tensor, *others: Tensor) -> bool:
    return (
        dt.is_cuda  # the interpreter of a CPU knows one thread
        and portable.why_not(dt.device.type) is None
        and all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in (dt, *others))
        and dt.numel() > 0
    )


def _sums(dt: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of all step sizes `(batch, channels)`, and, for the kernels, those of each split `(batch, splits,
    channels)`."""
    if not _runs_kernel(dt):
        delta = _step_sizes(dt, bias, softplus)
        return delta.sum(1, dtype=torch.float64).to(delta.dtype), None
    batch, length, channels = dt.shape
    splits, blocks = -(-length // _SPLIT), -(-channels // 64)
    dt = _rows(dt)
    sums = torch.empty(batch, splits, channels, device=dt.device)
    with portable.on(dt):
        _kernels().sum_steps[(splits, blocks, batch)](
            dt, dt.stride(0), dt.stride(1), _plain(bias), sums, length, channels, softplus, _SPLIT, _TILE, 64
        )
    return sums.sum(1), sums


def _weighted(
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    M: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    sums: Tensor | None,
    back: bool,
) -> Tensor:
    """The sum over positions of exp(A S) v M. Forward v is the step size times a value, and S are the steps behind a
    position; back v is the value, gated, and S its own step and those before it."""
    batch, length, channels = dt.shape
    groups = 1 if M.ndim == 3 else M.shape[2] if M.ndim == 4 else channels
    read = [t for t in (values, M, z) if t is not None]
    fits = groups == 1 or (channels // groups) % _CHANNELS == 0
    if sums is not None and fits and M.ndim > 2 and _runs_kernel(dt, *read, A) and A.shape[1] <= _STATES:
        values, dt, M = _rows(values), _rows(dt), _rows(M.flatten(2))
        z = None if z is None else _rows(z)
        # the steps between each split and the end that it is weighted by
        beyond = sums.cumsum(1) - sums if back else sums.flip(1).cumsum(1).flip(1) - sums
        n_splits, d_state = sums.shape[1], A.shape[1]
        parts = torch.empty(batch, n_splits, channels, d_state, device=dt.device)
        with portable.on(dt):
            _kernels().weighted[(n_splits, -(-channels // _CHANNELS), batch)](
                values,
                values.stride(0),
                values.stride(1),
                dt,
                dt.stride(0),
                dt.stride(1),
                M,
                M.stride(0),
                M.stride(1),
                z,
                0 if z is None else z.stride(0),
                0 if z is None else z.stride(1),
                A.detach().contiguous(),
                _plain(bias),
                beyond.contiguous(),
                parts,
                length,
                channels,
                d_state,
                channels // groups,
                softplus,
                back,
                LEAST,
                _SPLIT,
                _TILE,
                _CHANNELS,
                max(2, 1 << (d_state - 1).bit_length()),
            )
        return parts.sum(1)
    wide = working_dtype(values, A)
    # the angle of a slow decay may be thousands of turns
    exact = torch.float64 if A.is_complex() else working_dtype(values)
    rates = A.detach().to(torch.promote_types(exact, A.dtype))
    total = torch.zeros(batch, channels, A.shape[1], dtype=wide, device=dt.device)
    matrix = M.detach()[None, None] if M.ndim == 2 else M.detach()
    behind = torch.zeros(batch, 1, channels, dtype=exact, device=dt.device)
    starts = range(0, length, _STEPS)
    for start in starts if back else reversed(starts):
        here = slice(start, start + _STEPS)
        delta = _step_sizes(dt[:, here], bias, softplus)
        v = values[:, here].detach().to(delta.dtype)
        if z is not None:
            v = v * F.silu(z[:, here].detach().to(delta.dtype))
        delta = delta.to(exact)
        if back:
            steps = behind + delta.cumsum(1)
        else:
            v, steps = v * delta.to(v.dtype), behind + delta.flip(1).cumsum(1).flip(1) - delta
        weights = torch.exp(steps[..., None] * rates).to(wide) * v[..., None]  # (batch, steps, channels, d_state)
        rows = matrix if M.ndim == 2 else matrix[:, here]
        if M.ndim == 2:
            total += weights.sum(1) * rows[0].to(wide)
        else:
            rows = rows.flatten(2).unflatten(2, (groups, -1)).to(wide)  # (batch, steps, groups, d_state)
            grouped = weights.unflatten(2, (groups, -1))
            total += torch.einsum("btgcn,btgn->bgcn", grouped, rows).flatten(1, 2)
        behind = behind + delta.sum(1, keepdim=True)
        if dt.device.type == "cpu" and float((behind[..., None] * rates.real).max()) < LEAST:
            break
    return total


def _rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.selective_scan.ends_kernels")
