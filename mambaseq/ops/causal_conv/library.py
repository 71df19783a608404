"""The causal convolution's backends as PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.operators import Operator, register

_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool reverse, bool wants_final_state"
)
_DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")


def _fake(a: ConvArguments) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    shape = (a.n_sequences, a.weight.shape[0], a.weight.shape[1] - 1)
    return y, a.x.new_empty(shape, dtype=torch.float32) if a.wants_final_state else None


def conv_operator(
    name: str,
    forward: Callable[[ConvArguments], tuple[Tensor, Tensor | None]],
    backward: Callable[[ConvArguments, Tensor, Tensor | None], tuple[Tensor | None, ...]],
    device_types: str | None = None,
) -> Callable[[ConvArguments], Any]:
    """See `Operator`. The gradient of the final state is None where nothing depends on it."""
    return register(
        Operator(name, ConvArguments, _SCHEMA, _DIFFERENTIABLE, forward, backward, _fake, device_types=device_types)
    )
