"""A forward and a backward pass registered as one operator of PyTorch: `torch.compile` and export see one node.

Plain tensors in eager mode go to the same functions directly: the operators' wrappers cost more than short kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager, is_exporting


class Operator(NamedTuple):
    """What makes the operators `mambaseq::{name}` and `mambaseq::{name}_backward`.

    arguments: the NamedTuple of the inputs. schema: the first of them, as PyTorch writes them; what is left out has a
        default and changes no number. Of several outputs, the first has the shape and dtype of the first input.
    differentiable: names of the inputs that get gradients.
    forward: `(a)` → `outputs` tensors that carry gradients, None for one that is not wanted (callers get an empty
        tensor). With `kept`: `(a, keep)` → these and `kept` tensors for the backward, used only if `keep`.
    backward: `(a, *doutputs, *kept)` → the gradients, None for inputs that are None. An output that nothing depends on
        has None, or zeros with `zeros`; the first output has a gradient wherever any has one.
    fake: the same as `forward`, but empty tensors: only shapes, dtypes and devices count.
    prepare: `(a)` → what `forward` and `backward` are given after `a`; made once in eager mode.
    """

    name: str
    arguments: Any
    schema: str
    differentiable: tuple[str, ...]
    forward: Callable[..., tuple[Tensor | None, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    fake: Callable[..., tuple[Tensor | None, ...]]
    outputs: int = 2
    kept: int = 0
    zeros: bool = False
    device_types: str | None = None
    prepare: Callable[[Any], Any] | None = None


def register(op: Operator) -> Callable[[Any], Any]:
    """Register both operators; returns what runs the arguments and gives the outputs."""
    n_inputs = op.schema.count(",") + 1
    names = op.arguments._fields[:n_inputs]
    places = tuple(names.index(name) for name in op.differentiable)

    def made(a: Any) -> tuple[Any, ...]:
        return () if op.prepare is None else (op.prepare(a),)

    def full(found: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """An operator returns no None."""
        first = found[0]
        assert first is not None
        return tuple(first.new_empty(0, dtype=torch.float32) if v is None else v for v in found)

    def run_forward(*values: Any) -> Any:
        a = op.arguments(*values[:n_inputs])
        return _alone(full(op.forward(a, *made(a), *values[n_inputs:])))

    def run_backward(*values: Any) -> Any:
        inputs = values[op.outputs : op.outputs + n_inputs]
        a = op.arguments(*inputs)
        found = op.backward(a, *made(a), *values[: op.outputs], *values[op.outputs + n_inputs :])
        return _alone(tuple(values[0].new_empty(0) if g is None else g for g in found))

    def fake_forward(*values: Any) -> Any:
        return _alone(full(op.fake(op.arguments(*values[:n_inputs]), *values[n_inputs:])))

    def fake_backward(*values: Any) -> Any:
        wanted = (values[op.outputs + place] for place in places)
        return _alone(tuple(values[0].new_empty(0) if v is None else v.new_empty(v.shape) for v in wanted))

    doutputs = ", ".join(["Tensor dy", *(f"Tensor? doutput_{number}" for number in range(1, op.outputs))])
    kept = "".join(f", Tensor kept_{number}" for number in range(op.kept))
    forward_op = torch.library.custom_op(
        f"mambaseq::{op.name}",
        run_forward,
        mutates_args=(),
        device_types=op.device_types,
        schema=f"({op.schema}{', bool keep' if kept else ''}) -> ({', '.join(['Tensor'] * (op.outputs + op.kept))})",
    )
    backward_op = torch.library.custom_op(
        f"mambaseq::{op.name}_backward",
        run_backward,
        mutates_args=(),
        device_types=op.device_types,
        schema=f"({doutputs}, {op.schema}{kept}) -> ({', '.join(['Tensor'] * len(places))})",
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs, output = inputs[:n_inputs], _several(output)
        ctx.plain = [None if isinstance(v, Tensor) else v for v in inputs]
        ctx.tensors = [place for place, v in enumerate(inputs) if isinstance(v, Tensor)]
        ctx.save_for_backward(*(inputs[place] for place in ctx.tensors), *output[op.outputs :])
        ctx.set_materialize_grads(op.zeros)

    def gradients(ctx: Any, given: tuple[Any, ...], find: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
        """One for each input. given: those of the outputs and of what is kept."""
        if all(d is None for d in given[: op.outputs]):
            return (None,) * (n_inputs + bool(kept))
        saved, inputs = ctx.saved_tensors, list(ctx.plain)
        for place, value in zip(ctx.tensors, saved, strict=False):
            inputs[place] = value
        dy = torch.zeros_like(inputs[0]) if given[0] is None else given[0]
        # an output that was not wanted is empty, and so is its gradient
        others = [None if d is None or not (op.zeros or d.numel()) else d for d in given[1 : op.outputs]]
        found = _several(find(dy, *others, *inputs, *saved[len(ctx.tensors) :]))
        result: list[Any] = [None] * (n_inputs + bool(kept))
        for place, gradient in zip(places, found, strict=True):
            result[place] = None if inputs[place] is None else gradient
        return tuple(result)

    forward_op.register_autograd(lambda ctx, *given: gradients(ctx, given, backward_op), setup_context=remember)

    class Eager(torch.autograd.Function):
        """The same without the operators' wrappers."""

        @staticmethod
        def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
            a = op.arguments(*values[:n_inputs])
            ctx.made = made(a)
            outputs = full(op.forward(a, *ctx.made, *values[n_inputs:]))
            remember(ctx, values, outputs)
            ctx.mark_non_differentiable(*outputs[op.outputs :])
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
            prepared, ctx.made = ctx.made, None  # unlike saved tensors it would stay as long as the loss

            def find(*values: Any) -> tuple[Any, ...]:
                a = op.arguments(*values[op.outputs : op.outputs + n_inputs])
                again = made(a) if prepared is None else prepared  # None where the graph is walked a second time
                return op.backward(a, *again, *values[: op.outputs], *values[op.outputs + n_inputs :])

            return gradients(ctx, given, find)

    def run(arguments: Any) -> tuple[Tensor, ...]:
        values = arguments[:n_inputs]
        if kept:
            tensors = (v for v in values if isinstance(v, Tensor))
            values = (*values, torch.is_grad_enabled() and any(v.requires_grad for v in tensors))
        call = Eager.apply if is_eager(*values) else forward_op
        return _several(call(*values))[: op.outputs]

    return run


