"""The zero-order hold of a diagonal system from its parameters, on an NVIDIA GPU: one kernel forward and one backward
instead of about forty, whose launches take longer than a block's scan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import nvrtc, portable
from mambaseq.ops.selective_scan.cuda import why_not_on

FILE = Path(__file__).parent / "discretise.cu"
_THREADS = 128


def can_run(log_dt: Tensor, A_log: Tensor, A_imag: Tensor | None, B: Tensor) -> bool:
    """Whether the kernels can run: plain float32 on an NVIDIA GPU."""
    values = [value for value in (log_dt, A_log, A_imag, B) if value is not None]
    return (
        log_dt.is_cuda
        and is_eager(*values)
        and all(value.dtype == torch.float32 and value.device == log_dt.device for value in values)
        and why_not_on(log_dt.device) is None
    )


def zero_order_hold(log_dt: Tensor, A_log: Tensor, A_imag: Tensor | None, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z) and dt (exp(z) - 1) / z B, both `(channels, d_state)`, complex64 where A_imag is given, of z = dt A,
    dt = exp(log_dt) `(channels,)` and A = -exp(A_log) + i A_imag; A_log, A_imag and B are `(channels, d_state)`.
    For arguments that `can_run` takes."""
    a, b = _ZeroOrderHold.apply(log_dt, A_log, A_imag, B)
    return a, b


@functools.cache
def _kernel(name: str, is_complex: bool, device: int) -> nvrtc.Kernel:
    return nvrtc.kernel((FILE,), name, {"COMPLEX": int(is_complex)}, _THREADS, 0, device)


def _run(name: str, A_imag: Tensor | None, A_log: Tensor, *arguments: Any) -> None:
    grid = -(-A_log.shape[0] * 32 // _THREADS)
    if A_log.numel():
        with portable.on(A_log):
            _kernel(name, A_imag is not None, A_log.device.index)(grid, *arguments)


class _ZeroOrderHold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_dt: Tensor, A_log: Tensor, A_imag: Tensor | None, B: Tensor) -> tuple[Tensor, Tensor]:
        log_dt, A_log, B = log_dt.contiguous(), A_log.contiguous(), B.contiguous()
        A_imag = None if A_imag is None else A_imag.contiguous()
        ctx.save_for_backward(log_dt, A_log, A_imag, B)
        dtype = torch.float32 if A_imag is None else torch.complex64
        a, b = (torch.empty(A_log.shape, dtype=dtype, device=A_log.device) for _ in range(2))
        _run("discretise", A_imag, A_log, log_dt, A_log, A_imag, B, *A_log.shape, a, b)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
        log_dt, A_log, A_imag, B = ctx.saved_tensors
        da, db = (value.resolve_conj().contiguous() for value in (da, db))
        found = [torch.empty_like(value) if value is not None else None for value in (log_dt, A_log, A_imag, B)]
        _run("discretise_backward", A_imag, A_log, log_dt, A_log, A_imag, B, da, db, *A_log.shape, *found)
        return tuple(found)
