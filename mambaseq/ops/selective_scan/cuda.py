"""The selective scan on NVIDIA GPUs: hands tensors to the kernels of the .cu files beside this one.

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
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import nvrtc
from mambaseq.ops.selective_scan import library, segments
from mambaseq.ops.selective_scan.arguments import ScanArguments

_CHANNELS = 64  # of a block
STATES = 16  # the most that the kernels take at once
_OWN = 8  # the states of a thread, two channels' in the backward kernel
_SUMS = 128  # that a block of a kernel which sums takes
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOLDER = Path(__file__).parent
_COMMON = _FOLDER / "common.cu"
_FILES = {
    "forward": (_COMMON, _FOLDER / "forward.cu"),
    "backward": (_COMMON, _FOLDER / "backward.cu"),
    "backward_summary": (_COMMON, _FOLDER / "backward_summary.cu"),
    "gather": (_COMMON, _FOLDER / "gather.cu"),
    "combine": (_FOLDER / "combine.cu",),
}


def why_not(arguments: ScanArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    if x.device.type != "cuda":
        return f"the kernels run on CUDA, x is on {x.device}"
    if (reason := _why_not_on(x.device)) is not None:
        return reason
    if A.is_complex():
        return "A is complex"
    if B.ndim == 2 or C.ndim == 2:
        return "B or C is constant in time"
    if x.numel() == 0:
        return "x is empty"
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    if x.dtype not in _CODES:
        return f"x is {x.dtype}"
    for M in (B, C):
        if M.ndim == 4 and M.shape[2] > 1 and (x.shape[2] // M.shape[2]) % _CHANNELS:
            return f"the channels of a group are not a multiple of {_CHANNELS}"
    return None


@functools.cache
def _missing_on(device: torch.device) -> str | None:
    if (reason := nvrtc.why_not()) is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@torch.compiler.assume_constant_result
def _why_not_on(device: torch.device) -> str | None:
    """What a compiler takes as it is: it would trace the looking up of packages, and does not see a cache."""
    return _missing_on(device)


def run(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    d_state = arguments.A.shape[1]
    if d_state <= STATES:
        return _op(arguments)
    # More states than a thread block holds: a scan for each few of them, in fp32, and the rest of the block after it.
    x, z = arguments.x.float(), arguments.z
    dt = arguments.dt.float()
    total: Tensor | None = None
    finals = []
    for n in range(0, d_state, STATES):
        part = slice(n, n + STATES)
        state = arguments.initial_state
        y, final = _op(
            arguments._replace(
                x=x,
                dt=dt,
                A=arguments.A[:, part],
                B=arguments.B[..., part],
                C=arguments.C[..., part],
                D=None,
                z=None,
                initial_state=None if state is None else state[..., part],
            )
        )
        total = y if total is None else total + y
        finals.append(final)
    assert total is not None
    if arguments.D is not None:
        total = total + arguments.D.float() * x
    if z is not None:
        total = total * F.silu(z.float())
    return total.to(arguments.x.dtype), torch.cat(finals, dim=-1)


class _Rows(NamedTuple):
    """`(batch, length, …)` as rows of numbers that lie beside each other."""

    data: Tensor  # its address is that of the first row
    stride: int


class _Inputs(NamedTuple):
    x: _Rows
    dt: _Rows
    z: _Rows | None
    B: _Rows
    C: _Rows
    A: Tensor
    D: Tensor | None
    bias: Tensor | None
    channels: int
    d_state: int
    per_group: int  # channels of a group of B and C
    rows: int
    n_sequences: int
    go: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // _CHANNELS)

    def scan_arguments(self) -> tuple[Any, ...]:
        z = (None, 0) if self.z is None else self.z
        return (*self.x, *self.dt, *z, *self.B, *self.C, self.A, self.D, self.bias)


def _rows(value: Tensor, dtype: torch.dtype) -> _Rows:
    value = value.detach().to(dtype)
    batch, length = value.shape[:2]
    row = value.flatten(2)
    inner = row.stride(2) == 1 or row.shape[2] == 1
    if not inner or (batch > 1 and length > 1 and row.stride(0) != length * row.stride(1)):
        row = row.contiguous()
    if length == 1:
        return _Rows(row, row.stride(0) if batch > 1 else row.shape[2])
    return _Rows(row, row.stride(1))


def _prepare(arguments: ScanArguments) -> _Inputs:
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    batch, length, channels = x.shape
    values = (x, arguments.dt, B, C, *(() if arguments.z is None else (arguments.z,)))
    same = all(value.dtype == x.dtype for value in values)
    dtype = x.dtype if same else torch.float32
    groups = math.lcm(*(M.shape[2] if M.ndim == 4 else 1 for M in (B, C)))
    B, C = (_in_groups(M, groups) for M in (B, C))
    return _Inputs(
        _rows(x, dtype),
        _rows(arguments.dt, dtype),
        None if arguments.z is None else _rows(arguments.z, dtype),
        _rows(B, dtype),
        _rows(C, dtype),
        A.detach().float().contiguous(),
        None if arguments.D is None else arguments.D.detach().float().contiguous(),
        None if arguments.dt_bias is None else arguments.dt_bias.detach().float().contiguous(),
        channels,
        A.shape[1],
        channels // groups,
        batch * length,
        arguments.n_sequences,
        -1 if arguments.reverse else 1,
    )


def _in_groups(M: Tensor, groups: int) -> Tensor:
    own = M.shape[2] if M.ndim == 4 else 1
    return M if own == groups else M.reshape(*M.shape[:2], own, -1).repeat_interleave(groups // own, dim=2)


def _alignment(width: int, item: int, *values: _Rows) -> int:
    """Bytes that can be copied at a time: 16, 8, 4, or 0 for rows that are not aligned."""
    common = math.gcd(
        16, width * item, *(row.stride * item for row in values), *(row.data.data_ptr() for row in values)
    )
    return common if common >= 4 else 0


def _kernel(file: str, inputs: _Inputs, softplus: bool, dy: _Rows | None = None) -> nvrtc.Kernel:
    dtype = inputs.x.data.dtype
    wide = [row for row in (inputs.x, inputs.dt, inputs.z, dy) if row is not None]
    states = _states(inputs.d_state)
    return _compiled(
        file,
        dtype,
        states,
        inputs.z is not None,
        inputs.D is not None,
        inputs.bias is not None,
        softplus,
        _alignment(inputs.channels, dtype.itemsize, *wide),
        min(_alignment(inputs.d_state, dtype.itemsize, inputs.B, inputs.C), states * dtype.itemsize),
        inputs.channels % 2 == 0,
        inputs.A.device.index,
    )


@functools.cache
def _compiled(
    file: str,
    dtype: torch.dtype,
    states: int,
    has_z: bool,
    has_D: bool,
    has_bias: bool,
    softplus: bool,
    alignment: int,
    alignment_of_states: int,
    even: bool,
    device: int,
) -> nvrtc.Kernel:
    item = dtype.itemsize
    threads = _CHANNELS * states // _OWN
    if file == "backward":
        tile, blocks = segments.EVERY, 2
        raw = _CHANNELS * item * (8 if has_z else 6) + states * item * 4
        made = _CHANNELS * (8 + 4 + 8) + 4 * states * 8 + 4 * (_CHANNELS + 16) + threads * (4 + 16)
    else:
        tile, blocks = 16 if item == 4 else 32, 3
        raw = (_CHANNELS + 32 * _OWN // states) * item * (9 if has_z else 6) + states * item * 4
        made = states * 16
    shared = tile * (raw + made) + 512  # of `struct Shared`; the sources check that it is enough
    macros = {
        "IN": _CODES[dtype],
        "STATES": states,
        "HAS_Z": int(has_z),
        "HAS_D": int(has_D),
        "HAS_BIAS": int(has_bias),
        "SOFTPLUS": int(softplus),
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
    return nvrtc.kernel(_FILES[file], file, macros, threads, shared, device)


@functools.cache
def _summer(name: str, dtype: torch.dtype, states: int, device: int) -> nvrtc.Kernel:
    """A kernel of combine.cu or gather.cu, a thread a sum."""
    macros = {"IN": _CODES[dtype], "STATES": states, "EVEN": 0, "HAS_BIAS": 0, "SOFTPLUS": 0, "THREADS": _SUMS}
    return nvrtc.kernel(_FILES[name.split("_")[0]], name, macros, _SUMS, 0, device)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _states(d_state: int) -> int:
    return 8 if d_state <= 8 else 16


def shape_kept(arguments: ScanArguments) -> tuple[int, ...]:
    packed = arguments.cu_seqlens is not None
    count = segments.n_checkpoints(arguments.n_sequences, arguments.x.shape[1], packed)
    channels, d_state = arguments.A.shape
    return count, channels, _states(d_state)


def _segments(arguments: ScanArguments, leads: bool) -> segments.Segments:
    x, packed = arguments.x, arguments.cu_seqlens is not None
    batch, length, channels = x.shape
    blocks = -(-channels // _CHANNELS)
    processors = _processors(x.device.index)
    first, steps = segments.steps_of(arguments.n_sequences, length, blocks, processors, packed, leads)
    if arguments.cu_seqlens is not None:
        return segments.of_packed(arguments.cu_seqlens, length, steps, arguments.reverse)
    return segments.of_batch(batch, length, first, steps, arguments.reverse, x.device)


def forward(arguments: ScanArguments, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what `backward` wants if `keep`: the states before every 16th step."""
    with torch.cuda.device(arguments.x.device):
        inputs, table = _prepare(arguments), _segments(arguments, leads=True)
        device = arguments.x.device
        state = arguments.initial_state
        state = None if state is None else state.detach().float().contiguous()
        shape = (inputs.n_sequences, inputs.channels, inputs.d_state)
        final = _left_over(arguments, state, shape)
        y = torch.empty(inputs.rows, inputs.channels, dtype=inputs.x.data.dtype, device=device)
        kept = torch.empty(shape_kept(arguments) if keep else (0,), device=device)
        sizes = (inputs.go, inputs.channels, inputs.d_state, inputs.per_group)
        grid = len(table.row0) * inputs.blocks
        kernel = _kernel("forward", inputs, arguments.dt_softplus)
        local = sum_dt = entering = None
        if table.cut:
            local, sum_dt, entering = _buffers(inputs, len(table.row0))

        def run(part: int, entering: Tensor | None) -> None:
            outputs = (y, y.stride(0), final, kept if keep else None, local, sum_dt)
            kernel(grid, part, *inputs.scan_arguments(), state, entering, *table[:5], *sizes, *outputs)

        if table.cut:
            run(1, None)
            _combine(inputs, table, local, sum_dt, None, 1, entering)
            run(2, entering)
        else:
            run(0, None)
        return y.view(arguments.x.shape).to(arguments.x.dtype), final, kept


