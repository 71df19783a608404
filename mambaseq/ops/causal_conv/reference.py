"""The definition of the causal convolution as a sum of shifted products, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.dtypes import working_dtype


def run(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state. Computed in float64 if x is float64, otherwise in float32."""
    x, weight, bias, activation, state, cu_seqlens, reverse, _ = arguments
    real = working_dtype(x)
    channels, width = weight.shape
    u, weight = x.to(real), weight.to(real)
    if state is None:
        state = u.new_zeros(arguments.n_sequences, channels, width - 1)
    history = state.to(real).transpose(1, 2)  # (sequences, width - 1, channels)

    if cu_seqlens is None:
        y, final = _convolve(u.flip(1) if reverse else u, history, weight)
    else:
        # Each sequence gets room for its history in front of it; `place` is where a position moves to.
        if reverse:
            cu_seqlens, u, history = sequences.flipped(cu_seqlens), u.flip(1), history.flip(0)
        y, final = _convolve_packed(u[0], history, weight, cu_seqlens.long())
        if reverse:
            final = final.flip(0)
    if reverse:
        y = y.flip(1)

    if bias is not None:
        y = y + bias.to(real)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final.transpose(1, 2).contiguous()  # the state: (sequences, channels, width - 1)


def _convolve(u: Tensor, history: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    length, width = u.shape[1], weight.shape[1]
    padded = torch.cat([history, u], dim=1)  # (batch, width - 1 + length, channels)
    y = padded[:, :length] * weight[:, 0]
    for k in range(1, width):
        y = y + padded[:, k : k + length] * weight[:, k]
    return y, padded[:, length:]


def _convolve_packed(u: Tensor, history: Tensor, weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """u `(length, channels)`, history `(sequences, width - 1, channels)`."""
    length, channels = u.shape
    n_sequences, before = history.shape[:2]
    device = u.device
    place = torch.arange(length, device=device)
    place = place + before * (sequences.of_positions(cu_seqlens, length) + 1)
    steps = torch.arange(before, device=device)
    room = before * torch.arange(n_sequences, device=device)
    padded = u.new_zeros(length + n_sequences * before, channels)
    padded = padded.index_copy(0, place, u)
    places_of_history = (cu_seqlens[:-1] + room)[:, None] + steps  # (sequences, width - 1)
    # (length + sequences * (width - 1), channels)
    padded = padded.index_copy(0, places_of_history.flatten(), history.reshape(-1, channels))
    y = padded[place - before] * weight[:, 0]
    for k in range(1, before + 1):
        y = y + padded[place - before + k] * weight[:, k]
    places_of_final = (cu_seqlens[1:] + room)[:, None] + steps  # (sequences, width - 1)
    return y[None], padded[places_of_final]  # (1, length, channels), (sequences, width - 1, channels)
