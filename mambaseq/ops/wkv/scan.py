"""The WKV in PyTorch alone, all positions at once in a logarithmic number of steps, on any device.

First the running maximum of the exponents, m_t = max(m_{t-1} - w, k_t), by a scan. Numerator and denominator, both
scaled by exp(-m_t), then follow a linear recurrence whose decay exp(m_{t-1} - w - m_t) is at most 1: nothing
overflows, whatever k is. Values do not depend on m, which is the same constant in both passes. The backward pass
computes the forward again from the inputs, which are all that is kept; while it runs, it takes the memory of some 25
tensors of the shape of k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.recurrence import linear_scan_, tree
from mambaseq.ops.wkv.arguments import EMPTY, WkvArguments


class _Rows:
    """Where sequences begin and end: each row is one, or the only row packs several."""

    def __init__(self, cu_seqlens: Tensor | None, length: int) -> None:
        self.packed, self.length = cu_seqlens is not None, length
        if cu_seqlens is None:
            return
        bounds = cu_seqlens.long()
        self.of_position = sequences.of_positions(bounds, length)
        self.starts, self.ends = bounds[:-1], bounds[1:]
        self.index = torch.arange(length, device=bounds.device)
        self.start_of = self.starts[self.of_position]
        self.first = self.start_of == self.index
        self.last = self.ends[self.of_position] - 1 == self.index

    def before(self, values: Tensor, initial: Tensor) -> Tensor:
        """The values one position earlier, `initial` of the sequence at its first: both (b, t, ...)."""
        if not self.packed:
            return torch.cat([initial[:, None], values[:, :-1]], dim=1)
        moved = torch.cat([values[:, :1], values[:, :-1]], dim=1)
        return torch.where(_along(self.first, values), initial[self.of_position], moved)

    def after(self, values: Tensor, final: Tensor) -> Tensor:
        """The values one position later, `final` of the sequence at its last."""
        if not self.packed:
            return torch.cat([values[:, 1:], final[:, None]], dim=1)
        moved = torch.cat([values[:, 1:], values[:, -1:]], dim=1)
        return torch.where(_along(self.last, values), final[self.of_position], moved)

    def at_first(self, values: Tensor, otherwise: Tensor) -> Tensor:
        """The values at each sequence's first position, `(sequences, ...)`; those of `otherwise` where it is empty."""
        if not self.packed:
            return values[:, 0]
        here = values[0, self.starts.clamp(max=self.length - 1)]
        return torch.where(_along(self.ends > self.starts, here, 0), here, otherwise)

    def at_last(self, values: Tensor, otherwise: Tensor) -> Tensor:
        """The same at the last position."""
        if not self.packed:
            return values[:, -1]
        here = values[0, (self.ends - 1).clamp(min=0)]
        return torch.where(_along(self.ends > self.starts, here, 0), here, otherwise)

    def running_max_(self, m: Tensor, w: Tensor) -> Tensor:
        """m_t ← max(m_{t-1} - w, m_t) inside of each sequence, in place."""
        for to, by, stride, _ in tree(self.length):
            earlier = m[:, by] - stride * w
            if self.packed:
                together = self.start_of[to] <= self.index[by]
                earlier = torch.where(together[:, None], earlier, EMPTY)
            m[:, to] = torch.maximum(m[:, to], earlier)
        return m

    def scan_(self, decay: Tensor, added: Tensor) -> Tensor:
        """`linear_scan_` of added (b, t, 2, c) by decay (b, t, c), which is 0 where a sequence begins; none takes NaN
        or infinity from another."""
        decay = decay[:, :, None]
        if not self.packed:
            return linear_scan_(decay, added)
        bad = ~(added.isfinite() & decay.isfinite())
        if (spoilt := sequences.spoilt(bad, self.start_of, 1)) is None:
            return linear_scan_(decay, added)
        decay = decay.masked_fill(bad.any(2, keepdim=True), 0)
        return linear_scan_(decay, added.masked_fill_(bad, 0)).masked_fill_(spoilt, torch.nan)


def _along(mask: Tensor, values: Tensor, axis: int = 1) -> Tensor:
    """A mask of positions (or of sequences, axis 0), broadcastable to values."""
    return mask.view(-1, *[1] * (values.ndim - axis - 1))  # (positions, 1, ...)


