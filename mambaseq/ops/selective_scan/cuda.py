"""The selective scan on NVIDIA GPUs: which arguments the kernels take, and calling launches.py with them."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.eager import constant_to_compilers
from mambaseq.ops.gpu import nvrtc, portable
from mambaseq.ops.selective_scan import launches
from mambaseq.ops.selective_scan.arguments import ScanArguments
from mambaseq.ops.selective_scan.launches import CHANNELS, CODES, STATES, Inputs, Rows
from mambaseq.ops.selective_scan.library import scan_operator, wanted


def why_not(arguments: ScanArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    if x.device.type != "cuda":
        return f"the kernels run on CUDA, x is on {x.device}"
    if (reason := why_not_on(x.device)) is not None:
        return reason
    if x.numel() == 0:
        return "x is empty"
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128):
            return f"{name} is {value.dtype}, the kernels compute in float32"
    if x.dtype not in CODES:
        return f"x is {x.dtype}"
    rows = x.dtype if not A.is_complex() else torch.float32
    if (reason := too_large_for(x.device, rows, A.shape[1], arguments.z is not None, A.is_complex())) is not None:
        return reason
    for M in (B, C):
        if M.ndim == 4 and M.shape[2] > 1 and (x.shape[2] // M.shape[2]) % CHANNELS:
            return f"the channels of a group are not a multiple of {CHANNELS}"
    return None


@functools.cache
def _missing_on(device: torch.device) -> str | None:
    if (reason := nvrtc.why_not()) is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@constant_to_compilers
def too_large_for(
    device: torch.device, dtype: torch.dtype, d_state: int, has_z: bool, is_complex: bool = False
) -> str | None:
    """The reason why the gradients do not fit into a thread block's shared memory of this GPU, or None."""
    needed = launches.shared_memory(dtype, min(d_state, STATES), has_z, is_complex)
    room = launches.room(device.index)
    return None if needed <= room else f"a block needs {needed} bytes of shared memory, the GPU gives it {room}"


@constant_to_compilers
def why_not_on(device: torch.device) -> str | None:
    """The same for `torch.compile`, as a constant: it should not trace the search for packages, and sees no cache."""
    return _missing_on(device)


def run(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    d_state = arguments.A.shape[1]
    if arguments.A.is_complex():
        B, C, state = arguments.B, arguments.C, arguments.initial_state
        state = None if state is None else state.to(torch.complex64)
        arguments = arguments._replace(
            A=arguments.A.to(torch.complex64), B=B.to(torch.complex64), C=C.to(torch.complex64), initial_state=state
        )
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


def as_rows(value: Tensor, dtype: torch.dtype) -> Rows:
    """`(batch, length, ...)` as rows of numbers of a dtype, copied where they do not lie so."""
    value = value.to(dtype)
    batch, length = value.shape[:2]
    row = value.flatten(2)  # (batch, length, numbers)
    inner = row.stride(2) == 1 or row.shape[2] == 1
    if not inner or (batch > 1 and length > 1 and row.stride(0) != length * row.stride(1)):
        row = row.contiguous()
    if length == 1:
        return Rows(row, row.stride(0) if batch > 1 else row.shape[2])
    return Rows(row, row.stride(1))


def _as_numbers(M: Tensor, dtype: torch.dtype) -> Rows:
    """B or C as rows, or as they are where they are constant; complex ones as pairs of numbers."""
    if M.ndim == 2:
        wide = torch.complex64 if M.is_complex() else torch.float32
        return Rows(M.to(wide).resolve_conj().contiguous(), 0)
    return as_rows(torch.view_as_real(M.resolve_conj()) if M.is_complex() else M, dtype)


def _groups(M: Tensor) -> int:
    return M.shape[2] if M.ndim == 4 else 1


def prepare(arguments: ScanArguments) -> Inputs:
    """The arguments as the kernels take them, copied where they are not."""
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    batch, length, channels = x.shape
    values = [x, arguments.dt, *(M for M in (B, C) if M.ndim > 2)]
    if arguments.z is not None:
        values.append(arguments.z)
    same = all(value.dtype == x.dtype for value in values)
    dtype = x.dtype if same else torch.float32
    groups = math.lcm(_groups(B), _groups(C))
    constant_B, constant_C = B.ndim == 2, C.ndim == 2
    B, C = (M if M.ndim == 2 else _in_groups(M, groups) for M in (B, C))
    wide = torch.complex64 if A.is_complex() else torch.float32
    state = arguments.initial_state
    return Inputs(
        as_rows(x, dtype),
        as_rows(arguments.dt, dtype),
        None if arguments.z is None else as_rows(arguments.z, dtype),
        _as_numbers(B, dtype),
        _as_numbers(C, dtype),
        A.to(wide).resolve_conj().contiguous(),
        False,
        None if arguments.D is None else arguments.D.float().contiguous(),
        None if arguments.dt_bias is None else arguments.dt_bias.float().contiguous(),
        arguments.dt_softplus,
        None if state is None else state.to(wide).resolve_conj().contiguous(),
        arguments.cu_seqlens,
        batch,
        length,
        channels,
        channels // groups,
        arguments.reverse,
        constant_B,
        constant_C,
    )


def _in_groups(M: Tensor, groups: int) -> Tensor:
    own = _groups(M)
    # (batch, length, groups, d_state)
    return M if own == groups else M.reshape(*M.shape[:2], own, -1).repeat_interleave(groups // own, dim=2)


def _shape_kept(arguments: ScanArguments) -> tuple[int, ...]:
    packed = arguments.cu_seqlens is not None
    return launches.shape_kept(
        arguments.n_sequences, arguments.x.shape[1], packed, len(arguments.A), launches.numbers_of(arguments.A)
    )


def _forward(arguments: ScanArguments, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    with portable.on(arguments.x):
        y, final, kept = launches.forward(prepare(arguments), keep)
    return y.view(arguments.x.shape).to(arguments.x.dtype), final, kept  # (batch, length, channels)


def _backward(arguments: ScanArguments, dy: Tensor, dfinal: Tensor | None, kept: Tensor) -> tuple[Tensor | None, ...]:
    with portable.on(arguments.x):
        inputs = prepare(arguments)
        dstate = None if dfinal is None else dfinal.resolve_conj().contiguous()
        found = launches.backward(inputs, as_rows(dy, inputs.x.data.dtype), dstate, kept)
    dB, dC = (_of_own_groups(g, M) for g, M in ((found.dB, arguments.B), (found.dC, arguments.C)))
    gradients = (found.dx, found.ddt, found.dA, dB, dC, found.dD, found.dz, found.dbias, found.dinitial)
    return tuple(
        None if value is None or gradient is None else _as_value(gradient, value)
        for gradient, value in zip(gradients, wanted(arguments), strict=True)
    )


def _as_value(gradient: Tensor, value: Tensor) -> Tensor:
    """Of its shape and dtype, complex where that is."""
    if value.is_complex() and not gradient.is_complex():  # of pairs of numbers
        gradient = torch.view_as_complex(gradient.float().view(*value.shape, 2))
    return gradient.view(value.shape).to(value.dtype)


def _of_own_groups(gradient: Tensor, M: Tensor) -> Tensor:
    """Summed over what M, B or C, has one group for and the other several."""
    own = _groups(M)
    if M.ndim == 2 or gradient.shape[1] == own:
        return gradient
    return gradient.float().unflatten(1, (own, -1)).sum(2).contiguous()  # (rows, groups of its own, numbers)


_op = scan_operator("selective_scan_cuda", _forward, _backward, "cuda", _shape_kept)
