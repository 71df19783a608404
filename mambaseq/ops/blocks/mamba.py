"""A Mamba-1 block on a GPU as one operator. What is cheap to compute (the convolution's output, dt, the gated output)
is computed again in the backward pass instead of being stored.

Stored are the input, the products of in_proj and x_proj, and the scan's states before every 16th step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mambaseq.ops.blocks.parts import (
    Block,
    block_operator,
    convolution,
    linear,
    vector,
    vectors,
    weight_gradient,
    why_not_cuda,
    why_not_sizes,
)
from mambaseq.ops.causal_conv import gpu as conv
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.gpu import portable
from mambaseq.ops.selective_scan import launches as scan
from mambaseq.ops.selective_scan.cuda import too_large_for

_SCHEMA = (
    "Tensor x, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, "
    "Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, Tensor? out_bias, Tensor? conv_state, Tensor? ssm_state, "
    "Tensor? A_imag, Tensor? cu_seqlens, bool wants_state"
)
DIFFERENTIABLE = 15  # of them, the first


class BlockArguments(NamedTuple):
    """Parameters have the names and shapes of the published checkpoints.

    x: `(batch, length, d_model)`. conv `(d_inner, 1, d_conv)`. conv_state `(sequences, d_inner, d_conv - 1)`,
    ssm_state `(sequences, d_inner, d_state)`, both float32. cu_seqlens as in `selective_scan`. A_imag: given for
    complex states (ssm_state is complex64 then), whose B and C x_proj makes as pairs of real and imaginary part.
    """

    x: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
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
    A_imag: Tensor | None = None
    cu_seqlens: Tensor | None = None
    wants_state: bool = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """batch, length, d_inner."""
        return self.x.shape[0], self.x.shape[1], self.conv.shape[0]


def why_not(arguments: BlockArguments) -> str | None:
    """The reason why the block cannot run as one, or None."""
    x = arguments.x
    if (reason := why_not_cuda(x) or why_not_sizes(arguments)) is not None:
        return reason
    if arguments.A_log.shape[1] > scan.STATES:
        return f"there are more than {scan.STATES} states a channel"
    return too_large_for(x.device, x.dtype, scan.STATES, True, arguments.A_imag is not None)


def _conv_arguments(a: BlockArguments, xz: Tensor) -> ConvArguments:
    batch, length, d_inner = a.sizes
    return convolution(a, xz.view(batch, length, -1)[..., :d_inner])  # x (batch, length, d_inner)


def _A(a: BlockArguments) -> Tensor:
    """log(-A), or A itself where it is complex."""
    if a.A_imag is None:
        return vector(a.A_log)
    return torch.complex(-torch.exp(a.A_log.detach().float()), a.A_imag.detach().float())


def _parameters(a: BlockArguments, wide: bool) -> list[Tensor]:
    """What `_A` gives, D and dt's bias: in float32 if `wide`, else as the scan's forward takes them."""
    if a.A_imag is not None:
        return [_A(a), *vectors(a.D, a.dt_bias)]
    given = a.A_log, a.D, a.dt_bias
    if wide or len({value.dtype for value in given}) > 1:
        return vectors(*given)
    return [value.contiguous() for value in given]


def _state(state: Tensor | None, is_complex: bool) -> Tensor | None:
    if state is None or not is_complex:
        return None if state is None else vector(state)
    return state.detach().to(torch.complex64).resolve_conj().contiguous()


def _scan_inputs(
    a: BlockArguments, xz: Tensor, u: Tensor, dt: Tensor, products: Tensor, wide: bool = False
) -> scan.Inputs:
    """wide: parameters in float32, as `scan.backward` takes them."""
    batch, length, d_inner = a.sizes
    _, B, C = _split(a, products)
    A, D, bias = _parameters(a, wide)
    width = products.shape[1]
    return scan.Inputs(
        scan.Rows(u, d_inner),
        scan.Rows(dt, d_inner),
        scan.Rows(xz[:, d_inner:], 2 * d_inner),
        scan.Rows(B, width),
        scan.Rows(C, width),
        A,
        a.A_imag is None,
        D,
        bias,
        True,
        _state(a.ssm_state, a.A_imag is not None),
        a.cu_seqlens,
        batch,
        length,
        d_inner,
        d_inner,
        False,
    )


def _split(a: BlockArguments, products: Tensor) -> tuple[Tensor, ...]:
    """dt before dt_proj, B and C: views of the products with x_proj or of their gradients."""
    width = a.A_log.shape[1] * (1 if a.A_imag is None else 2)
    rank = products.shape[1] - 2 * width
    return products[:, :rank], products[:, rank : rank + width], products[:, rank + width :]


class Link(Protocol):
    """What a block that has a piece of its sequences hears of other pieces, where these are with other devices. What is
    asked for is begun early and fetched late, so that it is on its way while the block computes."""

    def begin_conv(self, tail: Tensor) -> None:
        """tail `(batch, steps, d_inner)`: the last inputs of the convolution, width - 1 of them if there are."""

    def conv_state(self) -> Tensor | None:
        """The states that the convolution begins with."""

    def begin_scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> None:
        """The scan's inputs but z, `(batch, length, ...)`."""

    def ssm_state(self) -> Tensor | None:
        """The states that the scan begins with."""

    def begin_scan_gradient(
        self, dy: Tensor, dt: Tensor, C: Tensor, A: Tensor, z: Tensor, dstate: Tensor | None
    ) -> None:
        """The gradients of the scan's outputs and last states."""

    def scan_gradient(self) -> Tensor | None:
        """The gradients of the last states, with what other pieces make of them."""

    def begin_conv_gradient(self, dstate: Tensor | None) -> None:
        """The gradients of the states that the convolution began with."""

    def add_conv_gradient_(self, dx: Tensor) -> None:
        """Add to the gradients of the convolution's inputs what other pieces make of the last of them."""


