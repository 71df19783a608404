"""Compiling and launching the kernels of the time-invariant scan (the .cu files), on rows of numbers.

Where there are too few channels to fill the GPU, sequences are cut into segments: first what each segment makes of a
zero state is computed, then the states that enter them, then all segments run in parallel. Nothing is summed by
atomics.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.eager import constant_to_compilers
from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.selective_scan import segments
from mambaseq.ops.selective_scan.launches import CODES, Rows, alignment, processors

STATES = 64  # the most that the kernels take
_TILE = 32  # steps that are fetched together
_SUMS = 128  # threads of a block of combine.cu
_SHORTEST = 128  # steps of a segment, at least
_FOLDER = Path(__file__).parent
_COMMON = (_FOLDER.parent / "selective_scan" / "common.cu", _FOLDER / "common.cu")
FILES: dict[str, tuple[Path, ...]] = {
    name: (*_COMMON, _FOLDER / f"{name}.cu") for name in ("forward", "summary", "backward")
}
FILES["combine"] = (_FOLDER / "combine.cu",)


class Inputs(NamedTuple):
    """All rows have the dtype of x. a (the decay of a step), b, c `(channels, d_state)` and state `(sequences,
    channels, d_state)`: float32 or complex64, contiguous; D `(channels,)`: float32."""

    x: Rows
    z: Rows | None
    a: Tensor
    b: Tensor
    c: Tensor
    D: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    batch: int
    length: int
    channels: int
    reverse: bool

    @property
    def n_sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def d_state(self) -> int:
        return self.a.shape[1]


class Gradients(NamedTuple):
    """dx and dz `(rows, channels)` of the dtype of x; the others as the values that they are of."""

    dx: Tensor
    dz: Tensor | None
    da: Tensor
    db: Tensor
    dc: Tensor
    dD: Tensor | None
    dinitial: Tensor


class _Shape(NamedTuple):
    """Of a thread block: channels, padded states and states of a thread, threads, blocks that a multiprocessor should
    have registers for, bytes of shared memory: `struct Shared`, which the sources hold against it."""

    channels: int
    states: int
    own: int
    threads: int
    blocks: int
    shared: int


def _shape(kernel: str, complex_: bool, d_state: int, item: int, has_z: bool) -> _Shape:
    states = 1 << max(0, d_state - 1).bit_length()
    own = min(states, 4 if complex_ and states <= 32 else 8)
    split = states // own
    channels = 64 if split == 1 and item < 4 else 32
    threads = channels * split
    raw, made = _TILE * channels * item, _TILE * channels * 4
    row_y = _TILE * (channels + 32 // split) * 4
    gate = 3 * raw if has_z else 64
    if kernel == "forward":
        shared, registers = 3 * raw + gate + 2 * row_y, 64
    elif kernel == "summary":
        shared, registers = 3 * raw + gate + (2 * made if has_z else 64), 48
    else:
        shared, registers = 6 * raw + gate + 2 * made + row_y, 128
    if own == 8:
        registers = min(2 * registers, 255)
    return _Shape(channels, states, own, threads, max(1, 65536 // (registers * threads)), shared + 256)


@functools.cache
def compiled(
    file: str,
    complex_: bool,
    d_state: int,
    dtype: torch.dtype,
    has_z: bool,
    has_D: bool,
    from_end: bool,
    copied: int,
    even: bool,
    device: int,
) -> nvrtc.Kernel:
    """One for each of these; no length and no width is among them. copied: see `alignment`."""
    shape = _shape(file, complex_, d_state, dtype.itemsize, has_z)
    macros = {
        "IN": CODES[dtype],
        "COMPLEX": int(complex_),
        "STATES": shape.states,
        "OWN": shape.own,
        "CH": shape.channels,
        "THREADS": shape.threads,
        "BLOCKS": shape.blocks,
        "SHARED": shape.shared,
        "TILE": _TILE,
        "HAS_Z": int(has_z),
        "HAS_D": int(has_D),
        "FROM_END": int(from_end),
        "INPUTS": int(from_end),
        "VEC": copied,
        "EVEN": int(even),
        "EVERY": segments.EVERY,
        "HAS_BIAS": 0,
        "SOFTPLUS": 0,
        "LOG_A": 0,
    }
    return nvrtc.kernel(FILES[file], file, macros, shape.threads, shape.shared, device)


@functools.cache
def combiner(complex_: bool, device: int) -> nvrtc.Kernel:
    """The kernel of combine.cu."""
    return nvrtc.kernel(FILES["combine"], "combine", {"COMPLEX": int(complex_)}, _SUMS, 0, device)


def _kernel(file: str, inputs: Inputs, *rows: Rows, gated: bool = True, from_end: bool = False) -> nvrtc.Kernel:
    dtype, complex_ = inputs.x.data.dtype, inputs.a.is_complex()
    has_z = gated and inputs.z is not None
    used = [inputs.x, *rows, *((inputs.z,) if has_z and inputs.z is not None else ())]
    channels = _shape(file, complex_, inputs.d_state, dtype.itemsize, has_z).channels
    return compiled(
        file,
        complex_,
        inputs.d_state,
        dtype,
        has_z,
        inputs.D is not None,
        from_end,
        alignment(math.gcd(channels, inputs.channels), dtype.itemsize, *used),
        inputs.channels % 2 == 0,
        inputs.a.device.index,
    )


def steps_of(n_sequences: int, length: int, blocks: int, places: int, packed: bool) -> int:
    """Steps of a segment. blocks: of channels. places: thread blocks that the GPU takes side by side."""
    if packed:  # a sequence takes at least one segment, however short
        longest = max(_SHORTEST, -(-length // max(1, n_sequences)) * 2)
        steps = min(longest, max(_SHORTEST, length * blocks // places))
    elif n_sequences * blocks >= places // 2 or length <= 2 * _SHORTEST:
        steps = length
    else:
        pieces = max(1, min(length // _SHORTEST, places // (n_sequences * blocks)))
        steps = -(-length // pieces)
    return max(segments.EVERY, -(-steps // segments.EVERY) * segments.EVERY)


@constant_to_compilers
def _steps(
    n_sequences: int, length: int, channels: int, d_state: int, complex_: bool, packed: bool, device: int
) -> int:
    shape = _shape("forward", complex_, d_state, 4, False)
    places = processors(device) * max(1, 512 // shape.threads)
    return steps_of(n_sequences, length, -(-channels // shape.channels), places, packed)


def n_kept(n_sequences: int, length: int, a: Tensor, packed: bool, device: torch.device) -> int:
    """Of how many segments `forward` keeps what entered them; 0 where sequences are not cut."""
    steps = _steps(n_sequences, length, *a.shape, a.is_complex(), packed, device.index or 0)
    count = segments.n_segments(n_sequences, length, steps, steps, packed)
    return count if packed or count > n_sequences else 0


def _cut(inputs: Inputs) -> segments.Cut:
    """The same forward and backward: what entered each segment is kept."""
    n_sequences, length, packed = inputs.n_sequences, inputs.length, inputs.cu_seqlens is not None
    steps = _steps(n_sequences, length, *inputs.a.shape, inputs.a.is_complex(), packed, inputs.a.device.index)
    return segments.cut(n_sequences, length, steps, steps, inputs.cu_seqlens, inputs.reverse)


def _numbers(value: Tensor | None) -> Tensor | None:
    """As addresses of floats."""
    return torch.view_as_real(value) if value is not None and value.is_complex() else value


def _go(inputs: Inputs) -> int:
    return -1 if inputs.reverse else 1


def _grid(file: str, inputs: Inputs, here: segments.Cut, gated: bool = True) -> int:
    has_z = gated and inputs.z is not None
    shape = _shape(file, inputs.a.is_complex(), inputs.d_state, inputs.x.data.element_size(), has_z)
    return here.total * -(-inputs.channels // shape.channels)


def _across(inputs: Inputs, here: segments.Cut, local: Tensor, gain: Tensor, first: Tensor | None, go: int) -> Tensor:
    """What enters every segment `(segments, channels, d_state)`."""
    entering = torch.empty_like(local)
    table = here.table
    combiner(inputs.a.is_complex(), inputs.a.device.index)(
        (inputs.n_sequences, -(-inputs.channels * inputs.d_state // _SUMS)),
        *(_numbers(value) for value in (local, inputs.a, gain, first)),
        *((None, None, None) if table is None else (table.begin, table.pieces, table.length)),
        here.pieces,
        here.whole,
        here.steps,
        here.steps,
        go,
        inputs.channels,
        inputs.d_state,
        _numbers(entering),
    )
    return entering


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y `(rows, channels)` of the dtype of x, the final state, and what entered each segment (empty where nothing is
    cut)."""
    here = _cut(inputs)
    y = torch.empty(inputs.batch * inputs.length, inputs.channels, dtype=inputs.x.data.dtype, device=inputs.a.device)
    final = segments.room_for_states(inputs.a, inputs.n_sequences, inputs.cu_seqlens, inputs.state)
    entering, kept = inputs.state, inputs.a.new_empty(0)
    sizes = (_go(inputs), inputs.channels, inputs.d_state)
    if here.is_cut:
        local = inputs.a.new_empty(here.total, *inputs.a.shape)
        _kernel("summary", inputs, gated=False)(
            _grid("summary", inputs, here, gated=False),
            *inputs.x,
            None,
            0,
            _numbers(inputs.a),
            *here.arguments(),
            *sizes,
            _numbers(local),
        )
        entering = kept = _across(inputs, here, local, inputs.b, inputs.state, 1)
    _kernel("forward", inputs)(
        _grid("forward", inputs, here),
        *inputs.x,
        *((None, 0) if inputs.z is None else inputs.z),
        *(_numbers(value) for value in (inputs.a, inputs.b, inputs.c)),
        inputs.D,
        _numbers(entering),
        here.is_cut,
        *here.arguments(),
        *sizes,
        y,
        _numbers(final),
    )
    return y, final, kept


