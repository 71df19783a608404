"""What the kernels of the selective scan's .cu files are compiled and launched with, on rows of numbers.

Sequences are cut into segments where there are too few channels to fill the GPU (see segments.py): what each segment
does to a state is found first, then taken across the segments, and then all run side by side. Nothing is summed by
atomics.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import nvrtc
from mambaseq.ops.selective_scan import segments

CHANNELS = 64  # of a block
STATES = 16  # the most that the kernels take at once
_OWN = 8  # the states of a thread, two channels' in the backward kernel
_SUMS = 128  # that a block of a kernel which sums takes
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOLDER = Path(__file__).parent
_COMMON = _FOLDER / "common.cu"
FILES = {
    "forward": (_COMMON, _FOLDER / "forward.cu"),
    "backward": (_COMMON, _FOLDER / "backward.cu"),
    "backward_summary": (_COMMON, _FOLDER / "backward_summary.cu"),
    "gather": (_COMMON, _FOLDER / "gather.cu"),
    "combine": (_FOLDER / "combine.cu",),
}


class Rows(NamedTuple):
    """`(batch, length, …)` as rows of numbers that lie beside each other, at one distance."""

    data: Tensor  # its address is that of the first row
    stride: int


class Inputs(NamedTuple):
    """All rows have the dtype of x; A, D and bias are float32 and contiguous.

    is_log: A holds log(-A). per_group: channels of a group of B and C. state: float32, contiguous.
    """

    x: Rows
    dt: Rows
    z: Rows | None
    B: Rows
    C: Rows
    A: Tensor
    is_log: bool
    D: Tensor | None
    bias: Tensor | None
    dt_softplus: bool
    state: Tensor | None
    cu_seqlens: Tensor | None
    batch: int
    length: int
    channels: int
    per_group: int
    reverse: bool

    @property
    def blocks(self) -> int:
        return -(-self.channels // CHANNELS)

    @property
    def n_sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def d_state(self) -> int:
        return self.A.shape[1]

    def addresses(self) -> tuple[Any, ...]:
        z = (None, 0) if self.z is None else self.z
        return (*self.x, *self.dt, *z, *self.B, *self.C, self.A, self.D, self.bias)

    def sizes(self) -> tuple[int, ...]:
        return -1 if self.reverse else 1, self.channels, self.d_state, self.per_group


class Into(NamedTuple):
    """Where `backward` writes what is not to have tensors of its own: rows of numbers that lie beside each other, of
    the dtype of x. Only for one group of B and C."""

    dz: Tensor  # (..., channels)
    gated: Tensor  # (..., channels): y once more, which need not be kept until now
    dB: Tensor  # (..., d_state), rows as far apart as those of dC
    dC: Tensor


class Gradients(NamedTuple):
    """dx, ddt, dz `(rows, channels)` and dB, dC `(rows, groups, d_state)`; the others float32, dA that of log(-A) if
    A was given so."""

    dx: Tensor
    ddt: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dA: Tensor
    dD: Tensor
    dbias: Tensor
    dinitial: Tensor


def alignment(width: int, item: int, *values: Rows) -> int:
    """Bytes that can be copied at a time: 16, 8, 4, or 0 for rows that are not aligned."""
    common = math.gcd(
        16, width * item, *(row.stride * item for row in values), *(row.data.data_ptr() for row in values)
    )
    return common if common >= 4 else 0


def kernel_of(file: str, inputs: Inputs, dy: Rows | None = None) -> nvrtc.Kernel:
    """The kernel of a file for these inputs, compiled if it has not been."""
    dtype, d_state = inputs.x.data.dtype, inputs.d_state
    wide = [row for row in (inputs.x, inputs.dt, inputs.z, dy) if row is not None]
    states = padded(d_state)
    return compiled(
        file,
        dtype,
        states,
        inputs.z is not None,
        inputs.D is not None,
        inputs.bias is not None,
        inputs.dt_softplus,
        inputs.is_log,
        alignment(inputs.channels, dtype.itemsize, *wide),
        min(alignment(d_state, dtype.itemsize, inputs.B, inputs.C), states * dtype.itemsize),
        inputs.channels % 2 == 0,
        inputs.A.device.index,
    )


@functools.cache
def compiled(
    file: str,
    dtype: torch.dtype,
    states: int,
    has_z: bool,
    has_D: bool,
    has_bias: bool,
    softplus: bool,
    is_log: bool,
    alignment: int,
    alignment_of_states: int,
    even: bool,
    device: int,
) -> nvrtc.Kernel:
    """One for each of these; none of the lengths and widths is among them."""
    item = dtype.itemsize
    threads = CHANNELS * states // _OWN
    if file == "backward":
        tile, blocks = segments.EVERY, 256 // threads
        raw = CHANNELS * item * (8 if has_z else 6) + states * item * 4
        made = CHANNELS * (8 + 8 + 8 + 4 * has_z) + 4 * states * 8 + 4 * (CHANNELS + 16) + threads * (4 + 16)
    else:
        tile, blocks = 16 if item == 4 else 32, 512 // threads
        raw = (CHANNELS + 32 * _OWN // states) * item * (9 if has_z else 6) + states * item * 4
        made = states * 16
    shared = tile * (raw + made) + 512  # of `struct Shared`; the sources check that it is enough
    macros = {
        "IN": CODES[dtype],
        "STATES": states,
        "HAS_Z": int(has_z),
        "HAS_D": int(has_D),
        "HAS_BIAS": int(has_bias),
        "SOFTPLUS": int(softplus),
        "LOG_A": int(is_log),
        "VEC": alignment,
        "VEC_BC": alignment_of_states,
        "EVEN": int(even),
        "TILE": tile,
        "THREADS": threads,
        "EVERY": segments.EVERY,
        "OWN": _OWN,
        "BLOCKS": blocks,
        "SHARED": shared,
    }
    return nvrtc.kernel(FILES[file], file, macros, threads, shared, device)


@functools.cache
def summer(name: str, dtype: torch.dtype, states: int, is_log: bool, device: int) -> nvrtc.Kernel:
    """A kernel of combine.cu or gather.cu, a thread a sum."""
    macros = {
        "IN": CODES[dtype],
        "STATES": states,
        "LOG_A": int(is_log),
        "EVEN": 0,
        "HAS_BIAS": 0,
        "SOFTPLUS": 0,
        "THREADS": _SUMS,
    }
    return nvrtc.kernel(FILES[name.split("_")[0]], name, macros, _SUMS, 0, device)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(d_state: int) -> int:
    """States that the kernels compute with; those that are too many stay zero."""
    return 8 if d_state <= 8 else 16


def shape_kept(n_sequences: int, length: int, packed: bool, channels: int, d_state: int) -> tuple[int, ...]:
    """Of what `forward` keeps for `backward`."""
    return segments.n_checkpoints(n_sequences, length, packed), channels, padded(d_state)


def _segments(inputs: Inputs, leads: bool) -> segments.Segments:
    device = inputs.A.device
    packed = inputs.cu_seqlens is not None
    first, steps = segments.steps_of(
        inputs.n_sequences, inputs.length, inputs.blocks, _processors(device.index), packed, leads
    )
    if inputs.cu_seqlens is not None:
        return segments.of_packed(inputs.cu_seqlens, inputs.length, steps, inputs.reverse)
    return segments.of_batch(inputs.batch, inputs.length, first, steps, inputs.reverse, device)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y `(rows, channels)` of the dtype of x, the final state, and what `backward` wants if `keep`: the states before
    every 16th step."""
    table, device = _segments(inputs, leads=True), inputs.A.device
    n_sequences, channels, d_state = inputs.n_sequences, inputs.channels, inputs.d_state
    final = _left_over(inputs, inputs.state)
    y = torch.empty(inputs.batch * inputs.length, channels, dtype=inputs.x.data.dtype, device=device)
    packed = inputs.cu_seqlens is not None
    shape = shape_kept(n_sequences, inputs.length, packed, channels, d_state) if keep else (0,)
    kept = torch.empty(shape, device=device)
    kernel = kernel_of("forward", inputs)
    local = sum_dt = entering = None
    if table.cut:
        local, sum_dt, entering = _buffers(inputs, len(table.row0))
    grid = len(table.row0) * inputs.blocks
    outputs = (*table[:5], *inputs.sizes(), y, channels, final, kept if keep else None, local, sum_dt)
    if table.cut:
        kernel(grid, 1, *inputs.addresses(), inputs.state, None, *outputs)
        _combine(inputs, table, local, sum_dt, None, 1, entering)
        kernel(grid, 2, *inputs.addresses(), inputs.state, entering, *outputs)
    else:
        kernel(grid, 0, *inputs.addresses(), inputs.state, None, *outputs)
    return y, final, kept