class _Positions(NamedTuple):
    """What forward and backward need of all positions; (b, t, c), and with sums (b, t, 2, c) of (num, den)."""

    v: Tensor
    keep: Tensor  # decay of the sums into this position
    enter: Tensor  # exp(k - m)
    m: Tensor
    sums: Tensor
    sums_before: Tensor
    past: Tensor  # weights of the sums before and of the present in what is read out
    present: Tensor
    y: Tensor
    den: Tensor


def _positions(arguments: WkvArguments, rows: _Rows, state: Tensor) -> _Positions:
    real = working_dtype(arguments.k)
    k, v, w, u = (value.to(real) for value in arguments[:4])
    nothing = torch.full_like(k, EMPTY)
    m = rows.running_max_(torch.maximum(k, rows.before(nothing, state[:, 2]) - w), w)
    m_before = rows.before(m, state[:, 2])
    # m_{t-1} - m_t is exact where they are close, so w is subtracted last
    keep, enter = torch.exp((m_before - m) - w), torch.exp(k - m)
    added = torch.stack([enter * v, enter], dim=2)  # (b, t, 2, c)
    added += keep[:, :, None] * rows.before(torch.zeros_like(added), state[:, :2])
    sums = rows.scan_(keep.masked_fill(rows.first[:, None], 0) if rows.packed else keep.clone(), added)
    sums_before = rows.before(sums, state[:, :2])
    top = torch.maximum(m_before, u + k)
    past, present = torch.exp(m_before - top), torch.exp((k - top) + u)
    num, den = (past[:, :, None] * sums_before + present[:, :, None] * torch.stack([v, torch.ones_like(v)], 2)).unbind(
        2
    )
    return _Positions(v, keep, enter, m, sums, sums_before, past, present, num / den, den)


def _forward(arguments: WkvArguments) -> tuple[Tensor, Tensor]:
    state, rows = arguments.state(), _Rows(arguments.cu_seqlens, arguments.k.shape[1])
    if arguments.k.shape[1] == 0:
        return torch.empty_like(arguments.k), state.clone()
    p = _positions(arguments, rows, state)
    sums, m = rows.at_last(p.sums, state[:, :2]), rows.at_last(p.m, state[:, 2])
    return p.y.to(arguments.k.dtype), torch.cat([sums, m[:, None]], dim=1)  # the state: (sequences, 3, c)


def _backward(arguments: WkvArguments, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    state, rows = arguments.state(), _Rows(arguments.cu_seqlens, arguments.k.shape[1])
    dsums = dfinal[:, :2]  # nothing is differentiated through the exponents
    if arguments.k.shape[1] == 0:
        dk, dv, dw, du = (torch.zeros_like(value) for value in arguments[:4])
    else:
        p = _positions(arguments, rows, state)
        dnum = dy.to(p.den.dtype) / p.den
        dden = -dnum * p.y
        dpresent = (dnum * p.v + dden) * p.present  # of u + k
        from_output = p.past[:, :, None] * torch.stack([dnum, dden], dim=2)  # (b, t, 2, c)
        # The gradient of the sums runs back in time: from what the next position reads and what it keeps.
        decay = rows.after(p.keep, torch.zeros_like(dsums[:, 0]))
        total = linear_scan_(decay.flip(1)[:, :, None], rows.after(from_output, dsums).flip(1)).flip(1)  # (b, t, 2, c)
        dw = -((total * p.sums_before).sum(2) * p.keep).sum((0, 1))
        dk = (total[:, :, 0] * p.v + total[:, :, 1]) * p.enter + dpresent
        dv = total[:, :, 0] * p.enter + dnum * p.present
        du = dpresent.sum((0, 1))
        dsums = rows.at_first(from_output + p.keep[:, :, None] * total, dsums)
    gradients = [gradient.to(value.dtype) for gradient, value in zip((dk, dv, dw, du), arguments[:4], strict=True)]
    if arguments.initial_state is None:
        return *gradients, None
    dstate = torch.cat([dsums, torch.zeros_like(dsums[:, :1])], dim=1)  # (sequences, 3, c)
    return *gradients, dstate.to(arguments.initial_state.dtype)


def _fake(a: WkvArguments) -> tuple[Tensor, Tensor]:
    final = a.k.new_empty((a.n_sequences, 3, a.k.shape[2]), dtype=working_dtype(a.k))
    return torch.empty_like(a.k, memory_format=torch.contiguous_format), final


# y in the dtype of k, and the final state in the working precision
run = register(
    Operator(
        "wkv",
        WkvArguments,
        "Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state, Tensor? cu_seqlens",
        ("k", "v", "w", "u", "initial_state"),
        _forward,
        _backward,
        _fake,
        zeros=True,
    )
)
