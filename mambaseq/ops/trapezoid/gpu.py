"""Mamba-3's recurrence on GPUs, by the kernels of the state-space dual.

A position's two terms are one weight for all later positions, without a division, and another one for itself (see
`chunked`). The inputs of one position are rows side by side, which see each other; a rank that is no power of two is
filled up with zeros.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.chunks import forward_in_time
from mambaseq.ops.dtypes import without_autocast
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.ssd import gpu as dual
from mambaseq.ops.trapezoid.arguments import TrapezoidArguments
from mambaseq.ops.trapezoid.chunked import OF_SEQUENCES, OVER_TIME, first_entered

_MOST_RANK = 16
# below it a decay is 0 in float32, but sums of what is far below would lose the digits of the others
_FORGOTTEN = -104.0
# of a head that one kernel takes whole; halves of either would be operands of less than 128 bytes a row, see `ssd.gpu`
_WHOLE_HEAD_DIM, _WHOLE_STATES = 64, 128


class Rows(NamedTuple):
    """What the kernels run.

    x `(batch, positions * rank, heads, head_dim)`, B and C `(..., d_state)`; dt, A and trap `(batch, positions, heads)`
    float32. cu_seqlens counts rows.
    """

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    wants_final_state: bool
    rank: int


def why_not(arguments: TrapezoidArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    if _padded(arguments.x.shape[3]) > _MOST_RANK:
        return f"the rank is {arguments.x.shape[3]}, the kernels take {_MOST_RANK}"
    names = ("dt", "A", "trap", "initial_state", "initial_x", "initial_B")
    others = {name: getattr(arguments, name) for name in names}
    return dual.why_not_these(arguments.x, arguments.B, arguments.C, others)


def run(arguments: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state, an empty tensor where it is not wanted."""
    with without_autocast(arguments.x.device.type):
        return _run(arguments)