def backward(inputs: Inputs, dy: Rows, dstate: Tensor | None, kept: Tensor, into: Into | None = None) -> Gradients:
    """The gradients, some of them written `into` other tensors. dstate: float32, contiguous, or None for zeros."""
    table, device, dtype = _segments(inputs, leads=False), inputs.A.device, inputs.x.data.dtype
    count, channels, d_state = len(table.row0), inputs.channels, inputs.d_state
    rows, states = inputs.batch * inputs.length, padded(inputs.d_state)
    grid = count * inputs.blocks
    entering = dstate
    if table.cut:
        local, sum_dt, entering = _buffers(inputs, count)
        kernel_of("backward_summary", inputs, dy)(
            grid,
            *inputs.dt,
            *((None, 0) if inputs.z is None else inputs.z),
            *inputs.C,
            inputs.A,
            inputs.bias,
            *dy,
            table.row0,
            table.length,
            table.flags,
            *inputs.sizes(),
            local,
            sum_dt,
        )
        _combine(inputs, table, local, sum_dt, dstate, -1, entering)
    dx, ddt = (torch.empty(rows, channels, dtype=dtype, device=device) for _ in range(2))
    dz = None if into is None else into.dz
    if inputs.z is not None and dz is None:
        dz = torch.empty(rows, channels, dtype=dtype, device=device)
    dBC = torch.empty(inputs.blocks, rows, 2, states, device=device)
    parts = torch.empty(count * channels * (d_state + 2), device=device)
    parts_A, parts_D, parts_bias = parts.split([count * channels * n for n in (d_state, 1, 1)])
    dinitial = _left_over(inputs, dstate)
    kernel_of("backward", inputs, dy)(
        grid,
        *inputs.addresses(),
        *dy,
        entering,
        *table[:5],
        *inputs.sizes(),
        kept,
        rows,
        dx,
        channels,
        ddt,
        dz,
        0 if dz is None else dz.stride(-2),
        *((None, 0) if into is None else (into.gated, into.gated.stride(-2))),
        dBC,
        parts_A,
        parts_D,
        parts_bias,
        dinitial,
    )
    # tensors of their own: what an operator returns may not share memory
    dA = torch.empty(channels, d_state, device=device)
    dD, dbias = (torch.empty(channels, device=device) for _ in range(2))
    over_channels = summer("gather_channels", dtype, states, inputs.is_log, device.index)
    parts_of = (parts_A, parts_D, parts_bias, table.length, count, channels, d_state)
    over_channels(-(-channels * (d_state + 2) // _SUMS), *parts_of, inputs.A, dA, dD, dbias)
    groups = channels // inputs.per_group
    if into is None:
        dB, dC = (torch.empty(rows, groups, d_state, dtype=dtype, device=device) for _ in range(2))
    else:
        dB, dC = into.dB, into.dC
    over_blocks = summer("gather_states", dtype, states, inputs.is_log, device.index)
    grid_of_sums = (-(-rows * 2 * states // _SUMS), groups)
    stride = groups * d_state if into is None else dB.stride(-2)
    over_blocks(grid_of_sums, dBC, rows, groups, inputs.blocks // groups, d_state, stride, dB, dC)
    return Gradients(dx, ddt, dz, dB, dC, dA, dD, dbias, dinitial)


def _left_over(inputs: Inputs, state: Tensor | None) -> Tensor:
    """Where a kernel writes states; what it leaves there is that of sequences of length 0, which keep theirs."""
    shape, device = (inputs.n_sequences, inputs.channels, inputs.d_state), inputs.A.device
    if inputs.cu_seqlens is None:
        return torch.empty(shape, device=device)
    return torch.zeros(shape, device=device) if state is None else state.clone()


def _buffers(inputs: Inputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` segments: what they make of no state, the sums of their step sizes, what enters them."""
    device, shape = inputs.A.device, (count, inputs.channels, inputs.d_state)
    return torch.empty(shape, device=device), torch.empty(shape[:2], device=device), torch.empty(shape, device=device)


def _combine(
    inputs: Inputs,
    table: segments.Segments,
    local: Tensor | None,
    sum_dt: Tensor | None,
    first: Tensor | None,
    go: int,
    to: Tensor | None,
) -> None:
    sizes = (inputs.channels, inputs.d_state)
    grid = (-(-inputs.channels * inputs.d_state // _SUMS), inputs.n_sequences)
    kernel = summer("combine", torch.float32, STATES, inputs.is_log, inputs.A.device.index)
    kernel(grid, local, sum_dt, inputs.A, first, table.begin, table.pieces, go, *sizes, to)