def backward(
    inputs: Inputs, dy: Rows, dfinal: Tensor | None, kept: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> Gradients:
    """The gradients. kept: what `forward` returned. dfinal: contiguous, or None for zeros. into: where dz and y, made
    once more, are written, rows of numbers that lie beside each other."""
    here = _cut(inputs)
    dtype, rows = inputs.x.data.dtype, inputs.batch * inputs.length
    sizes = (_go(inputs), inputs.channels, inputs.d_state)
    z = (None, 0) if inputs.z is None else inputs.z
    entering, leaving = inputs.state, dfinal
    if here.is_cut:
        entering = kept
        local = torch.empty_like(kept)
        _kernel("summary", inputs, dy, from_end=True)(
            _grid("summary", inputs, here), *dy, *z, _numbers(inputs.a), *here.arguments(), *sizes, _numbers(local)
        )
        leaving = _across(inputs, here, local, inputs.c, dfinal, -1)
    dx = torch.empty(rows, inputs.channels, dtype=dtype, device=inputs.a.device)
    dz, gated = into or (None if inputs.z is None else torch.empty_like(dx), None)
    da, db, dc = (inputs.a.new_empty(here.total, *inputs.a.shape) for _ in range(3))
    dD = None if inputs.D is None else inputs.D.new_empty(here.total, inputs.channels)
    dinitial = segments.room_for_states(inputs.a, inputs.n_sequences, inputs.cu_seqlens, dfinal)
    arguments = (
        *inputs.x,
        *z,
        *dy,
        *(_numbers(value) for value in (inputs.a, inputs.b, inputs.c)),
        inputs.D,
        _numbers(entering),
        here.is_cut,
        _numbers(leaving),
        here.is_cut,
        *here.arguments(),
        *sizes,
        dx,
        *((None, 0) if dz is None else (dz, dz.stride(-2))),
        *((None, 0) if gated is None else (gated, gated.stride(-2))),
        *(_numbers(value) for value in (db, da, dc)),
        dD,
        _numbers(dinitial),
    )
    for from_end in (True, False):
        _kernel("backward", inputs, dy, from_end=from_end)(_grid("backward", inputs, here), *arguments)
    return Gradients(dx, dz, da.sum(0), db.sum(0), dc.sum(0), None if dD is None else dD.sum(0), dinitial)
