"""Registers a forward and a backward as PyTorch operators: `torch.compile` and export see one node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.eager import is_eager

# For x, weight, bias and initial_state, in this order, None where the argument is None.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool reverse, bool wants_final_state"
)


def register(
    name: str,
    forward: Callable[[ConvArguments], tuple[Tensor, Tensor | None]],
    backward: Callable[[ConvArguments, Tensor, Tensor | None], Gradients],
    device_types: str | None = None,
) -> Callable[[ConvArguments], tuple[Tensor, Tensor]]:
    """Make `mambaseq::{name}` and `mambaseq::{name}_backward`; returns what runs them, gradients included.

    Args:
        forward: `(arguments)` → (y, final state, which may be None where it is not wanted).
        backward: `(arguments, dy, dfinal)`; dfinal is None where nothing depends on the final state.
    """

    def run_forward(*values: Any) -> tuple[Tensor, Tensor]:
        arguments = ConvArguments(*values)
        y, final = forward(arguments)
        if final is None or not arguments.wants_final_state:
            final = y.new_empty(0, dtype=torch.float32)
        return y, final

    def run_backward(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        gradients = backward(ConvArguments(*values), dy, dfinal)
        # An operator cannot return None.
        return tuple(dy.new_empty(0) if g is None else g for g in gradients)

    def fake_forward(*values: Any) -> tuple[Tensor, Tensor]:
        arguments = ConvArguments(*values)
        channels, width = arguments.weight.shape
        shape = (arguments.n_sequences, channels, width - 1) if arguments.wants_final_state else (0,)
        y = torch.empty_like(arguments.x, memory_format=torch.contiguous_format)
        return y, arguments.x.new_empty(shape, dtype=torch.float32)

    def fake_backward(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        arguments = ConvArguments(*values)
        wanted = (arguments.x, arguments.weight, arguments.bias, arguments.initial_state)
        return tuple(dy.new_empty(0) if value is None else value.new_empty(value.shape) for value in wanted)

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
        schema=f"(Tensor dy, Tensor? dfinal, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.activation, state, cu_seqlens, ctx.reverse, ctx.wants_final_state = inputs
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None, find: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Any, ...]:
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        if not ctx.wants_final_state:
            dfinal = None
        rest = (x, weight, bias, ctx.activation, state, cu_seqlens, ctx.reverse, ctx.wants_final_state)
        dx, dweight, dbias, dstate = find(dy, dfinal, *rest)
        return (
            dx,
            dweight,
            None if bias is None else dbias,
            None,
            None if state is None else dstate,
            None,
            None,
            None,
        )

    forward_op.register_autograd(
        lambda ctx, dy, dfinal: gradients(ctx, dy, dfinal, backward_op), setup_context=remember
    )

    class Eager(torch.autograd.Function):
        """The same without the operators' wrappers, which cost more than the kernels of a short sequence."""

        @staticmethod
        def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor]:
            outputs = run_forward(*values)
            remember(ctx, values, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
            return gradients(ctx, dy, dfinal, run_backward)

    def run(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
        y, final = (Eager.apply if is_eager(*arguments) else forward_op)(*arguments)
        return y, final

    return run
