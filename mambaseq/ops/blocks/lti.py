"""The time-invariant variant of the Mamba-1 block on a GPU as one operator, like `mamba_block`. The convolution's
output and the gated output are computed again in the backward pass.

Stored are the input, the product of in_proj and the state that entered each segment of the scan.
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
    vector,
    weight_gradient,
    why_not_cuda,
    why_not_sizes,
)
from mambaseq.ops.causal_conv import gpu as conv
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.gpu import portable
from mambaseq.ops.lti import launches as scan
from mambaseq.ops.selective_scan.launches import Rows

_SCHEMA = (
    "Tensor x, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor decay, Tensor B, Tensor C, "
    "Tensor D, Tensor out_proj, Tensor? out_bias, Tensor? conv_state, Tensor? ssm_state, Tensor? cu_seqlens, "
    "bool wants_state"
)
_DIFFERENTIABLE = 13  # of them, the first


class LtiBlockArguments(NamedTuple):
    """decay, B, C: `(d_inner, d_state)`, float32 or complex64: Abar, Bbar and C of `lti_scan`. The others are those of
    `mamba_block`; ssm_state is of the dtype of decay."""

    x: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    conv_state: Tensor | None = None
    ssm_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    wants_state: bool = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """batch, length, d_inner."""
        return self.x.shape[0], self.x.shape[1], self.conv.shape[0]


def why_not(arguments: LtiBlockArguments) -> str | None:
    """The reason why the block cannot run as one, or None."""
    if (reason := why_not_cuda(arguments.x) or why_not_sizes(arguments)) is not None:
        return reason
    return f"there are more than {scan.STATES} states a channel" if arguments.decay.shape[1] > scan.STATES else None


def _conv_arguments(a: LtiBlockArguments, xz: Tensor) -> ConvArguments:
    batch, length, d_inner = a.sizes
    return convolution(a, xz.view(batch, length, -1)[..., :d_inner])  # x (batch, length, d_inner)


def _scan_inputs(a: LtiBlockArguments, xz: Tensor, u: Tensor) -> scan.Inputs:
    batch, length, d_inner = a.sizes
    state = None if a.ssm_state is None else a.ssm_state.to(a.decay.dtype)
    decay, B, C = (value.detach().resolve_conj().contiguous() for value in (a.decay, a.B, a.C))
    return scan.Inputs(
        Rows(u, d_inner),
        Rows(xz[:, d_inner:], 2 * d_inner),
        decay,
        B,
        C,
        vector(a.D),
        None if state is None else state.resolve_conj().contiguous(),
        a.cu_seqlens,
        batch,
        length,
        d_inner,
        False,
    )


class _Matrices(NamedTuple):
    """The weight matrices, cast to the dtype of x."""

    in_proj: Tensor
    out_proj: Tensor


def _matrices(a: LtiBlockArguments) -> _Matrices:
    return _Matrices(a.in_proj.to(a.x.dtype), a.out_proj.to(a.x.dtype))


def _forward(a: LtiBlockArguments, m: _Matrices, keep: bool) -> tuple[Tensor, ...]:
    batch, length, d_inner = a.sizes
    with portable.on(a.x), torch.autocast("cuda", enabled=False):
        xz = linear(a.x.reshape(batch * length, -1), m.in_proj, a.in_bias)  # (rows, 2 d_inner)
        u, conv_state = conv.forward_into(_conv_arguments(a, xz))
        y, ssm_state, entering = scan.forward(_scan_inputs(a, xz, u.view(-1, d_inner)))
        out = linear(y, m.out_proj, a.out_bias).view(batch, length, -1)  # (batch, length, d_model)
    if conv_state is None or not a.wants_state:
        conv_state, ssm_state = out.new_empty(0, dtype=torch.float32), a.decay.new_empty(0)
    return out, conv_state, ssm_state, xz, entering


def _backward(
    a: LtiBlockArguments,
    m: _Matrices,
    dout: Tensor,
    dconv: Tensor | None,
    dssm: Tensor | None,
    xz: Tensor,
    entering: Tensor,
) -> tuple[Tensor | None, ...]:
    batch, length, d_inner = a.sizes
    dtype = xz.dtype
    with portable.on(a.x), torch.autocast("cuda", enabled=False):
        hidden = a.x.reshape(batch * length, -1)  # (rows, d_model)
        dout = dout.to(dtype).reshape(batch * length, -1)  # (rows, d_model)
        conv_arguments = _conv_arguments(a, xz)._replace(wants_final_state=False)
        u = conv.forward_into(conv_arguments)[0].view(-1, d_inner)  # (rows, d_inner)
        dxz, gated = torch.empty_like(xz), torch.empty_like(u)
        dstate = None if dssm is None else dssm.resolve_conj().contiguous()
        dy = Rows(dout @ m.out_proj, d_inner)
        found = scan.backward(_scan_inputs(a, xz, u), dy, dstate, entering, (dxz[:, d_inner:], gated))
        del dy

        dout_proj = weight_gradient(dout, gated, a.out_proj)
        del gated
        du = found.dx.view(batch, length, d_inner)
        dx_of_conv = dxz.view(batch, length, -1)[..., :d_inner]  # (batch, length, d_inner)
        _, dconv_weight, dconv_bias, dconv_state = conv.backward_into(conv_arguments, du, dconv, dx_of_conv)
        dx = dxz @ m.in_proj
        assert found.dD is not None
        return (
            dx.view(a.x.shape),
            weight_gradient(dxz, hidden, a.in_proj),
            None if a.in_bias is None else dxz.sum(0).to(a.in_bias.dtype),
            dconv_weight.view(a.conv.shape),
            dconv_bias,
            found.da,
            found.db,
            found.dc,
            found.dD.to(a.D.dtype),
            dout_proj,
            None if a.out_bias is None else dout.sum(0).to(a.out_bias.dtype),
            dconv_state,
            None if a.ssm_state is None else found.dinitial.to(a.ssm_state.dtype),
        )


def _fake(a: LtiBlockArguments, keep: bool) -> tuple[Tensor, ...]:
    batch, length, d_inner = a.sizes
    n_sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    conv_shape = (n_sequences, d_inner, a.conv.shape[-1] - 1)
    total = scan.n_kept(n_sequences, length, a.decay, a.cu_seqlens is not None, a.x.device)
    return (
        a.x.new_empty(batch, length, a.out_proj.shape[0]),
        a.x.new_empty(conv_shape if a.wants_state else (0,), dtype=torch.float32),
        a.decay.new_empty((n_sequences, *a.decay.shape) if a.wants_state else (0,)),
        a.x.new_empty(batch * length, 2 * d_inner),
        a.decay.new_empty((total, *a.decay.shape) if total else (0,)),
    )


lti_block = block_operator(
    Block("lti_block", LtiBlockArguments, _SCHEMA, _DIFFERENTIABLE, 2, _matrices, _forward, _backward, _fake, why_not)
)
