"""A Mamba-1 block on a GPU from in_proj's output on, differentiated as one: what is quick to make again (the output of
the convolution, dt, the gated output) is not kept for the backward pass, and nothing is written twice.

Kept are the input, the products with x_proj and the scan's states before every 16th step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops import sequences
from mambaseq.ops.causal_conv import gpu as conv
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.eager import is_eager
from mambaseq.ops.selective_scan import cuda as scan
from mambaseq.ops.selective_scan.arguments import ScanArguments

_ARGUMENTS = (
    "Tensor xz, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, "
    "Tensor out_proj, Tensor? out_bias, Tensor? conv_state, Tensor? ssm_state, Tensor? cu_seqlens, bool wants_state"
)
_DIFFERENTIABLE = 12  # of them, the first


class BlockArguments(NamedTuple):
    """Parameters have the names and shapes of the published checkpoints.

    xz: `(batch, length, 2 d_inner)`. conv `(d_inner, d_conv)`. conv_state `(sequences, d_inner, d_conv - 1)`,
    ssm_state `(sequences, d_inner, d_state)`, both float32. cu_seqlens as in `selective_scan`.
    """

    xz: Tensor
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    conv_state: Tensor | None = None
    ssm_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    wants_state: bool = True


def why_not(arguments: BlockArguments) -> str | None:
    """The reason why the block cannot run as one, or None."""
    xz, d_state = arguments.xz, arguments.A_log.shape[1]
    if xz.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the input is {xz.dtype}"
    if d_state > scan.STATES:
        return f"there are more than {scan.STATES} states a channel"
    x = xz[..., : arguments.conv.shape[0]]
    reason = conv.why_not(_conv_arguments(arguments, x))
    if reason is None:
        states = xz[..., :d_state]
        reason = scan.why_not(_scan_arguments(arguments, x, x, states, states))
    return reason


def mamba_block(arguments: BlockArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output `(batch, length, d_model)` in the dtype of xz and, if wanted, what `MambaState` holds after
    the last position; all carry gradients. Parameters are used in the dtype of xz, A, D and dt's bias in float32.

    Raises:
        ValueError: the block cannot run as one (see `why_not`), or shapes do not fit.
    """
    if (reason := why_not(arguments)) is not None:
        raise ValueError(f"mamba_block: cannot run these arguments: {reason}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, *arguments.xz.shape[:2])
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in arguments if isinstance(v, Tensor))
    call = _Eager.apply if is_eager(*arguments) else _forward_op
    out, conv_state, ssm_state = call(*arguments, keep)[:3]
    return out, conv_state, ssm_state


def _conv_arguments(a: BlockArguments, x: Tensor) -> ConvArguments:
    return ConvArguments(x, a.conv, a.conv_bias, "silu", a.conv_state, a.cu_seqlens, False, a.wants_state)


def _scan_arguments(a: BlockArguments, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None = None) -> Any:
    A = a.A_log if A is None else A
    z = a.xz[..., a.conv.shape[0] :]
    return ScanArguments(u, dt, A, B, C, a.D, z, a.dt_bias, True, a.ssm_state, a.cu_seqlens, False, a.wants_state)


def _split(a: BlockArguments, products: Tensor) -> tuple[Tensor, ...]:
    """dt before dt_proj, B and C: views of the products with x_proj or of their gradients."""
    d_state = a.A_log.shape[1]
    return products.split([products.shape[-1] - 2 * d_state, d_state, d_state], dim=-1)


def _forward(a: BlockArguments, keep: bool) -> tuple[Tensor, ...]:
    dtype = a.xz.dtype
    u, conv_state = conv.forward_into(_conv_arguments(a, a.xz[..., : a.conv.shape[0]]))
    products = u @ a.x_proj.to(dtype).t()
    low, B, C = _split(a, products)
    dt = low @ a.dt_proj.to(dtype).t()
    A = -torch.exp(a.A_log.float())
    y, ssm_state, kept = scan.forward(_scan_arguments(a, u, dt, B, C, A), keep)
    out = torch.nn.functional.linear(y, a.out_proj.to(dtype), None if a.out_bias is None else a.out_bias.to(dtype))
    if conv_state is None or not a.wants_state:
        conv_state, ssm_state = (out.new_empty(0, dtype=torch.float32) for _ in range(2))
    return out, conv_state, ssm_state, products, kept


