"""The state-space dual on GPUs: launching the Triton kernels.

Three kernels forward: steps and decays, the states before each chunk, outputs. Nothing is kept for the backward pass
but the arguments: it makes decays and states again.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.chunks import padded
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.ssd.arguments import SsdArguments

DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM, MOST_STATES = 128, 256
MOST_PIECES = 16  # that a wider head is cut into
_LONGEST = 2**30  # row: steps are counted in 32 bits
# Rows and columns of a matrix product. 16 would do, but on Hopper Triton 3.6 compiles 16 beside a wider block wrong:
# outputs of 16 x 32, gradients of B of 32 x 16; at 64 x 16 it reads out of bounds.
_LEAST = 32
STEPS_HEADS = 16  # of a program
_LEAST_CHUNKS = 4  # that a program walks over
_MANY = 2  # times the programs that a walk wants


class Shape(NamedTuple):
    """How a kernel cuts its work.

    heads: at most so many of a group are one program's. columns: of d_state. rows: of head_dim.
    """

    warps: int
    stages: int
    heads: int = 1
    columns: int = 256
    rows: int = 128


class Plan(NamedTuple):
    """Steps of a chunk, and how each kernel cuts its work; programs that a walk over time wants."""

    size: int
    walk: Shape
    output: Shape
    inner: Shape
    outer: Shape
    programs: int = 264


def plan(head_dim: int, d_state: int) -> Plan:
    """What suits these sizes."""
    if head_dim > 64 or d_state > 128:  # registers and shared memory hold fewer tiles
        return Plan(64, Shape(4, 2, columns=64, rows=64), Shape(8, 1, 8), Shape(8, 1, 8), Shape(4, 1, columns=64))
    return Plan(64, Shape(4, 3, columns=64, rows=64), Shape(4, 2, 8), Shape(4, 1, 8), Shape(4, 2, columns=64))


def why_not(arguments: SsdArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    others = {name: getattr(arguments, name) for name in ("dt", "A", "D", "dt_bias", "initial_state")}
    return why_not_these(arguments.x, arguments.B, arguments.C, others, MOST_PIECES * MOST_HEAD_DIM)


def why_not_these(
    x: Tensor, B: Tensor, C: Tensor, others: Mapping[str, Tensor | None], most_head_dim: int = MOST_HEAD_DIM
) -> str | None:
    """The same of `(batch, length, ..., head_dim)` and `(..., d_state)`, and what is not multiplied as matrices."""
    if (reason := portable.why_not(x.device.type)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, the kernels multiply matrices of bfloat16 or float16"
    if B.dtype != x.dtype or C.dtype != x.dtype:
        return f"x is {x.dtype}, B {B.dtype} and C {C.dtype}: the kernels want one dtype"
    for name, value in others.items():
        if value is not None and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    if x.numel() == 0 or B.numel() == 0:
        return "x or B is empty"
    if x.shape[-1] > most_head_dim:
        return f"heads are {x.shape[-1]} wide, the kernels take {most_head_dim}"
    if B.shape[-1] > MOST_STATES:
        return f"there are {B.shape[-1]} states, the kernels hold {MOST_STATES}"
    if x.shape[1] >= _LONGEST:
        return "a row is longer than 2^30"
    return None


class Call:
    """Arguments as the kernels take them, and room for decays and steps.

    own: room for what a step sees of itself instead of its dt; see the kernels. rank: rows that are one step, which
    divide a chunk; lengths and bounds are counted in rows.
    """

    def __init__(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        cu_seqlens: Tensor | None,
        reverse: bool,
        own: bool = False,
        rank: int = 1,
    ) -> None:
        self.kernels = importlib.import_module("mambaseq.ops.ssd.triton_kernels")
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.d_state = B.shape[2:]
        self.heads_of_group = self.heads // self.groups
        self.plan = plan(self.head_dim, self.d_state)
        self.x, self.B, self.C = (side_by_side(value) for value in (x, B, C))
        self.state_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.sequences = sequences.count(x, cu_seqlens)
        self.reverse, self.rank = reverse, {"RANK": rank}
        size = self.plan.size
        self.table = None
        self.chunks_of_row = -(-self.length // size)
        if cu_seqlens is not None:
            self.table = sequences.shared(_table, cu_seqlens, self.length, size, reverse)
            self.chunks_of_row = self.table.shape[1]
        self.chunks = self.batch * self.chunks_of_row
        self.place = (self.table, self.chunks, self.chunks_of_row, self.length)
        made = self.empty(2 + own, self.chunks, self.heads, size).unbind(0)  # each (chunks, heads, size)
        self.decay, self.step = made[:2]
        self.own = made[2] if own else None
        self.blocks = {"P": self.head_dim, "N": self.d_state, "SIZE": size, "REVERSE": reverse}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def whole(self, shape: Shape) -> dict[str, int]:
        """Blocks of all of head_dim and d_state."""
        return {**self.blocks, "BLOCK_P": _block(self.head_dim), "BLOCK_N": _block(self.d_state),
                "num_warps": shape.warps, "num_stages": shape.stages}  # fmt: skip

    def parts(self, shape: Shape) -> int:
        """Heads of a program that shares B and C among them: a divisor of those of a group."""
        most = min(shape.heads, self.heads_of_group)
        return next(n for n in range(most, 0, -1) if self.heads_of_group % n == 0)

    def walk(
        self,
        x: Tensor,
        m: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        entered: Tensor | None = None,
        *,
        backward: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """States before each chunk, and, of `backward` with `entered`, `flow`: see the kernel."""
        shape, (head_dim, d_state) = self.plan.walk, (self.head_dim, self.d_state)
        rows, columns = min(_block(head_dim), shape.rows), min(_block(d_state), shape.columns)
        blocks = -(-head_dim // rows) * -(-d_state // columns)
        tiles = self.batch * self.heads * blocks
        segments, chunks = _segments(tiles, self.chunks_of_row, self.plan.programs)
        states = self.empty(self.chunks, self.heads, head_dim, d_state, dtype=self.state_dtype)
        flow = None if entered is None else self.empty(self.chunks, self.heads, blocks)
        sums = factors = None
        if segments > 1:
            sums = self.empty(self.batch * self.heads, segments, head_dim, d_state)
            factors = self.empty(self.batch * self.heads, segments, blocks)
        for summary in (True, False) if segments > 1 else (False,):
            self.kernels.walk[(tiles, segments)](
                x, *x.stride()[:3], m, *m.stride()[:3], self.decay, self.step, *self.place,
                start, end, states, entered, flow, sums, factors, self.heads, self.heads_of_group, segments, chunks,
                **self.blocks, BLOCK_P=rows, BLOCK_N=columns, BACKWARD=backward, SUMMARY=summary,
                num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
        return states, flow

    def ends(self, start: Tensor | None) -> Tensor:
        """Room for the states at the ends; those of empty sequences are what they start from."""
        shape = (self.sequences, self.heads, self.head_dim, self.d_state)
        if self.table is None:
            return self.empty(*shape)
        if start is None:
            return torch.zeros(shape, dtype=torch.float32, device=self.x.device)
        return start.float().clone()


def _raw(a: SsdArguments) -> tuple[Any, ...]:
    return (a.dt, *a.dt.stride(), *(None if v is None else v.contiguous() for v in (a.A, a.dt_bias)))


def _call(a: SsdArguments) -> Call:
    """With decays and steps."""
    call = Call(a.x, a.B, a.C, a.cu_seqlens, a.reverse)
    call.kernels.steps[(call.chunks, -(-call.heads // STEPS_HEADS))](
        *_raw(a), *call.place, call.decay, call.step, call.heads,
        SOFTPLUS=a.dt_softplus, REVERSE=a.reverse, SIZE=call.plan.size, HEADS=STEPS_HEADS,
    )  # fmt: skip
    return call


def forward_into(arguments: SsdArguments) -> tuple[Tensor, Tensor | None]:
    """y and the final state (None if it is not wanted), without autograd; of what `why_not` is None for."""
    with portable.on(arguments.x):
        D = None if arguments.D is None else arguments.D.contiguous()
        return outputs_of(_call(arguments), D, arguments.initial_state, arguments.wants_final_state)


def outputs_of(
    call: Call, D: Tensor | None, initial: Tensor | None, wants_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """y and the final state, if it is wanted."""
    start = None if initial is None else initial.contiguous()
    final = call.ends(start) if wants_final_state else None
    states, _ = call.walk(call.x, call.B, start, final)
    y = call.empty(*call.x.shape, dtype=call.x.dtype)
    shape = call.plan.output
    heads = call.parts(shape)
    call.kernels.output[(call.chunks, call.heads // heads)](
        call.x, *call.x.stride()[:3], call.B, *call.B.stride()[:3], call.C, *call.C.stride()[:3],
        call.decay, call.step, call.own, D, states, *call.place, y, call.heads, call.heads_of_group,
        HEADS=heads, **call.rank, **call.whole(shape),
    )  # fmt: skip
    return y, final


class Into(NamedTuple):
    """Where gradients are written: of the shapes and dtypes of x, dt, B and C, the last axes side by side."""

    dx: Tensor
    ddt: Tensor
    dB: Tensor
    dC: Tensor


def backward_into(
    arguments: SsdArguments, dy: Tensor, dfinal: Tensor | None, into: Into | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state, without autograd; None for what is None.

    Nothing of the forward is needed. The same inputs give the same bits. Without `into` there is new room.
    """
    x, dt, A, B, C, D, dt_bias, softplus, initial, _, reverse, *_ = arguments
    if into is None:
        into = Into(*(torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C)))
    with portable.on(x):
        call = _call(arguments)
        given = None if D is None else D.contiguous()
        found = gradients_of(call, given, initial, dy, dfinal, (into.dx, into.dB, into.dC))
        call.kernels.steps_backward[(call.chunks, -(-call.heads // STEPS_HEADS))](
            *_raw(arguments), call.step, *call.place, found.direct, *found.of_decay,
            into.ddt, *into.ddt.stride(), found.shares, call.heads,
            SOFTPLUS=softplus, REVERSE=reverse, SIZE=call.plan.size, HEADS=STEPS_HEADS, **found.blocks(),
        )  # fmt: skip
        dD, dA, dbias = (share.sum(0) for share in found.shares)  # an operator's results share no memory
    return (
        into.dx,
        into.ddt,
        dA.to(A.dtype),
        into.dB,
        into.dC,
        None if D is None else dD.to(D.dtype),
        None if dt_bias is None else dbias.to(dt_bias.dtype),
        None if initial is None or found.dinitial is None else found.dinitial.to(initial.dtype),
    )


class Found(NamedTuple):
    """What is found beside the gradients of x, B and C.

    direct, own: of a step's weight, and of the one by which it sees itself, `(chunks, heads, size)`. of_decay: of the
    sums of log-decays, `(chunks, heads, size)`, the same in blocks before them, and of a chunk's whole decay
    `(chunks, heads, blocks)`. shares: `(3, chunks, heads)`, D's the first, else room.
    """

    direct: Tensor
    own: Tensor | None
    of_decay: tuple[Tensor, Tensor, Tensor]
    shares: Tensor
    dinitial: Tensor | None

    def blocks(self) -> dict[str, int]:
        return {"OUTER": self.of_decay[1].shape[0], "FLOW": self.of_decay[2].shape[2]}


def gradients_of(
    call: Call,
    D: Tensor | None,
    initial: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor],
) -> Found:
    """into: where the gradients of x, B and C are written."""
    dx, dB, dC = into
    dy = side_by_side(dy.to(call.x.dtype))
    start, dstart = (None if v is None else v.contiguous() for v in (initial, dfinal))
    entered, _ = call.walk(call.x, call.B, start, None)
    dinitial = None if initial is None else call.ends(dstart)
    left, flow = call.walk(dy, call.C, dstart, dinitial, entered, backward=True)
    assert flow is not None

    chunks, groups, heads, size = call.chunks, call.groups, call.heads, call.plan.size
    shape = call.plan.inner
    taken = call.parts(shape)
    parts = call.heads_of_group // taken
    # each (parts, chunks, groups, size, d_state)
    dB_parts, dC_parts = call.empty(2, parts, chunks, groups, size, call.d_state).unbind(0)
    direct, inner = call.empty(2, chunks, heads, size).unbind(0)  # each (chunks, heads, size)
    own = None if call.own is None else call.empty(chunks, heads, size)
    shares = call.empty(3, chunks, heads)
    call.kernels.inner_backward[(chunks, heads // taken)](
        call.x, *call.x.stride()[:3], call.B, *call.B.stride()[:3], call.C, *call.C.stride()[:3],
        call.decay, call.step, call.own, D, dy, *dy.stride()[:3], left, *call.place,
        dx, *dx.stride()[:3], dB_parts, dC_parts, direct, inner, own, shares,
        heads, call.heads_of_group, groups, HEADS=taken, **call.rank, **call.whole(shape),
    )  # fmt: skip

    shape = call.plan.outer
    columns = min(_block(call.d_state), shape.columns)
    blocks = -(-call.d_state // columns)
    outer = call.empty(blocks, chunks, heads, size)
    for of_C in (False, True):
        rows, matrix, found = (dy, call.C, dC) if of_C else (call.x, call.B, dB)
        call.kernels.outer_backward[(chunks, groups * blocks)](
            rows, *rows.stride()[:3], matrix, *matrix.stride()[:3], call.decay, call.step,
            entered if of_C else left, *call.place, dC_parts if of_C else dB_parts, parts,
            found, *found.stride()[:3], outer, heads, call.heads_of_group, groups,
            OF_C=of_C, **{**call.whole(shape), "BLOCK_N": columns},
        )  # fmt: skip
    return Found(direct, own, (inner, outer, flow), shares, dinitial)


def _segments(tiles: int, chunks: int, programs: int) -> tuple[int, int]:
    """Into how many parts walks over `chunks` chunks are cut, so that there are programs enough, and chunks of each.

    Each part is walked over twice: only where there are few programs, and then there may be many parts.
    """
    segments = 1 if 2 * tiles > programs else _MANY * programs // tiles
    segments = max(1, min(segments, chunks // _LEAST_CHUNKS))
    length = -(-chunks // segments)
    return -(-chunks // length), length


def side_by_side(value: Tensor) -> Tensor:
    """`(batch, length, heads, n)` with the last axis side by side; the same where it is."""
    return value if value.stride(3) == 1 or value.shape[3] == 1 else value.contiguous()


def _block(size: int) -> int:
    return max(_LEAST, 1 << (size - 1).bit_length())


def _table(cu_seqlens: Tensor, length: int, size: int, reverse: bool) -> Tensor:
    """What the kernels are told of each chunk of a packed row, (4, chunks) int32."""
    bounds = cu_seqlens.long()
    chunks = sequences.in_chunks(cu_seqlens, length, size)
    number = torch.arange(chunks.n, device=cu_seqlens.device) - chunks.begin[chunks.owner]  # of its sequence
    begin = bounds[chunks.owner] + number * size
    count = (bounds[chunks.owner + 1] - begin).clamp(0, size)
    first = bounds[chunks.owner] + bounds[chunks.owner + 1] - 1 - begin if reverse else begin
    some = count > 0
    starts, ends = some & (number == 0), some & (number == chunks.counts[chunks.owner] - 1)
    # (4, chunks)
    return torch.stack([first.where(some, 0), count, chunks.owner, starts.long() + 2 * ends.long()]).int()


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state, an empty tensor where it is not wanted."""
    x, initial = arguments.x, arguments.initial_state
    head_dim = x.shape[3]
    pieces = -(-head_dim // MOST_HEAD_DIM)
    if pieces == 1:
        return _run(arguments)

    def cut(value: Tensor, axis: int) -> Tensor:
        """head_dim, which is at `axis`, into pieces, each of which is a head with zeros where it is not full."""
        value = padded(value, axis, head_dim + -head_dim % pieces)
        # (..., heads * pieces, piece of head_dim, ...)
        return value.unflatten(axis, (pieces, -1)).flatten(axis - 1, axis)

    def joined(value: Tensor, axis: int) -> Tensor:
        # (..., heads, head_dim and padding, ...)
        value = value.unflatten(axis - 1, (-1, pieces)).flatten(axis, axis + 1)
        return value.narrow(axis, 0, head_dim)

    def repeated(value: Tensor | None) -> Any:
        return None if value is None else value.repeat_interleave(pieces, dim=-1)

    y, final = _run(
        arguments._replace(
            x=cut(x, 3),
            dt=repeated(arguments.dt),
            A=repeated(arguments.A),
            D=repeated(arguments.D),
            dt_bias=repeated(arguments.dt_bias),
            initial_state=None if initial is None else cut(initial, 2),
        )
    )
    return joined(y, 3), joined(final, 2) if arguments.wants_final_state else final


def _fake(a: SsdArguments) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    shape = (a.n_sequences, *a.x.shape[2:], a.B.shape[3])
    return y, a.x.new_empty(shape, dtype=torch.float32) if a.wants_final_state else None


_run = register(
    Operator(
        "ssd_triton",
        SsdArguments,
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
        "Tensor? initial_state, Tensor? cu_seqlens, bool reverse, bool wants_final_state, int chunk_size",
        ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"),
        forward_into,
        backward_into,
        _fake,
    )
)