def _run(given: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    arguments: TrapezoidArguments = forward_in_time(given, OVER_TIME, OF_SEQUENCES)
    x, dt, A, trap, B, C, initial, initial_x, _, bounds, *_ = arguments
    length, rank = x.shape[1], x.shape[3]
    padded = _padded(rank)
    if initial_x is not None and initial is None:
        initial = x.new_zeros(arguments.n_sequences, x.shape[2], x.shape[4], B.shape[4], dtype=torch.float32)
    dt, trap = dt.float(), trap.float()
    entered = initial
    if initial is not None and initial_x is not None:
        entered = first_entered(arguments, initial, (1 - trap) * dt)

    def rows(value: Tensor) -> Tensor:
        value = F.pad(value, (0, 0, 0, padded - rank)) if padded > rank else value
        return value.transpose(2, 3).flatten(1, 2)

    y, final = _scan(
        Rows(
            rows(x),
            rows(B),
            rows(C),
            dt,
            A.float(),
            trap,
            entered,
            None if bounds is None else bounds * padded,
            arguments.wants_final_state,
            padded,
        )
    )
    y = y.unflatten(1, (length, padded)).transpose(2, 3)[:, :, :, :rank]
    if arguments.wants_final_state and bounds is not None and initial is not None and entered is not initial:
        # what entered has its second part, which nothing has called for in an empty sequence
        final = torch.where((bounds.diff() > 0)[:, None, None, None], final, initial)
    if given.reverse:
        y = y.flip(1)
        final = final.flip(0) if given.cu_seqlens is not None and arguments.wants_final_state else final
    return y, final


def _padded(rank: int) -> int:
    return 1 << (rank - 1).bit_length()


def _steps(a: Rows) -> tuple[Any, ...]:
    return tuple(part for value in (a.dt, a.A, a.trap) for part in (value, *value.stride()))


def _known(call: dual.Call) -> dict[str, Any]:
    return {"LEAST": _FORGOTTEN, "SIZE": call.plan.size, "HEADS": dual.STEPS_HEADS, **call.rank}


def _call(a: Rows) -> dual.Call:
    call = dual.Call(a.x, a.B, a.C, a.cu_seqlens, False, own=True, rank=a.rank)
    _kernels().steps[(call.chunks, -(-call.heads // dual.STEPS_HEADS))](
        *_steps(a), *call.place, call.decay, call.step, call.own, call.heads, **_known(call)
    )
    return call


def _forward(a: Rows) -> tuple[Tensor, Tensor | None]:
    with portable.on(a.x):
        return dual.outputs_of(_call(a), None, a.initial_state, a.wants_final_state)


def _backward(a: Rows, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of x, B, C, dt, A, trap and the initial state. Nothing of the forward is needed."""
    dx, dB, dC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (a.x, a.B, a.C))
    of_steps = [torch.empty(a.dt.shape, dtype=torch.float32, device=a.x.device) for _ in range(3)]
    with portable.on(a.x):
        call = _call(a)
        find = _gradients if fits(call.head_dim, call.d_state) else functools.partial(dual.gradients_of, D=None)
        found = find(call=call, initial=a.initial_state, dy=dy, dfinal=dfinal, into=(dx, dB, dC))
        _kernels().steps_backward[(call.chunks, -(-call.heads // dual.STEPS_HEADS))](
            *_steps(a), *call.place, found.direct, found.own, *found.of_decay, *of_steps, call.heads,
            **_known(call), **found.blocks(),
        )  # fmt: skip
    initial, dinitial = a.initial_state, found.dinitial
    return dx, dB, dC, *of_steps, None if initial is None or dinitial is None else dinitial.to(initial.dtype)


def fits(head_dim: int, d_state: int) -> bool:
    """Whether one kernel can hold what a head's gradients are made of."""
    return head_dim <= _WHOLE_HEAD_DIM and d_state <= _WHOLE_STATES


def _gradients(
    call: dual.Call,
    initial: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor],
) -> dual.Found:
    """`dual.gradients_of` of heads with B and C of their own, where it `fits`: a kernel in the place of three."""
    dx, dB, dC = into
    dy = dual.side_by_side(dy.to(call.x.dtype))
    start, dstart = (None if v is None else v.contiguous() for v in (initial, dfinal))
    entered, _ = call.walk(call.x, call.B, start, None)
    dinitial = None if initial is None else call.ends(dstart)
    left, _ = call.walk(dy, call.C, dstart, dinitial, backward=True)
    size = call.plan.size
    direct, down, inner, outer = call.empty(4, call.chunks, call.heads, size).unbind(0)  # each (chunks, heads, size)
    flow = call.empty(call.chunks, call.heads, 1)
    importlib.import_module("mambaseq.ops.trapezoid.scan_kernels").scan_backward[(call.chunks, call.heads)](
        call.x, *call.x.stride()[:3], call.B, *call.B.stride()[:3], call.C, *call.C.stride()[:3],
        call.decay, call.step, call.own, dy, *dy.stride()[:3], entered, left, *call.place,
        dx, *dx.stride()[:3], dB, *dB.stride()[:3], dC, *dC.stride()[:3], direct, down, inner, outer, flow, call.heads,
        P=call.head_dim, N=call.d_state, BLOCK_P=_WHOLE_HEAD_DIM,
        BLOCK_N=_WHOLE_STATES if call.d_state > _WHOLE_STATES // 2 else _WHOLE_STATES // 2,
        SIZE=size, **call.rank, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dual.Found(direct, down, (inner, outer[None], flow), flow, dinitial)


def _fake(a: Rows) -> tuple[Tensor, Tensor | None]:
    n_sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    shape = (n_sequences, *a.x.shape[2:], a.B.shape[3])
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return y, a.x.new_empty(shape, dtype=torch.float32) if a.wants_final_state else None


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.trapezoid.triton_kernels")


_scan = register(
    Operator(
        "trapezoid_triton",
        Rows,
        "Tensor x, Tensor B, Tensor C, Tensor dt, Tensor A, Tensor trap, Tensor? initial_state, Tensor? cu_seqlens, "
        "bool wants_final_state, int rank",
        ("x", "B", "C", "dt", "A", "trap", "initial_state"),
        _forward,
        _backward,
        _fake,
    )
)