class _Matrices(NamedTuple):
    """The weight matrices, cast to the dtype of x."""

    in_proj: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    out_proj: Tensor


def matrices(a: BlockArguments) -> _Matrices:
    return _Matrices(*(w.to(a.x.dtype) for w in (a.in_proj, a.x_proj, a.dt_proj, a.out_proj)))


def _in_time(a: BlockArguments, rows: Tensor) -> Tensor:
    """Rows of numbers as `(batch, length, numbers)`; complex where states are and these have two for each."""
    return rows.unflatten(0, a.sizes[:2])


def _B_and_C(a: BlockArguments, products: Tensor) -> tuple[Tensor, Tensor]:
    B, C = (_in_time(a, M) for M in _split(a, products)[1:])
    if a.A_imag is None:
        return B, C
    B, C = (torch.complex(M[..., ::2].float(), M[..., 1::2].float()) for M in (B, C))
    return B, C


def _whole_A(a: BlockArguments) -> Tensor:
    return -torch.exp(vector(a.A_log.detach())) if a.A_imag is None else _A(a)


def _project(a: BlockArguments, m: _Matrices, hidden: Tensor, xz: Tensor, half: slice) -> None:
    """Write one half of in_proj's output."""
    if a.in_bias is None:
        torch.mm(hidden, m.in_proj[half].t(), out=xz[:, half])
    else:
        torch.addmm(a.in_bias[half].to(hidden.dtype), hidden, m.in_proj[half].t(), out=xz[:, half])


def forward(a: BlockArguments, m: _Matrices, keep: bool, link: Link | None = None) -> tuple[Tensor, ...]:
    """Output, states, and what `backward` wants of it if `keep`, without autograd. link: to other pieces."""
    batch, length, d_inner = a.sizes
    with portable.on(a.x), torch.autocast("cuda", enabled=False):
        hidden = a.x.reshape(batch * length, -1)
        if link is None:
            xz = linear(hidden, m.in_proj, a.in_bias)  # (rows, 2 d_inner)
        else:
            last = a.x[:, max(0, length - a.conv.shape[-1] + 1) :]
            link.begin_conv(linear(last, m.in_proj[:d_inner], None if a.in_bias is None else a.in_bias[:d_inner]))
            xz = hidden.new_empty(batch * length, 2 * d_inner)
            _project(a, m, hidden, xz, slice(0, d_inner))
            a = a._replace(conv_state=link.conv_state())
        u, conv_state = conv.forward_into(_conv_arguments(a, xz))
        u = u.view(-1, d_inner)  # (rows, d_inner)
        products = u @ m.x_proj.t()
        dt = _split(a, products)[0] @ m.dt_proj.t()
        if link is not None:
            link.begin_scan(_in_time(a, u), _in_time(a, dt), *_B_and_C(a, products), _whole_A(a))
            _project(a, m, hidden, xz, slice(d_inner, 2 * d_inner))
            a = a._replace(ssm_state=link.ssm_state())
        y, ssm_state, kept = scan.forward(_scan_inputs(a, xz, u, dt, products), keep)
        out = linear(y, m.out_proj, a.out_bias).view(batch, length, -1)  # (batch, length, d_model)
    if conv_state is None or not a.wants_state:
        conv_state, ssm_state = (out.new_empty(0, dtype=dtype) for dtype in (torch.float32, ssm_state.dtype))
    return out, conv_state, ssm_state, xz, products, kept


