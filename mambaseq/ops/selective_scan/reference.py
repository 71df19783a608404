"""The definition of the selective scan: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.selective_scan.arguments import ScanArguments


def run(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state. Computed in float64 if x is float64, otherwise in float32."""
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, cu_seqlens, reverse, _ = arguments
    real, wide = working_dtype(x), working_dtype(x, A)
    u, dt, A, B, C = x.to(real), dt.to(real), A.to(wide), B.to(wide), C.to(wide)

    if dt_bias is not None:
        dt = dt + dt_bias.to(real)
    if dt_softplus:
        dt = F.softplus(dt)
    if state is None:
        state = A.new_zeros(arguments.n_sequences, *A.shape)
    state = state.to(wide, copy=True)  # of length 0, it is what is returned

    if cu_seqlens is None:
        y, final_state = _scan(u, dt, A, B, C, state, reverse)
    else:
        bounds = sequences.offsets(cu_seqlens, x.shape[1])
        ys, finals = [u[:, :0]], [state[:0]]
        for s, (start, end) in enumerate(itertools.pairwise(bounds)):
            own_B, own_C = (M if M.ndim == 2 else M[:, start:end] for M in (B, C))
            y, final = _scan(u[:, start:end], dt[:, start:end], A, own_B, own_C, state[s : s + 1], reverse)
            ys.append(y)
            finals.append(final)
        y, final_state = torch.cat(ys, dim=1), torch.cat(finals)

    if D is not None:
        y = y + D.to(real) * u
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(x.dtype), final_state


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    length, channels = x.shape[1], x.shape[2]
    ys: list[Tensor] = [x] * length
    for t in reversed(range(length)) if reverse else range(length):
        dt_t = dt[:, t, :, None]  # (batch, channels, 1)
        h = torch.exp(dt_t * A) * h + dt_t * x[:, t, :, None] * _at(B, t, channels)  # (batch, channels, d_state)
        y = (h * _at(C, t, channels)).sum(-1)
        ys[t] = 2 * y.real if y.is_complex() else y
    return (torch.stack(ys, dim=1) if ys else x), h  # (batch, length, channels)


def _at(M: Tensor, t: int, channels: int) -> Tensor:
    """B or C at time t, for every channel: broadcastable to `(batch, channels, d_state)`."""
    if M.ndim == 2:
        return M
    if M.ndim == 3:
        return M[:, t, None]  # (batch, 1, d_state)
    return M[:, t].repeat_interleave(channels // M.shape[2], dim=1)  # (batch, channels, d_state)
