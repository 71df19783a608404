"""The definition of the time-invariant scan: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.lti.arguments import LtiArguments


def run(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    """y in the working precision, float64 if x is float64 and otherwise float32, and the final state."""
    x, log_decay, B, C, state, cu_seqlens, reverse = arguments[:7]
    wide = arguments.state_dtype
    x, decay, B, C = x.to(arguments.real_dtype), torch.exp(log_decay.to(wide)), B.to(wide), C.to(wide)
    if state is None:
        state = decay.new_zeros(arguments.n_sequences, *decay.shape)
    state = state.to(wide, copy=True)  # of length 0, it is what is returned
    if cu_seqlens is None:
        return _scan(x, decay, B, C, state, reverse)
    ys, finals = [x[:, :0]], [state[:0]]
    for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(cu_seqlens, x.shape[1]))):
        y, final = _scan(x[:, start:end], decay, B, C, state[s : s + 1], reverse)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1), torch.cat(finals)


def _scan(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    ys: list[Tensor] = [x] * length
    for t in reversed(range(length)) if reverse else range(length):
        h = decay * h + B * x[:, t, :, None]  # (batch, channels, d_state)
        y = (h * C).sum(-1)
        ys[t] = 2 * y.real if y.is_complex() else y
    return (torch.stack(ys, dim=1) if ys else x), h  # (batch, length, channels)
