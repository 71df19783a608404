"""The selective scan on NVIDIA GPUs: hands tensors to the kernels of forward.cu, backward.cu and combine.cu.

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
_STATES = 16  # the most that the kernels take at once
_STATES_OF_A_THREAD = 8  # in the forward kernel
_COMBINED = 128  # states that a block of the combine kernel takes
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOLDER = Path(__file__).parent
_FILES = {
    "forward": (_FOLDER / "common.cu", _FOLDER / "forward.cu"),
    "backward": (_FOLDER / "common.cu", _FOLDER / "backward.cu"),
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
    if d_state <= _STATES:
        return _op(arguments)
    # More states than a thread block holds: a scan for each few of them, in fp32, and the rest of the block after it.
    x, z = arguments.x.float(), arguments.z
    dt = arguments.dt.float()
    total: Tensor | None = None
    finals = []
    for n in range(0, d_state, _STATES):
        part = slice(n, n + _STATES)
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


def _kernel(file: str, name: str, inputs: _Inputs, softplus: bool, dy: _Rows | None = None) -> nvrtc.Kernel:
    dtype = inputs.x.data.dtype
    wide = [row for row in (inputs.x, inputs.dt, inputs.z, dy) if row is not None]
    states = 8 if inputs.d_state <= 8 else 16
    return _compiled(
        file,
        name,
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
    name: str,
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
    if file == "forward":
        own = _STATES_OF_A_THREAD
        threads, tile, blocks = _CHANNELS * states // own, 16 if item == 4 else 32, own // 2
        row = _CHANNELS + 32 * own // states
        raw = row * item * (9 if has_z else 6) + states * item * 4
        made = states * 16
    else:
        own = 8
        threads, tile, blocks = _CHANNELS * states // own, segments.EVERY, 2
        raw = _CHANNELS * item * (8 if has_z else 6) + states * item * 4
        made = _CHANNELS * (8 + 4 + 8) + 4 * states * 8 + 4 * (_CHANNELS + 16) + threads * (4 + 16)
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
        "OWN": own,
        "BLOCKS": blocks,
        "SHARED": shared,
    }
    return nvrtc.kernel(_FILES[file], name, macros, threads, shared, device)


@functools.cache
def _combiner(device: int) -> nvrtc.Kernel:
    return nvrtc.kernel(_FILES["combine"], "combine", {}, _COMBINED, 0, device)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _steps(arguments: ScanArguments) -> int:
    x, packed = arguments.x, arguments.cu_seqlens is not None
    blocks = -(-x.shape[2] // _CHANNELS)
    return segments.steps_of(arguments.n_sequences, x.shape[1], blocks, _processors(x.device.index), packed)


def _shape_kept(arguments: ScanArguments) -> tuple[int, ...]:
    steps, packed = _steps(arguments), arguments.cu_seqlens is not None
    count = segments.n_segments(arguments.n_sequences, arguments.x.shape[1], steps, packed)
    channels, d_state = arguments.A.shape
    return count * (steps // segments.EVERY), channels, 8 if d_state <= 8 else 16


def _segments(arguments: ScanArguments) -> segments.Segments:
    batch, length, _ = arguments.x.shape
    steps = _steps(arguments)
    if arguments.cu_seqlens is not None:
        return segments.of_packed(arguments.cu_seqlens, length, steps, arguments.reverse)
    return segments.of_batch(batch, length, steps, arguments.reverse, arguments.x.device)


def _forward(arguments: ScanArguments, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(arguments.x.device):
        inputs, table = _prepare(arguments), _segments(arguments)
        device = arguments.x.device
        state = arguments.initial_state
        state = None if state is None else state.detach().float().contiguous()
        shape = (inputs.n_sequences, inputs.channels, inputs.d_state)
        final = _left_over(arguments, state, shape)
        y = torch.empty(inputs.rows, inputs.channels, dtype=inputs.x.data.dtype, device=device)
        kept = torch.empty(_shape_kept(arguments) if keep else (0,), device=device)
        rest = (*table[:5], inputs.go, inputs.channels, inputs.d_state, inputs.per_group)
        grid = len(table.row0) * inputs.blocks
        entering = state
        if table.cut:
            local, sum_dt, entering = _buffers(inputs, len(table.row0))
            summary = _kernel("forward", "forward_summary", inputs, arguments.dt_softplus)
            summary(grid, *inputs.scan_arguments(), None, *rest, None, 0, local, None, sum_dt)
            _combine(inputs, table, local, sum_dt, state, 1, entering)
        main = _kernel("forward", "forward", inputs, arguments.dt_softplus)
        main(grid, *inputs.scan_arguments(), entering, *rest, y, y.stride(0), final, kept if keep else None, None)
        return y.view(arguments.x.shape).to(arguments.x.dtype), final, kept


def _backward(arguments: ScanArguments, dy: Tensor, dfinal: Tensor, kept: Tensor) -> library.Gradients:
    with torch.cuda.device(arguments.x.device):
        inputs, table = _prepare(arguments), _segments(arguments)
        device, count = arguments.x.device, len(table.row0)
        dtype = inputs.x.data.dtype
        upstream = _rows(dy, dtype)
        dstate = dfinal.detach().float().contiguous()
        rest = (*table[:5], inputs.go, inputs.channels, inputs.d_state, inputs.per_group)
        grid = count * inputs.blocks
        entering = dstate
        softplus = arguments.dt_softplus
        if table.cut:
            local, sum_dt, entering = _buffers(inputs, count)
            summary = _kernel("backward", "backward_summary", inputs, softplus, upstream)
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
        states = kept.shape[-1]

        def rows() -> Tensor:
            return torch.empty(inputs.rows, inputs.channels, dtype=dtype, device=device)

        dx, ddt, dz = rows(), rows(), rows() if inputs.z is not None else None
        dBC = torch.empty(inputs.blocks, inputs.rows, 2, states, device=device)
        # Segments that are not used add nothing.
        new = torch.zeros if arguments.cu_seqlens is not None else torch.empty
        dA = new(count, inputs.channels, inputs.d_state, device=device)
        dD, dbias = (new(count, inputs.channels, device=device) for _ in range(2))
        dinitial = _left_over(arguments, dstate, dstate.shape)
        main = _kernel("backward", "backward", inputs, softplus, upstream)
        main(
            grid,
            *inputs.scan_arguments(),
            *upstream,
            entering,
            *rest,
            kept,
            inputs.rows,
            dx,
            dx.stride(0),
            ddt,
            dz,
            0 if dz is None else dz.stride(0),
            dBC,
            dA,
            dD,
            dbias,
            dinitial,
        )
        groups = inputs.channels // inputs.per_group
        sums = dBC.unflatten(0, (groups, -1)).sum(1)[..., : inputs.d_state]
        dB, dC = (_gradient_of(sums[:, :, kind], M) for kind, M in ((0, arguments.B), (1, arguments.C)))
        found = (dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial)
        wanted = (*arguments[:8], arguments.initial_state)
        return tuple(
            None if value is None or gradient is None else gradient.view(value.shape).to(value.dtype)
            for gradient, value in zip(found, wanted, strict=True)
        )


def _left_over(arguments: ScanArguments, state: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Where a kernel writes states; what it leaves there is that of sequences of length 0, which keep theirs."""
    if arguments.cu_seqlens is None:
        return torch.empty(shape, device=arguments.x.device)
    return torch.zeros(shape, device=arguments.x.device) if state is None else state.clone()


def _gradient_of(sums: Tensor, M: Tensor) -> Tensor:
    """That of M, B or C, from the sums `(groups, rows, d_state)`."""
    own = M.shape[2] if M.ndim == 4 else 1
    return sums.unflatten(0, (own, -1)).sum(1).transpose(0, 1).reshape(M.shape)


def _buffers(inputs: _Inputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` segments: what they make of no state, the sums of their step sizes, what enters them."""
    device, shape = inputs.A.device, (count, inputs.channels, inputs.d_state)
    return torch.empty(shape, device=device), torch.empty(shape[:2], device=device), torch.empty(shape, device=device)


def _combine(
    inputs: _Inputs, table: segments.Segments, local: Tensor, sum_dt: Tensor, first: Tensor | None, go: int, to: Tensor
) -> None:
    grid = (-(-inputs.channels * inputs.d_state // _COMBINED), inputs.n_sequences)
    sizes = (inputs.channels, inputs.d_state)
    _combiner(inputs.A.device.index)(grid, local, sum_dt, inputs.A, first, table.begin, table.pieces, go, *sizes, to)


_op = library.register("selective_scan_cuda", _forward, _backward, "cuda", _shape_kept)
