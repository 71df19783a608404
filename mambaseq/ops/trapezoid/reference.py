"""The definition of Mamba-3's recurrence: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.trapezoid.arguments import TrapezoidArguments


def run(arguments: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state. Computed in float64 if x is float64, otherwise in float32."""
    x, dt, A, trap, B, C, state, last_x, last_B, cu_seqlens, reverse, *_ = arguments
    wide, n = working_dtype(x), arguments.n_sequences
    over_time = [value.to(wide) for value in (x, dt, A, trap, B, C)]
    if state is None:
        state = x.new_zeros(n, x.shape[2], x.shape[4], B.shape[4])
    if last_x is None or last_B is None:
        last_x, last_B = x.new_zeros(n, *x.shape[2:]), x.new_zeros(n, *B.shape[2:])
    state, last_x, last_B = (value.to(wide, copy=True) for value in (state, last_x, last_B))
    if cu_seqlens is None:
        y, final = _scan(over_time, state, last_x, last_B, reverse)
        return y.to(x.dtype), final
    ys, finals = [over_time[0][:, :0]], [state[:0]]
    for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(cu_seqlens, x.shape[1]))):
        own = [value[:, start:end] for value in over_time]
        y, final = _scan(own, state[s : s + 1], last_x[s : s + 1], last_B[s : s + 1], reverse)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1).to(x.dtype), torch.cat(finals)


def _scan(over_time: list[Tensor], h: Tensor, last_x: Tensor, last_B: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """over_time: x, dt, A, trap, B and C."""
    x, dt, A, trap, B, C = over_time
    ys: list[Tensor] = [x] * x.shape[1]
    before = last_x.mT @ last_B  # (batch, heads, head_dim, d_state)
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        step, weight, rate = (value[:, t, :, None, None] for value in (dt, trap, A))
        now = x[:, t].mT @ B[:, t]
        h = torch.exp(step * rate) * (h + (1 - weight) * step * before) + weight * step * now
        ys[t] = C[:, t] @ h.mT  # (batch, heads, rank, head_dim)
        before = now
    return (torch.stack(ys, dim=1) if ys else x), h
