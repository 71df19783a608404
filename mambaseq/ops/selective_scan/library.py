"""Registers a forward and a backward as PyTorch operators: `torch.compile` and export see one node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.selective_scan.arguments import ScanArguments

Forward = Callable[[ScanArguments], tuple[Tensor, Tensor]]
Backward = Callable[[ScanArguments, Tensor, Tensor], "Gradients"]
# For x, dt, A, B, C, D, z, dt_bias and initial_state, in this order, None where the argument is None.
Gradients = tuple[Tensor | None, ...]

# All of `ScanArguments` but the last, which changes nothing in what is computed.
_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"
)
_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def register(
    name: str, forward: Forward, backward: Backward, device_types: str | None = None
) -> Callable[[ScanArguments], tuple[Tensor, Tensor]]:
    """Make `mambaseq::{name}` and `mambaseq::{name}_backward`; only inputs are kept between the two."""

    def run_forward(*values: Any) -> tuple[Tensor, Tensor]:
        return forward(ScanArguments(*values))

    def run_backward(dy: Tensor, dfinal: Tensor, *values: Any) -> tuple[Tensor, ...]:
        gradients = backward(ScanArguments(*values), dy, dfinal)
        # An operator cannot return None.
        return tuple(dy.new_empty(0) if g is None else g for g in gradients)

    def fake_forward(*values: Any) -> tuple[Tensor, Tensor]:
        arguments = ScanArguments(*values)
        y = torch.empty_like(arguments.x, memory_format=torch.contiguous_format)
        shape = (arguments.n_sequences, *arguments.A.shape)
        return y, arguments.x.new_empty(shape, dtype=working_dtype(arguments.x, arguments.A))

    def fake_backward(dy: Tensor, dfinal: Tensor, *values: Any) -> tuple[Tensor, ...]:
        arguments = ScanArguments(*values)
        wanted = [getattr(arguments, name) for name in _DIFFERENTIABLE]
        return tuple(dy.new_empty(0) if value is None else value.new_empty(value.shape) for value in wanted)

    outputs = ", ".join(["Tensor"] * len(_DIFFERENTIABLE))
    forward_op = torch.library.custom_op(
        f"mambaseq::{name}",
        run_forward,
        mutates_args=(),
        device_types=device_types,
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"mambaseq::{name}_backward",
        run_backward,
        mutates_args=(),
        device_types=device_types,
        schema=f"(Tensor dy, Tensor dfinal, {_ARGUMENTS}) -> ({outputs})",
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        arguments = ScanArguments(*inputs)
        ctx.dt_softplus, ctx.reverse = arguments.dt_softplus, arguments.reverse
        ctx.save_for_backward(*(v for v in arguments if not isinstance(v, bool)))

    def differentiate(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens = ctx.saved_tensors
        arguments = ScanArguments(
            x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens, ctx.reverse
        )
        inputs = arguments[:-1]
        found = dict(zip(_DIFFERENTIABLE, backward_op(dy, dfinal, *inputs), strict=True))
        return tuple(
            None if value is None else found.get(name)
            for name, value in zip(ScanArguments._fields, inputs, strict=False)
        )

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return lambda arguments: forward_op(*arguments[:-1])
