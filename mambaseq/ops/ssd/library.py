"""Registers a forward and a backward as PyTorch operators: `torch.compile` and export see one node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager
from mambaseq.ops.ssd.arguments import SsdArguments

# For x, dt, A, B, C, D, dt_bias and initial_state, in this order, None where the argument is None.
Gradients = tuple[Tensor | None, ...]

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool reverse, bool wants_final_state, int chunk_size"
)


def register(
    name: str,
    forward: Callable[[SsdArguments], tuple[Tensor, Tensor | None]],
    backward: Callable[[SsdArguments, Tensor, Tensor | None], Gradients],
) -> Callable[[SsdArguments], tuple[Tensor, Tensor]]:
    """Make `mambaseq::{name}` and `mambaseq::{name}_backward`; returns what runs them, gradients included.

    Args:
        forward: `(arguments)` → (y, final state, which may be None where it is not wanted).
        backward: `(arguments, dy, dfinal)`; dfinal is None where nothing depends on the final state.
    """

    def run_forward(*values: Any) -> tuple[Tensor, Tensor]:
        y, final = forward(SsdArguments(*values))
        return y, y.new_empty(0, dtype=torch.float32) if final is None else final

    def run_backward(dy: Tensor, dfinal: Tensor | None, *values: Any) -> Gradients:
        return backward(SsdArguments(*values), dy, dfinal)

    def backward_tensors(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        # an operator cannot return None
        return tuple(dy.new_empty(0) if g is None else g for g in run_backward(dy, dfinal, *values))

    def fake_forward(*values: Any) -> tuple[Tensor, Tensor]:
        arguments = SsdArguments(*values)
        _, _, heads, head_dim = arguments.x.shape
        shape: tuple[int, ...] = (0,)
        if arguments.wants_final_state:
            shape = (arguments.n_sequences, heads, head_dim, arguments.B.shape[3])
        y = torch.empty_like(arguments.x, memory_format=torch.contiguous_format)
        return y, arguments.x.new_empty(shape, dtype=torch.float32)

    def fake_backward(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        wanted = _differentiable(SsdArguments(*values))
        return tuple(dy.new_empty(0) if value is None else value.new_empty(value.shape) for value in wanted)

    forward_op = torch.library.custom_op(
        f"mambaseq::{name}", run_forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
    )
    backward_op = torch.library.custom_op(
        f"mambaseq::{name}_backward",
        backward_tensors,
        mutates_args=(),
        schema=f"(Tensor dy, Tensor? dfinal, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given: dict[str, Any] = dict(zip(SsdArguments._fields, inputs, strict=True))
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        ctx.given, ctx.names = given | dict.fromkeys(tensors), list(tensors)
        ctx.save_for_backward(*tensors.values())
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None, find: Callable[..., Gradients]
    ) -> tuple[Any, ...]:
        values = ctx.given | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        arguments = SsdArguments(**values)
        if dy is None:
            dy = torch.zeros_like(arguments.x)
        found = find(dy, dfinal if arguments.wants_final_state else None, *arguments)
        wanted = _differentiable(arguments)
        *first, state = (None if v is None else g for v, g in zip(wanted, found, strict=True))
        return (*first, None, state, None, None, None, None)

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

    def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
        y, final = (Eager.apply if is_eager(*arguments) else forward_op)(*arguments)
        return y, final

    return run


def _differentiable(arguments: SsdArguments) -> Gradients:
    x, dt, A, B, C, D, dt_bias, _, initial_state, *_ = arguments
    return x, dt, A, B, C, D, dt_bias, initial_state
