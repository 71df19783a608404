"""The definition of the state-space dual: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.ssd.arguments import SsdArguments


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state. Computed in float64 if x is float64, otherwise in float32."""
    x, dt, A, B, C, D, dt_bias, dt_softplus, state, cu_seqlens, reverse, *_ = arguments
    wide, heads = working_dtype(x), x.shape[2]
    u, dt, A = x.to(wide), dt.to(wide), A.to(wide)
    B, C = (M.to(wide).repeat_interleave(heads // M.shape[2], dim=2) for M in (B, C))  # (batch, length, heads, d_state)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    if state is None:
        state = u.new_zeros(arguments.n_sequences, heads, x.shape[3], B.shape[3])
    state = state.to(wide, copy=True)  # of length 0, it is what is returned

    if cu_seqlens is None:
        y, final_state = _scan(u, dt, A, B, C, state, reverse)
    else:
        ys, finals = [u[:, :0]], [state[:0]]
        for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(cu_seqlens, x.shape[1]))):
            own_u, own_dt, own_B, own_C = (M[:, start:end] for M in (u, dt, B, C))
            y, final = _scan(own_u, own_dt, A, own_B, own_C, state[s : s + 1], reverse)
            ys.append(y)
            finals.append(final)
        y, final_state = torch.cat(ys, dim=1), torch.cat(finals)
    if D is not None:
        y = y + D.to(wide)[:, None] * u
    return y.to(x.dtype), final_state


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """B and C are given for every head."""
    length = x.shape[1]
    ys: list[Tensor] = [x] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (batch, heads, 1, 1)
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]  # (batch, heads, head_dim, d_state)
        ys[t] = (h * C[:, t, :, None]).sum(-1)  # (batch, heads, head_dim)
    return (torch.stack(ys, dim=1) if ys else x), h
