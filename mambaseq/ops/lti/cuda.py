"""The time-invariant scan on NVIDIA GPUs: which arguments the kernels take, and how they are handed to launches.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable
from mambaseq.ops.lti import launches, scan
from mambaseq.ops.lti.arguments import LtiArguments
from mambaseq.ops.lti.launches import STATES, Inputs
from mambaseq.ops.selective_scan.cuda import as_rows, why_not_on
from mambaseq.ops.selective_scan.launches import CODES

_ARGUMENTS = (
    "Tensor x, Tensor a, Tensor b, Tensor c, Tensor? D, Tensor? z, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool reverse"
)


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cuda":
        return f"the kernels run on CUDA, x is on {x.device}"
    if (reason := why_not_on(x.device)) is not None:
        return reason
    if x.numel() == 0:
        return "x is empty"
    if x.dtype not in CODES:
        return f"x is {x.dtype}, the kernels compute in float32"
    if arguments.log_decay.shape[1] > STATES:
        return f"there are more than {STATES} states a channel"
    return scan.why_not(arguments)


def run(arguments: LtiArguments, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, D and the gate in it, and the final state. decay: exp of log_decay, where that is known
    already; log_decay is then not read."""
    wide = arguments.state_dtype
    x, log_decay, B, C, state, cu_seqlens, reverse, _, D, z = arguments
    a = torch.exp(log_decay.to(wide)) if decay is None else decay
    values = (x, a, B.to(wide), C.to(wide), D, z, state, cu_seqlens, reverse)
    call = _Eager.apply if is_eager(*values) else _forward_op
    y, final = call(*values)[:2]
    return y, final


def _inputs(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Any, z: Any, state: Any, cu_seqlens: Any, reverse: bool
) -> Inputs:
    batch, length, channels = x.shape
    dtype = x.dtype if z is None or z.dtype == x.dtype else torch.float32
    a, b, c = (value.detach().resolve_conj().contiguous() for value in (a, b, c))
    return Inputs(
        as_rows(x, dtype),
        None if z is None else as_rows(z, dtype),
        a,
        b,
        c,
        None if D is None else D.float().contiguous(),
        None if state is None else state.to(a.dtype).resolve_conj().contiguous(),
        cu_seqlens,
        batch,
        length,
        channels,
        reverse,
    )


def _forward(x: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    with portable.on(x):
        y, final, kept = launches.forward(_inputs(x, *values))
    return y.view(x.shape).to(x.dtype), final, kept


def _backward(dy: Tensor, dfinal: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    *values, kept = rest
    with portable.on(x):
        inputs = _inputs(x, *values)
        dstate = None if dfinal is None else dfinal.resolve_conj().contiguous()
        found = launches.backward(inputs, as_rows(dy, inputs.x.data.dtype), dstate, kept)
    D, z, state = values[3:6]
    return (
        found.dx.view(x.shape).to(x.dtype),
        found.da,
        found.db,
        found.dc,
        None if D is None or found.dD is None else found.dD.to(D.dtype),
        None if z is None or found.dz is None else found.dz.view(z.shape).to(z.dtype),
        None if state is None else found.dinitial.to(state.dtype),
    )


def _backward_tensors(dy: Tensor, dfinal: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
    # an operator cannot return None
    return tuple(dy.new_empty(0) if g is None else g for g in _backward(dy, dfinal, *values))


_forward_op = torch.library.custom_op(
    "mambaseq::lti_scan_cuda",
    _forward,
    mutates_args=(),
    device_types="cuda",
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mambaseq::lti_scan_cuda_backward",
    _backward_tensors,
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor dy, Tensor dfinal, {_ARGUMENTS}, Tensor kept) -> ({', '.join(['Tensor'] * 7)})",
)


@_forward_op.register_fake
def _(x: Tensor, a: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = values[-2]
    n_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = launches.n_kept(n_sequences, x.shape[1], a, cu_seqlens is not None, x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, a.new_empty((n_sequences, *a.shape)), a.new_empty((total, *a.shape) if total else (0,))


@_backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor, *values: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if value is None else value.new_empty(value.shape) for value in values[:7])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor | None, find: Any) -> tuple[Any, ...]:
    *tensors, kept = ctx.saved_tensors
    found = find(dy, dfinal, *tensors, ctx.reverse, kept)
    return (*(None if t is None else g for t, g in zip(tensors[:7], found, strict=True)), None, None)


_forward_op.register_autograd(
    lambda ctx, dy, dfinal, _: _differentiate(ctx, dy, dfinal, _backward_op), setup_context=_remember
)


class _Eager(torch.autograd.Function):
    """The same without the operators' wrappers, which cost more than the kernels of a short sequence."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        outputs = _forward(*values)
        _remember(ctx, values, outputs)
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
        if dy is None:
            dy = torch.zeros_like(ctx.saved_tensors[0])
        return _differentiate(ctx, dy, dfinal, _backward)
