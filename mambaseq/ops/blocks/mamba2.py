"""A Mamba-2 block on a GPU as one operator, like `mamba_block`. What is cheap to compute (the convolution's output,
decays and states, the gated norm) is computed again in the backward pass instead of being stored.

Stored are the input, the product of in_proj and the output of the state-space dual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.blocks.parts import (
    Block,
    block_operator,
    convolution,
    linear,
    weight_gradient,
    why_not_sizes,
)
from mambaseq.ops.causal_conv import gpu as conv
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.gpu import portable
from mambaseq.ops.norm import gpu as norm
from mambaseq.ops.norm.arguments import GatedNormArguments
from mambaseq.ops.ssd import gpu as dual
from mambaseq.ops.ssd.arguments import SsdArguments

_SCHEMA = (
    "Tensor x, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, "
    "Tensor D, Tensor norm, Tensor out_proj, Tensor? out_bias, Tensor? conv_state, Tensor? ssm_state, "
    "Tensor? cu_seqlens, int n_groups, float eps, bool norm_before_gate, bool wants_state"
)
_DIFFERENTIABLE = 13  # of them, the first
_ALIGNED = 16


class Mamba2BlockArguments(NamedTuple):
    """Parameters have the names and shapes of the published checkpoints; d_inner = heads * head_dim.

    x: `(batch, length, d_model)`. conv `(d_inner + 2 * n_groups * d_state, 1, d_conv)`, dt_bias, A_log and D
    `(heads,)`, norm `(d_inner,)`. States are those of `Mamba2State`. cu_seqlens as in `ssd`.
    """

    x: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    cu_seqlens: Tensor | None
    n_groups: int
    eps: float
    norm_before_gate: bool
    wants_state: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """batch, length, d_inner."""
        return self.x.shape[0], self.x.shape[1], self.norm.shape[0]

    @property
    def head_dim(self) -> int:
        return self.norm.shape[0] // self.dt_bias.shape[0]

    @property
    def d_state(self) -> int:
        return (self.conv.shape[0] - self.norm.shape[0]) // (2 * self.n_groups)


def why_not(arguments: Mamba2BlockArguments) -> str | None:
    """The reason why the block cannot run as one, or None."""
    x = arguments.x
    if (reason := portable.why_not(x.device.type)) is not None:
        return reason
    if x.dtype not in dual.DTYPES:
        return f"x is {x.dtype}, the kernels multiply matrices of bfloat16 or float16"
    if (reason := why_not_sizes(arguments)) is not None:
        return reason
    if arguments.head_dim > dual.MOST_HEAD_DIM or arguments.d_state > dual.MOST_STATES:
        return f"heads are {arguments.head_dim} wide and have {arguments.d_state} states"
    return norm.why_not_gated(GatedNormArguments(x, x, arguments.norm, group_size=_group(arguments)))


def _group(a: Mamba2BlockArguments) -> int:
    """Channels that are normed together."""
    return a.norm.shape[0] // a.n_groups


def _split(a: Mamba2BlockArguments, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate `(batch * length, d_inner)`, what is convolved `(batch, length, channels)` and dt `(batch, length,
    heads)`: views of in_proj's product or of its gradient."""
    batch, length, d_inner = a.sizes
    rows = product.view(batch, length, -1)  # (batch, length, width)
    end = d_inner + a.conv.shape[0]
    return product[:, :d_inner], rows[..., d_inner:end], rows[..., end:]


