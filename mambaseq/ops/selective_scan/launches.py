"""Compiling and launching the kernels of the selective scan (the .cu files), on rows of numbers.

Where there are too few channels to fill the GPU, sequences are cut into segments (see segments.py): first the effect of
each segment on a state is computed, then the states that enter them, then all segments run in parallel. Nothing is
summed by atomics.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.selective_scan import segments

CHANNELS = 64  # of a block
STATES = 16  # the most that the kernels take at once, real or complex
_OWN = 8  # the states of a thread, two channels' in the backward kernel; complex ones count twice
NARROW_THREADS = 128  # that run the recurrence in a block of the kernel for few channels
_AHEAD = 4  # tiles that the kernel for few channels has on their way from memory
_SUMS = 128  # that a block of a kernel which sums takes
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOLDER = Path(__file__).parent
_COMMON = _FOLDER / "common.cu"
FILES = {
    "forward": (_COMMON, _FOLDER / "forward.cu"),
    "forward_narrow": (_COMMON, _FOLDER / "forward_narrow.cu"),
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
    """All rows have the dtype of x; A, D and bias are float32 and contiguous. `forward` takes them of any dtype that
    rows may have, the same of all three, and widens them as it reads them.

    is_log: A holds log(-A). per_group: channels of a group of B and C. state: float32, contiguous. Where A and the
    state are complex64, B and C are rows of pairs of real and imaginary parts. constant_B, constant_C: B, C are
    `(channels, d_state)` instead, of the dtype of A, contiguous.
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
    constant_B: bool = False
    constant_C: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.channels // CHANNELS)

    @property
    def n_sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def d_state(self) -> int:
        return self.A.shape[1]

    @property
    def numbers(self) -> int:
        """Of a channel's states: complex ones have two."""
        return numbers_of(self.A)

    @property
    def weights(self) -> torch.dtype:
        """Of the numbers of A, D and bias."""
        return torch.float32 if self.A.is_complex() else self.A.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.complex64 if self.A.is_complex() else torch.float32

    def addresses(self) -> tuple[Any, ...]:
        z = (None, 0) if self.z is None else self.z
        return (*self.x, *self.dt, *z, *self.B, *self.C, self.A, self.D, self.bias)

    def sizes(self) -> tuple[int, ...]:
        return -1 if self.reverse else 1, self.channels, self.numbers, self.per_group


class Into(NamedTuple):
    """Where `backward` writes what is not to have tensors of its own: rows of numbers that lie beside each other, of
    the dtype of x. Only for one group of B and C."""

    dz: Tensor  # (..., channels)
    gated: Tensor  # (..., channels): y once more, which need not be kept until now
    dB: Tensor  # (..., d_state), rows as far apart as those of dC
    dC: Tensor


class Gradients(NamedTuple):
    """dx, ddt, dz `(rows, channels)` and dB, dC `(rows, groups, d_state)`, pairs of numbers where states are complex,
    or as constant ones are; the others float32, or of the dtype of A, dA that of log(-A) if A was given so."""

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


def kernel_of(file: str, inputs: Inputs, dy: Rows | None = None, channels: int = CHANNELS) -> nvrtc.Kernel:
    """The kernel of a file for these inputs, which takes so many channels a block; compiled if it has not been."""
    dtype, numbers = inputs.x.data.dtype, inputs.numbers
    varying = [M for M, constant in ((inputs.B, inputs.constant_B), (inputs.C, inputs.constant_C)) if not constant]
    wide = [row for row in (inputs.x, inputs.dt, inputs.z, dy) if row is not None]
    states = padded(numbers)
    return compiled(
        file,
        dtype,
        states,
        inputs.A.is_complex(),
        inputs.constant_B,
        inputs.constant_C,
        inputs.z is not None,
        inputs.D is not None,
        inputs.bias is not None,
        inputs.dt_softplus,
        inputs.is_log,
        inputs.weights,
        alignment(math.gcd(channels, inputs.channels), dtype.itemsize, *wide),
        min(alignment(numbers, dtype.itemsize, *varying), states * dtype.itemsize),
        inputs.channels % 2 == 0,
        channels,
        inputs.A.device.index,
    )


