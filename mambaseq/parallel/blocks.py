"""A Mamba-1 block on a GPU as one operator (`mambaseq.ops.blocks.mamba`), over a rank's piece of sequences that all
ranks run at once (see `ends`). What the ranks say to each other is on its way while the block computes: the last inputs
of the convolution beside in_proj's first half, states beside its second half, gradients of states beside the
convolution that is made again, those of the convolution's inputs beside two products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.blocks import mamba as block
from mambaseq.ops.blocks.mamba import BlockArguments
from mambaseq.parallel.ends import Ends
from mambaseq.parallel.recurrences import ScanRecurrence, gradient_summary, last_inputs, summary


def why_not(arguments: BlockArguments, ends: Ends) -> str | None:
    """The reason why the block cannot run as one over this piece, or None."""
    if ends.leaves and ends.length - ends.end < arguments.conv.shape[-1] - 1:
        return "the convolution's last inputs are of several ranks"
    return block.why_not(arguments)


class _Link:
    """See `mambaseq.ops.blocks.mamba.Link`."""

    def __init__(self, ends: Ends, a: BlockArguments, decays: list[Tensor] | None = None) -> None:
        self.ends, self.a, self.width = ends, a, a.conv.shape[-1] - 1
        self.bias, self.decays = a.dt_bias.detach().float(), decays or []
        self.began: list[Tensor | None] = []  # the states that the convolution and the scan began with
        self._begun: Any = None

    def _like(self) -> Tensor:
        d_inner, d_state = self.a.A_log.shape
        dtype = torch.float32 if self.a.A_imag is None else torch.complex64
        return self.a.x.new_zeros(self.ends.rows, d_inner, d_state, dtype=dtype)

    def begin_conv(self, tail: Tensor) -> None:
        self._begun = self.ends.begin_gather([last_inputs(self.ends, tail, self.a.conv_state, self.width).contiguous()])

    def conv_state(self) -> Tensor | None:
        found = self.ends.halo([tail for (tail,) in self.ends.gathered(self._begun)])
        self.began = [self.ends.with_rows(self.a.conv_state, None if found is None else found.float())]
        return self.began[0]

    def begin_scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> None:
        if self.ends.replays:
            self._begun = None
            return
        recurrence, like = ScanRecurrence(u, dt, A, B, C, None, self.bias, True), self._like()
        self._begun = self.ends.begin_gather(summary(self.ends, recurrence, like, like, self.a.ssm_state))

    def ssm_state(self) -> Tensor | None:
        everyone = self.ends.gathered(self._begun)
        self.decays = [decay for _, decay in everyone]
        self.began.append(self.ends.with_rows(self.a.ssm_state, self.ends.entering(everyone)))
        return self.began[1]

    def begin_scan_gradient(
        self, dy: Tensor, dt: Tensor, C: Tensor, A: Tensor, z: Tensor, dstate: Tensor | None
    ) -> None:
        recurrence = ScanRecurrence(None, dt, A, None, C, z, self.bias, True)
        told = gradient_summary(self.ends, recurrence, dy, dstate, self._like())
        self._begun, self._dstate = self.ends.context.begin_gather(told), dstate

    def scan_gradient(self) -> Tensor | None:
        leaving = self.ends.gradient_of_leaving([g for (g,) in self._begun.wait()], self.decays)
        if leaving is None:
            return self._dstate
        found = leaving.new_zeros(self.ends.n, *leaving.shape[1:]) if self._dstate is None else self._dstate.clone()
        found[self.ends.leaving] = leaving
        return found

    def begin_conv_gradient(self, dstate: Tensor | None) -> None:
        if self.ends.arrives:
            assert dstate is not None
            told = dstate[self.ends.arriving]
        else:
            told = self.a.x.new_zeros(self.ends.rows, self.a.conv.shape[0], self.width, dtype=torch.float32)
        self._begun = self.ends.context.begin_gather([told.to(self.a.x.dtype).contiguous()])

    def add_conv_gradient_(self, dx: Tensor) -> None:
        found = self.ends.gradient_of_tail([one for (one,) in self._begun.wait()])
        if found is not None and self.width:
            dx[:, -self.width :] += found.transpose(1, 2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Ends, wants_state: bool, cu_seqlens: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        given: Any = tensors
        a = BlockArguments(*given)._replace(cu_seqlens=cu_seqlens, wants_state=wants_state)
        link = _Link(ends, a)
        out, conv_state, ssm_state, *kept = block.forward(a, block.matrices(a), any(ctx.needs_input_grad), link)
        ctx.ends, ctx.wants_state, ctx.decays = ends, wants_state, link.decays
        ctx.n = len(tensors)
        ctx.save_for_backward(cu_seqlens, *tensors, *link.began, *kept)
        ctx.set_materialize_grads(False)
        return out, conv_state, ssm_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dconv: Tensor | None, dssm: Tensor | None) -> tuple[Tensor | None, ...]:
        ends: Ends = ctx.ends
        cu_seqlens, *saved = ctx.saved_tensors
        tensors, (conv_state, ssm_state), kept = saved[: ctx.n], saved[ctx.n : ctx.n + 2], saved[ctx.n + 2 :]
        given = BlockArguments(*tensors)._replace(cu_seqlens=cu_seqlens, wants_state=ctx.wants_state)
        if dout is None:
            dout = torch.zeros_like(given.x)
        link = _Link(ends, given, ctx.decays)
        a = given._replace(conv_state=conv_state, ssm_state=ssm_state)
        dconv, dssm = (d if d is not None and d.numel() else None for d in (dconv, dssm))
        xz, products, states = kept
        found = list(block.backward(a, block.matrices(a), dout, dconv, dssm, xz, products, states, link))
        for place in (BlockArguments._fields.index("conv_state"), BlockArguments._fields.index("ssm_state")):
            d = found[place]
            if given[place] is None:
                found[place] = None
            elif d is not None and ends.arrives:
                found[place] = d.index_fill(0, torch.arange(*ends.arriving.indices(ends.n), device=d.device), 0)
        return None, None, None, *found


def mamba_block(arguments: BlockArguments, ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
    """See `mambaseq.ops.blocks.mamba.mamba_block`; for arguments for which `why_not` is None."""
    out, conv_state, ssm_state = _Block.apply(
        ends, arguments.wants_state, arguments.cu_seqlens, *arguments[: block.DIFFERENTIABLE]
    )
    return out, conv_state, ssm_state