def _strides(a: Mamba2BlockArguments) -> tuple[int, int]:
    """Strides of in_proj's product: rows are aligned, so that kernels read and write many numbers at a time."""
    return -(-a.in_proj.shape[0] // _ALIGNED) * _ALIGNED, 1


def _room(a: Mamba2BlockArguments) -> Tensor:
    """Memory for in_proj's product or its gradient, `(batch * length, width)`."""
    shape, strides = (a.x.shape[0] * a.x.shape[1], a.in_proj.shape[0]), _strides(a)
    if a.x.device.type == "cpu":  # whose bf16 products read what is between rows, and 0 times NaN is NaN
        return a.x.new_zeros(shape[0], strides[0])[:, : shape[1]]
    return torch.empty_strided(shape, strides, dtype=a.x.dtype, device=a.x.device)


def _heads(a: Mamba2BlockArguments, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x `(batch, length, heads, head_dim)`, B and C `(batch, length, n_groups, d_state)`: views."""
    d_inner, width = a.norm.shape[0], a.n_groups * a.d_state
    x, B, C = xBC.split([d_inner, width, width], dim=-1)
    B, C = (M.unflatten(-1, (a.n_groups, a.d_state)) for M in (B, C))
    return x.unflatten(-1, (-1, a.head_dim)), B, C


def _conv_arguments(a: Mamba2BlockArguments, product: Tensor) -> ConvArguments:
    return convolution(a, _split(a, product)[1])


def _dual_arguments(a: Mamba2BlockArguments, product: Tensor, xBC: Tensor) -> SsdArguments:
    x, B, C = _heads(a, xBC)
    dt, A = _split(a, product)[2], -torch.exp(a.A_log.float())
    return SsdArguments(
        x, dt, A, B, C, a.D, a.dt_bias, True, a.ssm_state, a.cu_seqlens, wants_final_state=a.wants_state
    )


class _Matrices(NamedTuple):
    """The weight matrices, cast to the dtype of x."""

    in_proj: Tensor
    out_proj: Tensor


def _matrices(a: Mamba2BlockArguments) -> _Matrices:
    return _Matrices(a.in_proj.to(a.x.dtype), a.out_proj.to(a.x.dtype))


def _forward(a: Mamba2BlockArguments, m: _Matrices, keep: bool) -> tuple[Tensor, ...]:
    batch, length, d_inner = a.sizes
    with portable.on(a.x), torch.autocast(a.x.device.type, enabled=False):
        hidden = a.x.reshape(batch * length, -1)
        if a.in_bias is None:
            product = torch.mm(hidden, m.in_proj.t(), out=_room(a))
        else:
            product = linear(hidden, m.in_proj, a.in_bias)
        xBC, conv_state = conv.forward_into(_conv_arguments(a, product))
        y, ssm_state = dual.forward_into(_dual_arguments(a, product, xBC))
        del xBC
        y = y.view(batch * length, d_inner)  # (rows, d_inner)
        normed, _ = norm.gated_forward(y, _split(a, product)[0], a.norm, a.eps, _group(a), a.norm_before_gate)
        out = linear(normed, m.out_proj, a.out_bias).view(batch, length, -1)  # (batch, length, d_model)
    if conv_state is None or ssm_state is None:
        conv_state, ssm_state = (out.new_empty(0, dtype=torch.float32) for _ in range(2))
    return out, conv_state, ssm_state, product, y


def _backward(
    a: Mamba2BlockArguments,
    m: _Matrices,
    dout: Tensor,
    dconv: Tensor | None,
    dssm: Tensor | None,
    product: Tensor,
    y: Tensor,
) -> tuple[Tensor | None, ...]:
    batch, length, _ = a.sizes
    with portable.on(a.x), torch.autocast(a.x.device.type, enabled=False):
        hidden = a.x.reshape(batch * length, -1)
        dout = dout.to(product.dtype).reshape(batch * length, -1)  # (rows, d_model)
        gate = _split(a, product)[0]
        dproduct = _room(a)
        dgate, dx_of_conv, ddt = _split(a, dproduct)

        normed, rstd = norm.gated_forward(y, gate, a.norm, a.eps, _group(a), a.norm_before_gate)
        dout_proj = weight_gradient(dout, normed, a.out_proj)
        del normed
        dnormed = dout @ m.out_proj
        dy, _, dnorm = norm.gated_backward(dnormed, y, gate, a.norm, rstd, _group(a), a.norm_before_gate, dz=dgate)
        del dnormed

        conv_arguments = _conv_arguments(a, product)._replace(wants_final_state=False)
        xBC, _ = conv.forward_into(conv_arguments)
        dxBC = torch.empty_like(xBC)
        arguments = _dual_arguments(a, product, xBC)
        dx, dB, dC = _heads(a, dxBC)
        found = dual.backward_into(arguments, dy.view(arguments.x.shape), dssm, dual.Into(dx, ddt, dB, dC))
        del xBC, dy
        _, dconv_weight, dconv_bias, dconv_state = conv.backward_into(conv_arguments, dxBC, dconv, dx_of_conv)
        del dxBC
        dA, dD, ddt_bias, dstate = found[2], *found[5:]
        assert dA is not None
        return (
            (dproduct @ m.in_proj).view(a.x.shape),
            weight_gradient(dproduct, hidden, a.in_proj),
            None if a.in_bias is None else dproduct.sum(0).to(a.in_bias.dtype),
            dconv_weight.view(a.conv.shape),
            dconv_bias,
            ddt_bias,
            (dA * arguments.A).to(a.A_log.dtype),
            dD,
            dnorm,
            dout_proj,
            None if a.out_bias is None else dout.sum(0).to(a.out_bias.dtype),
            dconv_state,
            dstate,
        )


def _fake(a: Mamba2BlockArguments, keep: bool) -> tuple[Tensor, ...]:
    batch, length, d_inner = a.sizes
    n_sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    conv_shape = (n_sequences, a.conv.shape[0], a.conv.shape[-1] - 1)
    product = _room(a) if a.in_bias is None else a.x.new_empty(batch * length, a.in_proj.shape[0])
    ssm_shape = (n_sequences, a.dt_bias.shape[0], a.head_dim, a.d_state)
    return (
        a.x.new_empty(batch, length, a.out_proj.shape[0]),
        a.x.new_empty(conv_shape if a.wants_state else (0,), dtype=torch.float32),
        a.x.new_empty(ssm_shape if a.wants_state else (0,), dtype=torch.float32),
        product,
        a.x.new_empty(batch * length, d_inner),
    )


mamba2_block = block_operator(
    Block(
        "mamba2_block",
        Mamba2BlockArguments,
        _SCHEMA,
        _DIFFERENTIABLE,
        2,
        _matrices,
        _forward,
        _backward,
        _fake,
        why_not,
    )
)