def backward(
    a: BlockArguments,
    m: _Matrices,
    dout: Tensor,
    dconv: Tensor | None,
    dssm: Tensor | None,
    xz: Tensor,
    products: Tensor,
    kept: Tensor,
    link: Link | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the first arguments, see `forward`; a: with the states that its convolution and its scan began
    with."""
    batch, length, d_inner = a.sizes
    dtype = xz.dtype
    with portable.on(a.x), torch.autocast("cuda", enabled=False):
        hidden = a.x.reshape(batch * length, -1)  # (rows, d_model)
        dout = dout.to(dtype).reshape(batch * length, -1)  # (rows, d_model)
        low = _split(a, products)[0]
        dt = low @ m.dt_proj.t()
        dy = scan.Rows(dout @ m.out_proj, d_inner)
        if link is not None:
            z = _in_time(a, xz[:, d_inner:])
            dy_in_time, C = _in_time(a, dy.data), _B_and_C(a, products)[1]
            link.begin_scan_gradient(dy_in_time, _in_time(a, dt), C, _whole_A(a), z, dssm)
            del z, dy_in_time
        conv_arguments = _conv_arguments(a, xz)._replace(wants_final_state=False)
        u = conv.forward_into(conv_arguments)[0].view(-1, d_inner)  # (rows, d_inner)
        if link is not None:
            dssm = link.scan_gradient()
        dxz, dproducts, gated = torch.empty_like(xz), torch.empty_like(products), torch.empty_like(u)
        dlow, dB, dC = _split(a, dproducts)
        inputs = _scan_inputs(a, xz, u, dt, products, wide=True)
        dstate = _state(dssm, a.A_imag is not None)
        found = scan.backward(inputs, dy, dstate, kept, scan.Into(dxz[:, d_inner:], gated, dB, dC))
        del dy, inputs, dt

        dout_proj = weight_gradient(dout, gated, a.out_proj)
        del gated
        torch.mm(found.ddt, m.dt_proj, out=dlow)
        du = found.dx.addmm_(dproducts, m.x_proj).view(batch, length, d_inner)
        dx_of_conv = dxz.view(batch, length, -1)[..., :d_inner]  # (batch, length, d_inner)
        _, dconv_weight, dconv_bias, dconv_state = conv.backward_into(conv_arguments, du, dconv, dx_of_conv)
        if link is not None:
            link.begin_conv_gradient(dconv_state)
        ddt_proj = weight_gradient(found.ddt, low, a.dt_proj)
        dx_proj = weight_gradient(dproducts, u, a.x_proj)
        if link is not None:
            link.add_conv_gradient_(dx_of_conv)
        dx = dxz @ m.in_proj
        dA, dA_imag = found.dA, None
        if a.A_imag is not None:  # through A = -exp(A_log) + i A_imag
            dA, imaginary = -torch.exp(a.A_log.float()) * dA.real, dA.imag
            dA_imag = torch.empty_like(a.A_imag).copy_(imaginary)  # side by side, as a compiler is told
        gradients = (
            dx.view(a.x.shape),
            weight_gradient(dxz, hidden, a.in_proj),
            None if a.in_bias is None else dxz.sum(0).to(a.in_bias.dtype),
            dconv_weight.view(a.conv.shape),
            dconv_bias,
            dx_proj,
            ddt_proj,
            found.dbias.to(a.dt_bias.dtype),
            dA.to(a.A_log.dtype),
            found.dD.to(a.D.dtype),
            dout_proj,
            None if a.out_bias is None else dout.sum(0).to(a.out_bias.dtype),
            dconv_state,
            None if a.ssm_state is None else found.dinitial.to(a.ssm_state.dtype),
            dA_imag,
        )
    return gradients


def _fake(a: BlockArguments, keep: bool) -> tuple[Tensor, ...]:
    batch, length, d_inner = a.sizes
    packed, d_state = a.cu_seqlens is not None, a.A_log.shape[1]
    n_sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    states = [(n_sequences, d_inner, a.conv.shape[-1] - 1), (n_sequences, d_inner, d_state)]
    state_dtype, numbers = (torch.float32, d_state) if a.A_imag is None else (torch.complex64, 2 * d_state)
    kept = scan.shape_kept(n_sequences, length, packed, d_inner, numbers) if keep else (0,)
    return (
        a.x.new_empty(batch, length, a.out_proj.shape[0]),
        *(
            a.x.new_empty(shape if a.wants_state else (0,), dtype=dtype)
            for shape, dtype in zip(states, (torch.float32, state_dtype), strict=True)
        ),
        a.x.new_empty(batch * length, 2 * d_inner),
        a.x.new_empty(batch * length, a.x_proj.shape[0]),
        a.x.new_empty(kept, dtype=torch.float32),
    )


mamba_block = block_operator(
    Block("mamba_block", BlockArguments, _SCHEMA, DIFFERENTIABLE, 3, matrices, forward, backward, _fake, why_not)
)
