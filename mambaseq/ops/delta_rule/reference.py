"""The definition of the gated delta rule: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.dtypes import working_dtype


def run(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of v, and the final state. Computed in float64 if v is float64, otherwise in float32."""
    q, k, v, g, beta, state, cu_seqlens, reverse, *_ = arguments
    wide, heads, d_key = working_dtype(v), v.shape[2], k.shape[3]
    q, k = (value.to(wide).repeat_interleave(heads // value.shape[2], dim=2) for value in (q, k))
    g = v.new_zeros(v.shape[:3], dtype=wide) if g is None else g.to(wide)
    values, g = v.to(wide), g if g.ndim == 4 else g[..., None]  # (batch, length, heads, d_key or 1)
    if state is None:
        state = v.new_zeros(arguments.n_sequences, heads, v.shape[3], d_key)
    state = state.to(wide, copy=True)  # of length 0, it is what is returned
    if cu_seqlens is None:
        y, final = _scan([q, k, values, g, beta], state, reverse)
        return y.to(v.dtype), final
    ys, finals = [values[:, :0]], [state[:0]]
    for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(cu_seqlens, v.shape[1]))):
        own = [None if value is None else value[:, start:end] for value in (q, k, values, g, beta)]
        y, final = _scan(own, state[s : s + 1], reverse)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1).to(v.dtype), torch.cat(finals)


def _scan(over_time: list[Any], S: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """over_time: q and k for every head, v, g and beta."""
    q, k, v, g, beta = over_time
    length = v.shape[1]
    ys: list[Tensor] = [v] * length
    for t in reversed(range(length)) if reverse else range(length):
        key, u = k[:, t], v[:, t]  # (batch, heads, d_key), (batch, heads, d_value)
        S = S * torch.exp(g[:, t, :, None])  # (batch, heads, d_value, d_key)
        if beta is not None:
            u = beta[:, t, :, None].to(u.dtype) * (u - (S * key[:, :, None]).sum(-1))
        S = S + u[..., None] * key[:, :, None]
        ys[t] = (S * q[:, t, :, None]).sum(-1)  # (batch, heads, d_value)
    return (torch.stack(ys, dim=1) if ys else v), S
