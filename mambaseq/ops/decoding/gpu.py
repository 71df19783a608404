"""One decode step of the convolution and of the scans on a GPU: a kernel each, whose time is that of reading and
writing the state.

`mambaseq.ops.decoding.step` passes GPU tensors on to this; under Triton's interpreter, CPU tensors work here too.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable

_REAL = (torch.float32, torch.bfloat16, torch.float16)
_COMPLEX = (*_REAL, torch.complex64)
_LARGEST_STATE = 256
# Elements of the state that a program holds, and sequences that it goes through with one piece of A: small pieces
# where there is little to do, so that all multiprocessors take part.
_LITTLE, _MUCH = (512, 1), (1024, 4)
_MANY_PROGRAMS = 1024
# Elements of the state that a program of the SSD holds: as many are on their way from memory at once.
_OF_HEADS = 2048
_WARPS = 4
# Channels a program of the convolution: one a thread, which alone reads and moves what its channel remembers.
_CONV_CHANNELS = 32 * _WARPS
# Logits that a program looks at at a time.
_CHOSEN = 16384


def can_run(state: Tensor, *values: Tensor | None) -> bool:
    """Whether the kernels can run: a contiguous state in fp32, bf16 or complex64 on one GPU, which nobody
    differentiates, and values of which only beside the last some are complex."""
    device = state.device
    if device.type != "cuda" or not is_eager(state, *values) or portable.why_not("cuda") is not None:
        return False
    if (
        state.dtype not in (torch.float32, torch.bfloat16, torch.complex64)
        or not state.is_contiguous()
        or state.is_conj()
    ):
        return False
    known = _COMPLEX if state.is_complex() else _REAL
    needs_gradient = torch.is_grad_enabled()
    if needs_gradient and state.requires_grad:
        return False
    return all(
        value is None
        or (value.dtype in known and value.device == device and not (needs_gradient and value.requires_grad))
        for value in values
    )


def can_update(state: Tensor) -> bool:
    """Whether a state `(batch, channels, d_state)` is of a size that `selective_state_update_` takes."""
    return 1 <= state.shape[-1] <= _LARGEST_STATE


def causal_conv_update_(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `decoding.step.causal_conv_update_`."""
    batch, channels = x.shape
    x, width = _rows(x), weight.shape[1]
    y = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    with portable.on(x):
        _kernels().causal_conv_update[(batch * -(-channels // _CONV_CHANNELS),)](
            state,
            x,
            x.stride(0),
            weight.contiguous(),
            None if bias is None else _rows(bias),
            y,
            channels,
            WIDTH=width,
            HAS_BIAS=bias is not None,
            SILU=silu,
            CHANNELS=_CONV_CHANNELS,
            num_warps=_WARPS,
        )
    return y


def selective_state_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
) -> Tensor:
    """See `decoding.step.selective_state_update_`; B, C `(batch, groups, d_state)`, groups of their own each."""
    batch, channels, d_state = state.shape
    is_complex = state.is_complex()
    groups_of_B, groups_of_C = B.shape[1], C.shape[1]
    A, B, C = (_numbers(v) if is_complex else v for v in (A, B, C))
    x, dt, B, C = _rows(x), _rows(dt), _rows(B), _rows(C)
    z = None if z is None else _rows(z)
    y = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    states, per_program, rows = _shape(state)
    with portable.on(x):
        _kernels().selective_state_update[(-(-channels // per_program) * -(-batch // rows),)](
            torch.view_as_real(state) if is_complex else state,
            x,
            x.stride(0),
            dt,
            dt.stride(0),
            A.contiguous(),
            B,
            B.stride(0),
            B.stride(1),
            channels // groups_of_B,
            C,
            C.stride(0),
            C.stride(1),
            channels // groups_of_C,
            None if D is None else _rows(D),
            z,
            0 if z is None else z.stride(0),
            None if dt_bias is None else _rows(dt_bias),
            y,
            batch,
            channels,
            D_STATE=d_state,
            A_IS_LOG=A_is_log,
            COMPLEX=is_complex,
            ONE_GROUP=groups_of_B == groups_of_C == 1,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            STATES=states,
            CHANNELS=per_program,
            ROWS=rows,
            num_warps=_WARPS,
            # threads that hold the same sum would each round it in their own way, and any of them may write it
            enable_fp_fusion=False,
        )
    return y


def lti_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    discretization: str,
) -> Tensor:
    """See `decoding.step.lti_update_`."""
    A, B, C = (_numbers(v) if state.is_complex() else v.contiguous() for v in (A, B, C))
    return _lti_update_(state, x, dt, A, None, B, C, D, z, discretization, False)


def system_update_(
    state: Tensor,
    x: Tensor,
    log_dt: Tensor,
    A_log: Tensor,
    A_imag: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    discretization: str,
) -> Tensor:
    """The same from what is learned of a system, of dt = exp(log_dt) and A = -exp(A_log) + i A_imag: B real, C
    `(channels, d_state, 2)` where A_imag is given."""
    A_log, B, C = (v.contiguous() for v in (A_log, B, C))
    imaginary = None if A_imag is None else A_imag.contiguous()
    return _lti_update_(state, x, log_dt, A_log, imaginary, B, C, D, z, discretization, True)


def _lti_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    A_imag: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    discretization: str,
    raw: bool,
) -> Tensor:
    batch, channels, d_state = state.shape
    is_complex = state.is_complex()
    x, z = _rows(x), None if z is None else _rows(z)
    y = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    states, per_program, rows = _shape(state)
    with portable.on(x):
        _kernels().lti_update[(-(-channels // per_program) * -(-batch // rows),)](
            torch.view_as_real(state) if is_complex else state,
            x,
            x.stride(0),
            dt.contiguous(),
            A,
            A_imag,
            B,
            C,
            None if D is None else _rows(D),
            z,
            0 if z is None else z.stride(0),
            y,
            batch,
            channels,
            D_STATE=d_state,
            COMPLEX=is_complex,
            RAW=raw,
            RULE=discretization,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            STATES=states,
            CHANNELS=per_program,
            ROWS=rows,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # as above
        )
    return y


def ssd_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool = False,
) -> Tensor:
    """See `decoding.step.ssd_update_`."""
    batch, heads, head_dim, d_state = state.shape
    channels, groups = heads * head_dim, B.shape[1]
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    rows, dt, B, C = _rows(x.flatten(1)), _rows(dt), _rows(B), _rows(C)  # rows (batch, channels)
    states = power_of_two(d_state)
    # what divides a head, at most; the same for any batch, so that sums are rounded alike
    per_program = math.gcd(head_dim, max(_OF_HEADS // states, 1))
    with portable.on(x):
        _kernels().ssd_update[(channels // per_program * batch,)](
            state,
            rows,
            rows.stride(0),
            dt,
            dt.stride(0),
            A.contiguous(),
            B,
            B.stride(0),
            B.stride(1),
            C,
            C.stride(0),
            C.stride(1),
            None if D is None else _rows(D),
            None if dt_bias is None else _rows(dt_bias),
            y,
            channels,
            head_dim,
            channels // groups,
            D_STATE=d_state,
            A_IS_LOG=A_is_log,
            HAS_D=D is not None,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            STATES=states,
            CHANNELS=per_program,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # as above
        )
    return y


def can_choose(logits: Tensor) -> bool:
    """Whether `likeliest` can run: logits `(rows, n)` on a GPU, which nobody differentiates."""
    if not logits.is_cuda or not is_eager(logits) or portable.why_not("cuda") is not None:
        return False
    usable = logits.dtype in _REAL and logits.dim() == 2 and logits.numel() > 0
    return usable and not (torch.is_grad_enabled() and logits.requires_grad)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the first greatest of each row, `(rows,)` int64, and that logit, `(rows,)` fp32: infinity where a
    row holds what is no number. Logits of 16 bits are read as they are."""
    rows, n = logits.shape
    logits = _rows(logits)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_CHOSEN, power_of_two(n))
    with portable.on(logits):
        _kernels().likeliest[(rows,)](
            logits, logits.stride(0), ids, peaks, n, BLOCK=block, num_warps=max(1, block // 512)
        )
    return ids, peaks


def _shape(state: Tensor) -> tuple[int, int, int]:
    """States, padded, and channels and sequences of a program."""
    batch, channels, d_state = state.shape
    states = power_of_two(d_state)
    elements, rows = _MUCH
    if batch * channels * states < elements * rows * _MANY_PROGRAMS:
        elements, rows = _LITTLE
    return states, max(elements // states, 1), rows


def _numbers(value: Tensor) -> Tensor:
    """As pairs of real and imaginary parts, `(..., 2 d_state)`."""
    return torch.view_as_real(value.to(torch.complex64).resolve_conj().contiguous()).flatten(-2)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.decoding.triton_kernels")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The smallest that is at least n, n at least 1."""
    return 1 << (n - 1).bit_length()