def exported(
    name: str, arguments: Any, schema: str, run: Callable[[Any], tuple[Tensor, ...]], fake: Callable[..., Any]
) -> Callable[[Any], tuple[Tensor, ...]]:
    """`run`, which is `mambaseq::{name}` while a model is exported.

    The loops of such an op depend on the length; in a graph they would tie it to lengths like the one that it was made
    with. run: `(a)` → tensors; with gradients, for it is run again in the backward pass. arguments, schema, fake: as
    those of an `Operator`.
    """

    def forward(*values: Any) -> Any:
        return tuple(found.clone(memory_format=torch.contiguous_format) for found in run(arguments(*values)))

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plain = [None if isinstance(v, Tensor) else v for v in inputs]
        ctx.places = [place for place, v in enumerate(inputs) if isinstance(v, Tensor)]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))

    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs: list[Any] = list(ctx.plain)
        for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = saved.detach().requires_grad_(ctx.needs_input_grad[place])
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
        with torch.enable_grad():
            outputs = run(arguments(*inputs))
        known = [(y, dy) for y, dy in zip(outputs, doutputs, strict=True) if y.requires_grad]
        ys, dys = zip(*known, strict=True)
        found: list[Tensor | None] = [None] * len(inputs)
        for place, d in zip(
            wanted, torch.autograd.grad(ys, [inputs[place] for place in wanted], dys, allow_unused=True), strict=True
        ):
            found[place] = d
        return tuple(found)

    op = torch.library.custom_op(
        f"mambaseq::{name}", forward, mutates_args=(), schema=f"({schema}) -> (Tensor, Tensor)"
    )
    op.register_fake(lambda *values: fake(arguments(*values)))
    op.register_autograd(backward, setup_context=remember)

    def either(a: Any) -> tuple[Tensor, ...]:
        return tuple(op(*a)) if is_exporting() else run(a)

    return either


def _alone(found: tuple[Tensor, ...]) -> Any:
    """What an operator of PyTorch returns: a single tensor as it is."""
    return found if len(found) > 1 else found[0]


def _several(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)
