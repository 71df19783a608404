"""Registers a forward and a backward as PyTorch operators: `torch.compile` and export see one node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.eager import is_eager
from mambaseq.ops.selective_scan.arguments import ScanArguments

# For x, dt, A, B, C, D, z, dt_bias and initial_state, in this order, None where the argument is None.
Gradients = tuple[Tensor | None, ...]

# All of `ScanArguments` but the last, which changes nothing in what is computed.
_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"
)
_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Gradients],
    device_types: str | None = None,
    shape_kept: Callable[[ScanArguments], tuple[int, ...]] | None = None,
) -> Callable[[ScanArguments], tuple[Tensor, Tensor]]:
    """Make `mambaseq::{name}` and `mambaseq::{name}_backward`.

    Args:
        forward: `(arguments)` → (y, final state); with `shape_kept`, `(arguments, keep)` → (y, final state, kept).
        backward: `(arguments, dy, dfinal)`; with `shape_kept`, `(arguments, dy, dfinal, kept)`, dfinal None where the
            final state was not used.
        shape_kept: the shape of a float32 tensor that the forward keeps for the backward, if there is to be one;
            without it only inputs are kept.
    """
    keeps = shape_kept is not None

    def run_forward(*values: Any) -> tuple[Tensor, ...]:
        return forward(ScanArguments(*values[:12]), *values[12:])

    def run_backward(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        gradients = backward(ScanArguments(*values[:12]), dy, dfinal, *values[12:])
        # An operator cannot return None.
        return tuple(dy.new_empty(0) if g is None else g for g in gradients)

    def fake_forward(*values: Any) -> tuple[Tensor, ...]:
        arguments = ScanArguments(*values[:12])
        y = torch.empty_like(arguments.x, memory_format=torch.contiguous_format)
        shape = (arguments.n_sequences, *arguments.A.shape)
        final = arguments.x.new_empty(shape, dtype=working_dtype(arguments.x, arguments.A))
        if shape_kept is None:
            return y, final
        kept = shape_kept(arguments) if values[12] else (0,)
        return y, final, arguments.x.new_empty(kept, dtype=torch.float32)

    def fake_backward(dy: Tensor, dfinal: Tensor, *values: Any) -> tuple[Tensor, ...]:
        arguments = ScanArguments(*values[:12])
        wanted = [getattr(arguments, name) for name in _DIFFERENTIABLE]
        return tuple(dy.new_empty(0) if value is None else value.new_empty(value.shape) for value in wanted)

    outputs = ", ".join(["Tensor"] * len(_DIFFERENTIABLE))
    forward_op = torch.library.custom_op(
        f"mambaseq::{name}",
        run_forward,
        mutates_args=(),
        device_types=device_types,
        schema=f"({_ARGUMENTS}{', bool keep' if keeps else ''}) -> (Tensor, Tensor{', Tensor' if keeps else ''})",
    )
    backward_op = torch.library.custom_op(
        f"mambaseq::{name}_backward",
        run_backward,
        mutates_args=(),
        device_types=device_types,
        schema=f"(Tensor dy, Tensor dfinal, {_ARGUMENTS}{', Tensor kept' if keeps else ''}) -> ({outputs})",
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        arguments = ScanArguments(*inputs[:12])
        ctx.dt_softplus, ctx.reverse = arguments.dt_softplus, arguments.reverse
        ctx.save_for_backward(*(v for v in arguments if not isinstance(v, bool)), *output[2:])

    def gradients(
        ctx: Any, dy: Tensor, dfinal: Tensor | None, find: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Any, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, *kept = ctx.saved_tensors
        arguments = ScanArguments(
            x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens, ctx.reverse
        )
        inputs = arguments[:-1]
        found = dict(zip(_DIFFERENTIABLE, find(dy, dfinal, *inputs, *kept), strict=True))
        values = [
            None if value is None else found.get(name)
            for name, value in zip(ScanArguments._fields, inputs, strict=False)
        ]
        return (*values, None) if keeps else tuple(values)

    forward_op.register_autograd(
        lambda ctx, dy, dfinal, *_: gradients(ctx, dy, dfinal, backward_op), setup_context=remember
    )

    class Eager(torch.autograd.Function):
        """The same without the operators' wrappers, which cost more than the kernels of a short sequence."""

        @staticmethod
        def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
            outputs = run_forward(*values)
            remember(ctx, values, outputs)
            ctx.mark_non_differentiable(*outputs[2:])
            ctx.set_materialize_grads(not keeps)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor) -> tuple[Any, ...]:
            if dy is None:
                dy = torch.zeros_like(ctx.saved_tensors[0])
            return gradients(ctx, dy, dfinal, run_backward)

    def run(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
        values: list[Any] = list(arguments[:-1])
        if keeps:
            tensors = [v for v in arguments if isinstance(v, Tensor)]
            values.append(torch.is_grad_enabled() and any(v.requires_grad for v in tensors))
        call = Eager.apply if is_eager(*arguments) else forward_op
        y, final = call(*values)[:2]
        return y, final

    return run