def _block(
    file: str, item: int, states: int, has_z: bool, is_complex: bool = False, channels: int = CHANNELS
) -> tuple[int, int, int, int]:
    """Of a thread block: steps of a tile, threads, how many a multiprocessor should have registers for, and bytes of
    shared memory: `struct Shared`, which the sources hold against it."""
    threads = CHANNELS * states // _OWN
    if file == "forward_narrow":
        ring, own = _AHEAD + 2, channels * states // NARROW_THREADS
        subs = states // own
        raw = channels * item * (3 if has_z else 2) + 2 * states * item
        made = channels * (8 + 4 * subs) + states * 8
        shared = 32 * (ring * raw + 2 * made) + 2 * channels * (16 + subs * 32 + 16) + 1024
        return 32, NARROW_THREADS, 4 // own, shared
    if file == "backward":
        tile, blocks = segments.EVERY, 256 // threads
        raw = CHANNELS * item * (8 if has_z else 6) + states * item * 4
        sums = 8 if states == 32 else 4
        made = (
            CHANNELS * (8 + 4 + 8) + (2 if is_complex else 4) * states * 8 + 4 * (CHANNELS + 16) + threads * (sums + 16)
        )
    else:
        tile, blocks = 16 if item == 4 else 32, 512 // threads
        raw = (CHANNELS + 32 * _OWN // states) * item * (9 if has_z else 6) + states * item * 4
        made = states * 16
    return tile, threads, blocks, tile * (raw + made) + 512


def shared_memory(dtype: torch.dtype, d_state: int, has_z: bool, is_complex: bool = False) -> int:
    """Bytes of it that a thread block needs at most, backward."""
    return _block("backward", dtype.itemsize, padded(d_state * (1 + is_complex)), has_z, is_complex)[3]


@functools.cache
def compiled(
    file: str,
    dtype: torch.dtype,
    states: int,
    is_complex: bool,
    constant_B: bool,
    constant_C: bool,
    has_z: bool,
    has_D: bool,
    has_bias: bool,
    softplus: bool,
    is_log: bool,
    weights: torch.dtype,
    alignment: int,
    alignment_of_states: int,
    even: bool,
    channels: int,
    device: int,
) -> nvrtc.Kernel:
    """One for each of these; none of the lengths and widths is among them."""
    tile, threads, blocks, shared = _block(file, dtype.itemsize, states, has_z, is_complex, channels)
    macros = {
        "IN": CODES[dtype],
        "STATES": states,
        "COMPLEX": int(is_complex),
        "CONSTANT_B": int(constant_B),
        "CONSTANT_C": int(constant_C),
        "HAS_Z": int(has_z),
        "HAS_D": int(has_D),
        "HAS_BIAS": int(has_bias),
        "SOFTPLUS": int(softplus),
        "LOG_A": int(is_log),
        "WEIGHTS": CODES[weights],
        "VEC": alignment,
        "VEC_BC": alignment_of_states,
        "EVEN": int(even),
        "TILE": tile,
        "THREADS": threads,
        "EVERY": segments.EVERY,
        "OWN": channels * states // threads if file == "forward_narrow" else _OWN,
        "AHEAD": _AHEAD,
        "BLOCKS": blocks,
        "SHARED": shared,
    }
    roles = 3 if file == "forward_narrow" else 1  # THREADS is that of each
    return nvrtc.kernel(FILES[file], file, macros, roles * threads, shared, device)


@functools.cache
def summer(
    name: str,
    dtype: torch.dtype,
    states: int,
    is_log: bool,
    device: int,
    is_complex: bool = False,
    weights: torch.dtype = torch.float32,
) -> nvrtc.Kernel:
    """A kernel of combine.cu or gather.cu, a thread a sum."""
    macros = {
        "IN": CODES[dtype],
        "STATES": states,
        "COMPLEX": int(is_complex),
        "LOG_A": int(is_log),
        "WEIGHTS": CODES[weights],
        "EVERY": segments.EVERY,
        "EVEN": 0,
        "HAS_BIAS": 0,
        "SOFTPLUS": 0,
        "THREADS": _SUMS,
    }
    return nvrtc.kernel(FILES[name.split("_")[0]], name, macros, _SUMS, 0, device)


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def room(device: int) -> int:
    """Bytes of shared memory that a thread block can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    # AMD's have one number
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _narrow(inputs: Inputs) -> int | None:
    """Channels of a block, if the kernel for few channels runs these forward."""
    states, item, device = padded(inputs.d_state), inputs.x.data.dtype.itemsize, inputs.A.device.index
    if inputs.cu_seqlens is not None or inputs.A.is_complex() or inputs.constant_B or inputs.constant_C:
        return None
    two, four = (inputs.batch * -(-inputs.channels // narrow_channels(states, own)) for own in (2, 4))
    chosen = segments.narrow_states(two, four, inputs.batch * inputs.blocks, inputs.length, processors(device))
    for own in range(min(chosen, states // 4), 0, -2):  # of at most 32 channels: a warp brings a row
        channels = narrow_channels(states, own)
        if _block("forward_narrow", item, states, inputs.z is not None, channels=channels)[3] <= room(device):
            return channels
    return None


def narrow_channels(states: int, own: int) -> int:
    """Channels of a block of the kernel for few channels, whose threads have `own` of a channel's padded states."""
    return NARROW_THREADS * own // states


def padded(numbers: int) -> int:
    """Numbers of a channel's states that the kernels compute with; those that are too many stay zero."""
    return next(size for size in (8, 16, 32) if numbers <= size)


def numbers_of(A: Tensor) -> int:
    """Of the states of a channel: complex ones have two."""
    return A.shape[1] * (1 + A.is_complex())


def shape_kept(n_sequences: int, length: int, packed: bool, channels: int, numbers: int) -> tuple[int, ...]:
    """Of what `forward` keeps for `backward`."""
    return segments.n_checkpoints(n_sequences, length, packed), channels, padded(numbers)


def _cut(inputs: Inputs, leads: bool) -> segments.Cut:
    n_sequences, length = inputs.n_sequences, inputs.length
    packed = inputs.cu_seqlens is not None
    available = processors(inputs.A.device.index)
    wide = padded(inputs.numbers) == 32
    first, steps = segments.steps_of(n_sequences, length, inputs.blocks, available, packed, leads, wide)
    return segments.cut(n_sequences, length, first, steps, inputs.cu_seqlens, inputs.reverse)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y `(rows, channels)` of the dtype of x, the final state, and what `backward` wants if `keep`: the states before
    every 16th step."""
    device = inputs.A.device
    n_sequences, channels = inputs.n_sequences, inputs.channels
    final = segments.room_for_states(inputs.A, n_sequences, inputs.cu_seqlens, inputs.state, inputs.state_dtype)
    y = torch.empty(inputs.batch * inputs.length, channels, dtype=inputs.x.data.dtype, device=device)
    packed = inputs.cu_seqlens is not None
    shape = shape_kept(n_sequences, inputs.length, packed, channels, inputs.numbers) if keep else (0,)
    kept = torch.empty(shape, device=device)
    if (narrow := _narrow(inputs)) is not None:
        whole = (*(None,) * 5, inputs.length, inputs.length, inputs.length, 1)
        kernel_of("forward_narrow", inputs, channels=narrow)(
            n_sequences * -(-channels // narrow),
            *inputs.addresses(),
            inputs.state,
            *whole,
            *inputs.sizes(),
            y,
            channels,
            final,
            kept if keep else None,
        )
        return y, final, kept
    cut = _cut(inputs, leads=True)
    kernel = kernel_of("forward", inputs)
    grid = cut.total * inputs.blocks
    outputs = (*cut.arguments(), *inputs.sizes(), y, channels, final, kept if keep else None)
    if cut.is_cut:
        local, sum_dt, entering = _buffers(inputs, cut.total)
        kernel(grid, 1, *inputs.addresses(), inputs.state, None, *outputs, local, sum_dt)
        _combine(inputs, cut, local, sum_dt, None, 1, entering)
        kernel(grid, 2, *inputs.addresses(), inputs.state, entering, *outputs, None, None)
    else:
        kernel(grid, 0, *inputs.addresses(), inputs.state, None, *outputs, None, None)
    return y, final, kept


def backward(inputs: Inputs, dy: Rows, dstate: Tensor | None, kept: Tensor, into: Into | None = None) -> Gradients:
    """The gradients, some of them written `into` other tensors. dstate: float32, contiguous, or None for zeros."""
    cut, device, dtype = _cut(inputs, leads=False), inputs.A.device, inputs.x.data.dtype
    count, channels, numbers = cut.total, inputs.channels, inputs.numbers
    rows, states = inputs.batch * inputs.length, padded(numbers)
    grid = count * inputs.blocks
    entering = dstate
    if cut.is_cut:
        local, sum_dt, entering = _buffers(inputs, count)
        kernel_of("backward_summary", inputs, dy)(
            grid,
            *inputs.dt,
            *((None, 0) if inputs.z is None else inputs.z),
            *inputs.C,
            inputs.A,
            inputs.bias,
            *dy,
            *cut.arguments(),
            *inputs.sizes(),
            local,
            sum_dt,
        )
        _combine(inputs, cut, local, sum_dt, dstate, -1, entering)
    dx, ddt = (torch.empty(rows, channels, dtype=dtype, device=device) for _ in range(2))
    dz = None if into is None else into.dz
    if inputs.z is not None and dz is None:
        dz = torch.empty(rows, channels, dtype=dtype, device=device)
    varies = not (inputs.constant_B and inputs.constant_C)
    dBC = torch.empty(inputs.blocks if varies else 0, rows, 2, states, device=device)
    parts = torch.empty(count * channels * (numbers + 2), device=device)
    parts_A, parts_D, parts_bias = parts.split([count * channels * n for n in (numbers, 1, 1)])
    # those of sequences of length 0 are not written
    made = torch.empty if cut.table is None else torch.zeros
    parts_B, parts_C = (
        made(count, *inputs.A.shape, dtype=inputs.A.dtype, device=device) if constant else None
        for constant in (inputs.constant_B, inputs.constant_C)
    )
    dinitial = segments.room_for_states(inputs.A, inputs.n_sequences, inputs.cu_seqlens, dstate)
    kernel_of("backward", inputs, dy)(
        grid,
        *inputs.addresses(),
        *dy,
        entering,
        *cut.arguments(),
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
        parts_B,
        parts_C,
    )
    # tensors of their own: what an operator returns may not share memory
    dA = torch.empty_like(inputs.A)
    dD, dbias = (torch.empty(channels, device=device) for _ in range(2))
    over_channels = summer("gather_channels", dtype, states, inputs.is_log, device.index)
    lengths = None if cut.table is None else cut.table.length
    parts_of = (parts_A, parts_D, parts_bias, lengths, count, channels, numbers)
    over_channels(-(-channels * (numbers + 2) // _SUMS), *parts_of, inputs.A, dA, dD, dbias)
    groups = channels // inputs.per_group
    if into is None:
        dB, dC = (
            torch.empty(rows, groups, numbers, dtype=dtype, device=device) if parts is None else parts.sum(0)
            for parts in (parts_B, parts_C)
        )
    else:
        dB, dC = into.dB, into.dC
    if varies:
        over_blocks = summer("gather_states", dtype, states, inputs.is_log, device.index)
        grid_of_sums = (-(-rows * 2 * states // _SUMS), groups)
        stride = groups * numbers if into is None else dB.stride(-2)
        to = (dB if parts_B is None else None, dC if parts_C is None else None)
        over_blocks(grid_of_sums, dBC, rows, groups, inputs.blocks // groups, numbers, stride, *to)
    return Gradients(dx, ddt, dz, dB, dC, dA, dD, dbias, dinitial)


def _buffers(inputs: Inputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` segments: what they make of no state, the sums of their step sizes, what enters them."""
    shape, dtype = (count, inputs.channels, inputs.d_state), inputs.state_dtype
    total = torch.float64 if inputs.A.is_complex() else torch.float32
    local, entering = (inputs.A.new_empty(shape, dtype=dtype) for _ in range(2))
    return local, inputs.A.new_empty(shape[:2], dtype=total), entering


def _combine(
    inputs: Inputs, cut: segments.Cut, local: Tensor, sum_dt: Tensor, first: Tensor | None, go: int, to: Tensor
) -> None:
    tables = (None, None) if cut.table is None else cut.table[5:]
    grid = (inputs.n_sequences, -(-inputs.channels * inputs.d_state // _SUMS))
    is_complex = inputs.A.is_complex()
    device, weights = inputs.A.device.index, inputs.weights
    kernel = summer("combine", torch.float32, STATES, inputs.is_log, device, is_complex, weights)
    kernel(grid, local, sum_dt, inputs.A, first, *tables, cut.pieces, go, inputs.channels, inputs.d_state, to)
