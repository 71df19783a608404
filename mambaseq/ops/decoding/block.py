"""One step of Mamba-1 layers, or of a block by itself, on CPU, for decode loops of a few sequences; or a few steps of
one sequence, whose inputs are known.

Its time is that of reading the weights once, in fp32 or bf16: one kernel takes all layers that follow each other
(`block_kernels.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops.linear import LITTLE_WORK, bits, can_read_few_rows, can_read_rows

# positions that one call takes, since their states are all kept
MOST_POSITIONS = 64


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


class Layer(NamedTuple):
    """A residual layer: the weight and the epsilon of its RMSNorm, its block and the states of it."""

    norm: Tensor
    eps: float
    weights: BlockWeights
    conv_state: Tensor
    ssm_state: Tensor


def can_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether `block_step_` can run: few rows, fp32 or bf16 parameters on CPU, fp32 states, no gradient."""
    return _fit(conv_state, ssm_state) and can_read_few_rows(x, *weights)


def block_step_(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> Tensor:
    """One step; changes the states in place.

    Args:
        x: `(batch, d_model)`, fp32 or bf16, as the parameters are; computed in fp32.
        conv_state: `(batch, d_inner, d_conv - 1)` fp32. ssm_state: `(batch, d_inner, d_state)` fp32.

    Returns:
        `(batch, d_model)` in the dtype of x.
    """
    return _block(x, conv_state, ssm_state, weights, False)


def can_run_positions(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether `block_positions` can run; see `can_step`."""
    return len(x) <= MOST_POSITIONS and len(ssm_state) == 1 and can_step(x[:1], conv_state, ssm_state, weights)


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
    kept = _with_room(conv_state, len(x)), _with_room(ssm_state, len(x))
    return _block(x, *kept, weights, True), *kept


def can_step_layer(stream: Tensor, layer: Layer) -> bool:
    """Whether `layers_step_` can run with this layer; see `can_step`. stream `(batch, d_model)`."""
    dtype = layer.norm.dtype
    return _fit(layer.conv_state, layer.ssm_state) and can_read_rows(stream, dtype, layer.norm, *layer.weights)


def layers_step_(stream: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The residual stream `(batch, d_model)` fp32 after a step of these layers, which are of one dtype; it stays as it
    is, the states are changed in place. A sequence's result does not depend on the others."""
    stream = stream.clone(memory_format=torch.contiguous_format)
    _run(stream, stream, layers, True, False)
    return stream


def layers_positions(stream: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """What as many calls of `layers_step_` give for positions `(n, d_model)` of one sequence, `n` at most
    `MOST_POSITIONS`, and the states after each, as of `block_positions`, of each layer."""
    stream = stream.clone(memory_format=torch.contiguous_format)
    kept = [
        layer._replace(
            conv_state=_with_room(layer.conv_state, len(stream)), ssm_state=_with_room(layer.ssm_state, len(stream))
        )
        for layer in layers
    ]
    _run(stream, stream, kept, True, True)
    return stream, [(layer.conv_state, layer.ssm_state) for layer in kept]


def _fit(conv_state: Tensor, ssm_state: Tensor) -> bool:
    alike = conv_state.dtype == ssm_state.dtype == torch.float32
    return alike and conv_state.is_contiguous() and ssm_state.is_contiguous()


def _with_room(state: Tensor, n: int) -> Tensor:
    """The state of one sequence as the first of n, the others to be made."""
    room = state.new_empty(n, *state.shape[1:])
    room[:1] = state
    return room


def _block(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights, in_order: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    _run(x.float().contiguous(), y, [(None, 0.0, weights, conv_state, ssm_state)], False, in_order)
    return y.to(x.dtype)


def _run(x: Tensor, y: Tensor, layers: Sequence[Any], adds: bool, in_order: bool) -> None:
    """layers: as `Layer`, or without a norm, one by itself."""
    kernels: Any = importlib.import_module("mambaseq.ops.decoding.block_kernels")
    team: Any = importlib.import_module("mambaseq.ops.cpu.team")
    rows, d_model = x.shape
    table = np.empty((len(layers), kernels.COLUMNS), dtype=np.int64)
    eps = np.empty(len(layers), dtype=np.float32)
    width, projected, work = 0, 0, 0
    for number, (norm, epsilon, w, conv_state, ssm_state) in enumerate(layers):
        d_inner, d_state = ssm_state.shape[1:]
        dt_rank = w.dt_proj.shape[1]
        addresses = (0 if value is None else value.data_ptr() for value in (norm, *w, conv_state, ssm_state))
        table[number] = (d_model, d_inner, d_state, dt_rank, conv_state.shape[2], *addresses)
        eps[number] = epsilon
        width, projected = max(width, d_inner), max(projected, dt_rank + 2 * d_state)
        work = max(work, 3 * d_inner * d_model)
    arguments = (
        np.zeros(len(layers) * kernels.COUNTERS, dtype=np.int64),
        table,
        eps,
        bits(layers[0][2].in_proj),
        x.numpy(),
        y.numpy(),
        adds,
        in_order,
        np.empty((rows, 2 * width), dtype=np.float32),
        np.empty((rows, projected), dtype=np.float32),
    )
    portions = 1 if work < LITTLE_WORK else -(-width // kernels.CHANNELS)
    team.run(lambda: kernels.mamba_layers(*arguments), portions)
