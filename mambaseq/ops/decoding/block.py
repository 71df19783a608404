"""One step of a whole Mamba-1 block on CPU, for decode loops of a few sequences; or a few steps of one sequence, whose
inputs are known.

Its time is that of reading the weights once, in fp32 or bf16. A thread computes a range of channels from in_proj to the
convolution. When all have added their share of x_proj, it goes on from dt_proj to out_proj.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops.linear import LITTLE_WORK, bits, can_read_few_rows

# positions that one call takes, since their states are all kept
MOST_POSITIONS = 64
# channels that a thread takes at a time; sums over channels are made of them in order
_CHANNELS = 256


class BlockWeights(NamedTuple):
    """Parameters of a Mamba-1 block, of the names and shapes of the published checkpoints."""

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


def can_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether `block_step_` can run: few rows, fp32 or bf16 parameters on CPU, fp32 states, no gradient."""
    states_fit = conv_state.dtype == ssm_state.dtype == torch.float32
    return states_fit and conv_state.is_contiguous() and ssm_state.is_contiguous() and can_read_few_rows(x, *weights)


def block_step_(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> Tensor:
    """One step; changes the states in place.

    Args:
        x: `(batch, d_model)`, fp32 or bf16, as the parameters are; computed in fp32.
        conv_state: `(batch, d_inner, d_conv - 1)` fp32. ssm_state: `(batch, d_inner, d_state)` fp32.

    Returns:
        `(batch, d_model)` in the dtype of x.
    """
    return _run(x, conv_state, ssm_state, weights, False)


def can_run_positions(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether `block_positions` can run; see `can_step`."""
    states_fit = conv_state.dtype == ssm_state.dtype == torch.float32
    return len(x) <= MOST_POSITIONS and len(ssm_state) == 1 and states_fit and can_read_few_rows(x[:1], *weights)


def block_positions(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """What as many calls of `block_step_` give, and the states after each; the weights are read once.

    Args:
        x: `(n, d_model)`, positions of one sequence. conv_state `(1, d_inner, d_conv - 1)`, ssm_state `(1, d_inner,
            d_state)`: before the first; they stay as they are.

    Returns:
        `(n, d_model)` in the dtype of x; `(n, d_inner, d_conv - 1)` and `(n, d_inner, d_state)` fp32.
    """
    kept = [state.new_empty(len(x), *state.shape[1:]) for state in (conv_state, ssm_state)]
    for state, first in zip(kept, (conv_state, ssm_state), strict=True):
        state[:1] = first
    return _run(x, kept[0], kept[1], weights, True), kept[0], kept[1]


def _run(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights, in_order: bool) -> Tensor:
    kernels: Any = importlib.import_module("mambaseq.ops.decoding.kernels")
    team: Any = importlib.import_module("mambaseq.ops.cpu.team")
    w = weights
    batch, d_inner, _ = ssm_state.shape
    n_blocks = -(-d_inner // _CHANNELS)
    y = torch.empty(x.shape, dtype=torch.float32)
    shares = np.empty((n_blocks, batch, w.x_proj.shape[0]), dtype=np.float32)
    out_shares = np.empty((n_blocks, batch, x.shape[1]), dtype=np.float32)
    inner = np.empty((batch, 2 * d_inner), dtype=np.float32)
    arguments = (
        np.zeros(4 * team.STRIDE, dtype=np.int64),
        _CHANNELS,
        x.float().contiguous().numpy(),
        bits(w.in_proj),
        bits(w.in_bias),
        w.in_bias is not None,
        bits(w.conv).reshape(-1),
        bits(w.conv_bias),
        w.conv_bias is not None,
        bits(w.x_proj),
        bits(w.dt_proj),
        bits(w.dt_bias),
        bits(w.A_log).reshape(-1),
        bits(w.D),
        bits(w.out_proj),
        conv_state.view(-1).numpy(),
        ssm_state.view(-1).numpy(),
        inner,
        shares,
        out_shares,
        in_order,
    )
    little = w.in_proj.numel() + w.out_proj.numel() < LITTLE_WORK
    team.run(lambda: kernels.mamba_block(*arguments), 1 if little else n_blocks)
    kernels.sum_of_blocks(out_shares, y.numpy())
    if w.out_bias is not None:
        y += w.out_bias
    return y.to(x.dtype)