class Into(NamedTuple):
    """Where `backward` writes what is not to have tensors of its own: rows of numbers that lie beside each other, of
    the dtype that x, dt, z, B and C share. Only for one group of B and C."""

    dz: Tensor  # (batch, length, channels)
    gated: Tensor  # (batch, length, channels): y once more, which need not be kept until now
    dB: Tensor  # (batch, length, d_state), rows as far apart as those of dC
    dC: Tensor


def backward(
    arguments: ScanArguments, dy: Tensor, dfinal: Tensor | None, kept: Tensor, into: Into | None = None
) -> library.Gradients:
    """The gradients of `arguments`, some of them written `into` other tensors."""
    with torch.cuda.device(arguments.x.device):
        inputs, table = _prepare(arguments), _segments(arguments, leads=False)
        device, count = arguments.x.device, len(table.row0)
        dtype = inputs.x.data.dtype
        upstream = _rows(dy, dtype)
        dstate = None if dfinal is None else dfinal.detach().float().contiguous()
        rest = (*table[:5], inputs.go, inputs.channels, inputs.d_state, inputs.per_group)
        grid = count * inputs.blocks
        entering = dstate
        softplus = arguments.dt_softplus
        if table.cut:
            local, sum_dt, entering = _buffers(inputs, count)
            summary = _kernel("backward_summary", inputs, softplus, upstream)
            summary(
                grid,
                *inputs.dt,
                *((None, 0) if inputs.z is None else inputs.z),
                *inputs.C,
                inputs.A,
                inputs.bias,
                *upstream,
                table.row0,
                table.length,
                table.flags,
                *rest[5:],
                local,
                sum_dt,
            )
            _combine(inputs, table, local, sum_dt, dstate, -1, entering)
        shape, states = (inputs.rows, inputs.channels), _states(inputs.d_state)
        dx, ddt = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        dz = None if into is None else into.dz
        if inputs.z is not None and dz is None:
            dz = torch.empty(shape, dtype=dtype, device=device)
        dBC = torch.empty(inputs.blocks, inputs.rows, 2, states, device=device)
        parts = torch.empty(count * inputs.channels * (inputs.d_state + 2), device=device)
        dA, dD, dbias = parts.split([count * inputs.channels * n for n in (inputs.d_state, 1, 1)])
        dinitial = _left_over(arguments, dstate, (inputs.n_sequences, inputs.channels, inputs.d_state))
        _kernel("backward", inputs, softplus, upstream)(
            grid,
            *inputs.scan_arguments(),
            *upstream,
            entering,
            *rest,
            kept,
            inputs.rows,
            dx,
            inputs.channels,
            ddt,
            dz,
            0 if dz is None else dz.stride(-2),
            *((None, 0) if into is None else (into.gated, into.gated.stride(-2))),
            dBC,
            dA,
            dD,
            dbias,
            dinitial,
        )
        # tensors of their own: what an operator returns may not share memory
        sums_A, sums_D, sums_bias = (torch.empty(inputs.channels * n, device=device) for n in (inputs.d_state, 1, 1))
        sizes = (count, inputs.channels, inputs.d_state)
        over_channels = _summer("gather_channels", dtype, states, device.index)
        over_channels(
            -(-inputs.channels * (inputs.d_state + 2) // _SUMS),
            dA,
            dD,
            dbias,
            table.length,
            *sizes,
            sums_A,
            sums_D,
            sums_bias,
        )
        dB, dC = _gradients_of_states(arguments, inputs, dBC, into)
        found = (dx, ddt, sums_A, dB, dC, sums_D, dz, sums_bias, dinitial)
        wanted = (*arguments[:8], arguments.initial_state)
        return tuple(
            None if value is None or gradient is None else gradient.view(value.shape).to(value.dtype)
            for gradient, value in zip(found, wanted, strict=True)
        )


def _gradients_of_states(
    arguments: ScanArguments, inputs: _Inputs, sums: Tensor, into: Into | None
) -> tuple[Tensor, Tensor]:
    """Those of B and C from the sums of each block, `(blocks, rows, 2, states)`."""
    groups, device = inputs.channels // inputs.per_group, sums.device
    own = [M.shape[2] if M.ndim == 4 else 1 for M in (arguments.B, arguments.C)]
    dtype = inputs.x.data.dtype if own == [groups, groups] else torch.float32
    shape, states = (inputs.rows, groups, inputs.d_state), sums.shape[-1]
    found = [torch.empty(shape, dtype=dtype, device=device) for _ in own] if into is None else [into.dB, into.dC]
    stride = groups * inputs.d_state if into is None else into.dB.stride(-2)
    over_blocks = _summer("gather_states", dtype, states, device.index)
    grid = (-(-inputs.rows * 2 * states // _SUMS), groups)
    over_blocks(grid, sums, inputs.rows, groups, inputs.blocks // groups, inputs.d_state, stride, *found)
    # groups of one that the other has more of are summed
    dB, dC = (g if n == groups else g.unflatten(1, (n, -1)).sum(2) for g, n in zip(found, own, strict=True))
    return dB, dC


def _left_over(arguments: ScanArguments, state: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Where a kernel writes states; what it leaves there is that of sequences of length 0, which keep theirs."""
    if arguments.cu_seqlens is None:
        return torch.empty(shape, device=arguments.x.device)
    return torch.zeros(shape, device=arguments.x.device) if state is None else state.clone()


def _buffers(inputs: _Inputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` segments: what they make of no state, the sums of their step sizes, what enters them."""
    device, shape = inputs.A.device, (count, inputs.channels, inputs.d_state)
    return torch.empty(shape, device=device), torch.empty(shape[:2], device=device), torch.empty(shape, device=device)


def _combine(
    inputs: _Inputs,
    table: segments.Segments,
    local: Tensor | None,
    sum_dt: Tensor | None,
    first: Tensor | None,
    go: int,
    to: Tensor | None,
) -> None:
    grid = (-(-inputs.channels * inputs.d_state // _SUMS), inputs.n_sequences)
    sizes = (inputs.channels, inputs.d_state)
    _summer("combine", torch.float32, 16, inputs.A.device.index)(
        grid, local, sum_dt, inputs.A, first, table.begin, table.pieces, go, *sizes, to
    )


_op = library.register("selective_scan_cuda", forward, backward, "cuda", shape_kept)
