"""The selective scan's backends as PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.selective_scan.arguments import ScanArguments

# All of `ScanArguments` but the last, which changes nothing in what is computed.
_SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"
)
_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def wanted(arguments: ScanArguments) -> tuple[Tensor | None, ...]:
    """What gets gradients, in their order."""
    return (*arguments[:8], arguments.initial_state)


def scan_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    device_types: str | None = None,
    shape_kept: Callable[[ScanArguments], tuple[int, ...]] | None = None,
) -> Callable[[ScanArguments], Any]:
    """See `Operator`. shape_kept: of a float32 tensor that the forward keeps for the backward, if there is to be one;
    with it the backward is given None for the gradient of a final state that nothing depends on, without it zeros."""

    def fake(a: ScanArguments, keep: bool = False) -> tuple[Tensor, ...]:
        y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
        final = a.x.new_empty((a.n_sequences, *a.A.shape), dtype=working_dtype(a.x, a.A))
        if shape_kept is None:
            return y, final
        return y, final, a.x.new_empty(shape_kept(a) if keep else (0,), dtype=torch.float32)

    keeps = shape_kept is not None
    return register(
        Operator(
            name,
            ScanArguments,
            _SCHEMA,
            _DIFFERENTIABLE,
            forward,
            backward,
            fake,
            kept=int(keeps),
            zeros=not keeps,
            device_types=device_types,
        )
    )