def _backward(
    dout: Tensor, dconv: Tensor | None, dssm: Tensor | None, a: BlockArguments, products: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    dtype, d_inner = a.xz.dtype, a.conv.shape[0]
    x_proj, dt_proj, out_proj = (w.to(dtype) for w in (a.x_proj, a.dt_proj, a.out_proj))
    A = -torch.exp(a.A_log.float())
    dout = dout.to(dtype)
    conv_arguments = _conv_arguments(a, a.xz[..., :d_inner])._replace(wants_final_state=False)
    u, _ = conv.forward_into(conv_arguments)
    low, B, C = _split(a, products)
    dt = low @ dt_proj.t()
    dxz, dproducts, gated = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (a.xz, products, u))
    dlow, dB, dC = _split(a, dproducts)
    into = scan.Into(dxz[..., d_inner:], gated, dB, dC)
    arguments = _scan_arguments(a, u, dt, B, C, A)
    du, ddt, dA, _, _, dD, _, ddt_bias, dinitial = scan.backward(arguments, dout @ out_proj, dssm, kept, into)
    assert du is not None
    assert ddt is not None
    assert dA is not None

    dout_proj = _product(dout, gated, a.out_proj)
    del gated
    rows = ddt.flatten(0, 1)
    torch.mm(rows, dt_proj, out=dlow.flatten(0, 1))
    ddt_proj = _product(ddt, low, a.dt_proj)
    dx_proj = _product(dproducts, u, a.x_proj)
    du.flatten(0, 1).addmm_(dproducts.flatten(0, 1), x_proj)
    dconv_weight, dconv_bias, dconv_state = conv.backward_into(conv_arguments, du, dconv, dxz[..., :d_inner])[1:]
    found = (
        dxz,
        dconv_weight,
        dconv_bias,
        dx_proj,
        ddt_proj,
        ddt_bias,
        (dA * A).to(a.A_log.dtype),
        dD,
        dout_proj,
        None if a.out_bias is None else dout.sum((0, 1)).to(a.out_bias.dtype),
        dconv_state,
        None if a.ssm_state is None else dinitial,
    )
    return tuple(dout.new_empty(0) if g is None else g for g in found)


def _product(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight, left^T right, in the weight's dtype."""
    left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
    if weight.dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(weight.dtype)


def _run_forward(*values: Any) -> tuple[Tensor, ...]:
    *arguments, keep = values
    return _forward(BlockArguments(*arguments), keep)


def _run_backward(dout: Tensor, dconv: Tensor | None, dssm: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
    *arguments, products, kept = values
    return _backward(dout, dconv, dssm, BlockArguments(*arguments), products, kept)


_forward_op = torch.library.custom_op(
    "mambaseq::mamba_block",
    _run_forward,
    mutates_args=(),
    device_types="cuda",
    schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mambaseq::mamba_block_backward",
    _run_backward,
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor dout, Tensor? dconv, Tensor? dssm, {_ARGUMENTS}, Tensor products, Tensor kept) -> "
    f"({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)


@_forward_op.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    *arguments, keep = values
    a = BlockArguments(*arguments)
    batch, length, _ = a.xz.shape
    d_inner, d_conv = a.conv.shape
    n_sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    out = a.xz.new_empty(batch, length, a.out_proj.shape[0])
    d_state = a.A_log.shape[1]
    shapes = [(n_sequences, d_inner, d_conv - 1), (n_sequences, d_inner, d_state)] if a.wants_state else [(0,), (0,)]
    states = [out.new_empty(shape, dtype=torch.float32) for shape in shapes]
    products = a.xz.new_empty(batch, length, a.x_proj.shape[0])
    x, B = a.xz[..., :d_inner], products[..., :d_state]
    shape = scan.shape_kept(_scan_arguments(a, x, x, B, B)) if keep else (0,)
    return out, *states, products, out.new_empty(shape, dtype=torch.float32)


@_backward_op.register_fake
def _(dout: Tensor, dconv: Tensor | None, dssm: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
    wanted = values[:_DIFFERENTIABLE]
    return tuple(dout.new_empty(0) if v is None else torch.empty_like(v).contiguous() for v in wanted)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants_state = inputs[13]
    ctx.save_for_backward(*inputs[:13], *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dconv: Any, dssm: Any, find: Any) -> tuple[Any, ...]:
    *inputs, products, kept = ctx.saved_tensors
    if dout is None:
        xz, out_proj = inputs[0], inputs[8]
        dout = xz.new_zeros(*xz.shape[:2], out_proj.shape[0])
    if not ctx.wants_state:
        dconv = dssm = None
    found = find(dout, dconv, dssm, *inputs, ctx.wants_state, products, kept)
    gradients = [None if v is None else g for v, g in zip(inputs[:_DIFFERENTIABLE], found, strict=True)]
    return (*gradients, None, None, None)


_forward_op.register_autograd(
    lambda ctx, dout, dconv, dssm, *_: _gradients(ctx, dout, dconv, dssm, _backward_op), setup_context=_remember
)


class _Eager(torch.autograd.Function):
    """The same without the operators' wrappers."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        outputs = _run_forward(*values)
        _remember(ctx, values, outputs)
        ctx.mark_non_differentiable(*outputs[3:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dconv: Any, dssm: Any, *_: Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, dout, dconv, dssm, _run_backward)
