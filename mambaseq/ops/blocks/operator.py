"""A whole block as one operator: what `mamba_block` and `lti_block` share of PyTorch's paperwork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager


class Block(NamedTuple):
    """What makes a block an operator.

    arguments: a NamedTuple of its arguments: tensors or None, the first `differentiable` of which get gradients, and
        last `plain` others, of which the bool `wants_state` is the last. schema: the same as PyTorch writes them.
    kept: how many tensors forward keeps for backward.
    matrices(a): the weights in the dtype that is computed in.
    forward(a, matrices, keep): `(output, conv_state, ssm_state, *kept)`. fake(a, keep): empty tensors of their shapes.
    backward(doutput, dconv_state, dssm_state, a, matrices, *kept): a gradient, or None, for each that gets one.
    """

    name: str
    arguments: Callable[..., Any]
    schema: str
    differentiable: int
    kept: int
    matrices: Callable[[Any], Any]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    fake: Callable[..., tuple[Tensor, ...]]
    plain: int = 1


def register(block: Block) -> Callable[[Any], tuple[Tensor, Tensor, Tensor]]:
    """Register the operator; returns what calls it with the arguments and returns output, conv_state and ssm_state."""
    wanted = block.differentiable

    def run_forward(*values: Any) -> tuple[Tensor, ...]:
        a = block.arguments(*values[:-1])
        return block.forward(a, block.matrices(a), values[-1])

    def run_backward(dout: Tensor, dconv: Tensor | None, dssm: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
        a = block.arguments(*values[: -block.kept])
        found = block.backward(dout, dconv, dssm, a, block.matrices(a), *values[-block.kept :])
        return tuple(dout.new_empty(0) if g is None else g for g in found)  # an operator cannot return None

    kept = ", ".join(f"Tensor kept_{number}" for number in range(block.kept))
    forward_op = torch.library.custom_op(
        f"mambaseq::{block.name}",
        run_forward,
        mutates_args=(),
        device_types="cuda",
        schema=f"({block.schema}, bool keep) -> ({', '.join(['Tensor'] * (3 + block.kept))})",
    )
    backward_op = torch.library.custom_op(
        f"mambaseq::{block.name}_backward",
        run_backward,
        mutates_args=(),
        device_types="cuda",
        schema=f"(Tensor dout, Tensor? dconv, Tensor? dssm, {block.schema}, {kept}) -> "
        f"({', '.join(['Tensor'] * wanted)})",
    )
    forward_op.register_fake(lambda *values: block.fake(block.arguments(*values[:-1]), values[-1]))
    backward_op.register_fake(
        lambda dout, dconv, dssm, *values: tuple(
            dout.new_empty(0) if v is None else v.new_empty(v.shape) for v in values[:wanted]
        )
    )

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values = inputs[:-1]
        tensors, ctx.plain = values[: -block.plain], values[-block.plain :]
        ctx.save_for_backward(*tensors, *output[3:])
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, dout: Tensor | None, dconv: Any, dssm: Any, find: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[: -block.kept], saved[-block.kept :]
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        if not ctx.plain[-1]:
            dconv = dssm = None
        found = find(dout, dconv, dssm, *inputs, *ctx.plain, *kept)
        given = [None if v is None else g for v, g in zip(inputs[:wanted], found, strict=True)]
        return (*given, *[None] * (len(inputs) + block.plain + 1 - wanted))

    forward_op.register_autograd(
        lambda ctx, dout, dconv, dssm, *_: gradients(ctx, dout, dconv, dssm, backward_op), setup_context=remember
    )

    class Eager(torch.autograd.Function):
        """The same without the operators' wrappers; it keeps the matrices that it has cast."""

        @staticmethod
        def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
            a = block.arguments(*values[:-1])
            ctx.matrices = block.matrices(a)
            outputs = block.forward(a, ctx.matrices, values[-1])
            remember(ctx, values, outputs)
            if a.in_proj.dtype == a.x.dtype:
                ctx.matrices = None  # they are the parameters, which are saved
            ctx.mark_non_differentiable(*outputs[3:])
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dout: Tensor | None, dconv: Any, dssm: Any, *_: Tensor) -> tuple[Any, ...]:
            matrices, ctx.matrices = ctx.matrices, None  # unlike saved tensors they would stay as long as the loss

            def find(dout: Tensor, dconv: Any, dssm: Any, *values: Any) -> tuple[Tensor | None, ...]:
                a = block.arguments(*values[: -block.kept])
                return block.backward(dout, dconv, dssm, a, matrices or block.matrices(a), *values[-block.kept :])

            return gradients(ctx, dout, dconv, dssm, find)

    def run(arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.is_grad_enabled() and any(v.requires_grad for v in arguments if isinstance(v, Tensor))
        call = Eager.apply if is_eager(*arguments) else forward_op
        out, conv_state, ssm_state = call(*arguments, keep)[:3]
        return out, conv_state, ssm_state

    return run


def vector(value: Tensor) -> Tensor:
    """In float32, contiguous."""
    return value if value.dtype == torch.float32 and value.is_contiguous() else value.float().contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `(rows, in)` to `(rows, out)`, weight and x of one dtype."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def weight_gradient(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """left^T right in the weight's dtype."""
    if weight.dtype == torch.float32 and left.dtype != torch.float32 and left.is_cuda and torch.version.hip is None:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return (left.t() @ right).to(weight.dtype)
