"""The definition of the scan of dense linear systems: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.state_space.arguments import StateSpaceArguments


def run(arguments: StateSpaceArguments) -> tuple[Tensor, Tensor]:
    """y and the final state, in the working precision."""
    x, A, B, C, state, cu_seqlens, _ = arguments
    wide, channels = arguments.dtype, x.shape[2]
    x = x.to(wide)
    A, B, C = (value.to(wide).repeat_interleave(channels // A.shape[0], 0) for value in (A, B, C))  # (channels, ...)
    if state is None:
        state = x.new_zeros(arguments.n_sequences, *B.shape)
    state = state.to(wide, copy=True)  # of length 0, it is what is returned
    if cu_seqlens is None:
        return _scan(x, A, B, C, state)
    ys, finals = [_nothing(x, C)], [state[:0]]
    for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(cu_seqlens, x.shape[1]))):
        y, final = _scan(x[:, start:end], A, B, C, state[s : s + 1])
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1), torch.cat(finals)


def _scan(x: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    ys = [_nothing(x, C)]
    for t in range(x.shape[1]):
        h = torch.einsum("cnk,bck->bcn", A, h) + B * x[:, t, :, None]  # (batch, channels, d_state)
        ys.append(torch.einsum("cmn,bcn->bcm", C, h)[:, None])  # (batch, 1, channels, outputs)
    return torch.cat(ys, dim=1), h


def _nothing(x: Tensor, C: Tensor) -> Tensor:
    """y of no steps."""
    return x[:, :0, :, None].expand(-1, -1, -1, C.shape[1])  # (batch, 0, channels, outputs)
