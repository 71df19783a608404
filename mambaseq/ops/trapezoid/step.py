"""One step of Mamba-3's recurrence for decode loops: a kernel by Numba on CPU and by Triton on GPUs, else PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.cpu.flat import flat
from mambaseq.ops.cpu.threads import share
from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.eager import has_kernels
from mambaseq.ops.gpu import portable
from mambaseq.ops.shapes import check_step

# numbers of the state that a program holds, and warps that hold them, of one input a head and of several
_ONE, _SEVERAL = (2048, 4), (8192, 4)
_LITTLE = 1 << 15  # numbers of the state that one thread updates alone


def trapezoidal_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    last_x: Tensor,
    last_B: Tensor,
) -> Tensor:
    """One step of `trapezoidal_scan`; changes `state` in place.

    Args:
        state: `(batch, heads, head_dim, d_state)`, float32 or bfloat16, which is computed with in float32 and rounded
            when it is written.
        x, last_x: now and of the step before, `(batch, heads, rank, head_dim)`.
        dt, A, trap: `(batch, heads)`.
        B, C, last_B: `(batch, heads, rank, d_state)`.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    (*one, head_dim, d_state), rank = state.shape, x.shape[-2]
    inputs, matrices = (*one, rank, head_dim), (*one, rank, d_state)
    check_step("trapezoidal_update_", ("x", x, inputs), ("last_x", last_x, inputs))
    check_step("trapezoidal_update_", ("B", B, matrices), ("C", C, matrices), ("last_B", last_B, matrices))
    check_step("trapezoidal_update_", *((name, v, tuple(one)) for name, v in (("dt", dt), ("A", A), ("trap", trap))))
    given = (x, dt, A, trap, B, C, last_x, last_B)
    if step_gpu.can_run(state, *given) and step_gpu.can_update(state) and not state.is_complex():
        return _on_gpu(state, *given)
    if state.dtype == torch.bfloat16:
        kept = state.float()
        y = trapezoidal_update_(kept, *given)
        state.copy_(kept)
        return y
    if _can_run_kernels(state, *given):
        return _on_cpu(state, *given)
    wide = state.dtype
    dt, trap = (value.to(wide)[..., None, None] for value in (dt, trap))
    state.add_((1 - trap) * dt * (last_x.to(wide).mT @ last_B.to(wide)))
    state.mul_(torch.exp(dt * A.to(wide)[..., None, None])).add_(trap * dt * (x.to(wide).mT @ B.to(wide)))
    return (C.to(wide) @ state.mT).to(x.dtype)


def _on_gpu(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    last_x: Tensor,
    last_B: Tensor,
) -> Tensor:
    batch, heads, head_dim, d_state = state.shape
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    # of a row everything side by side
    over_rows = [value.flatten(1) for value in (x, last_x, B, C, last_B, dt, A, trap)]
    over_rows = [value if value.stride(1) == 1 else value.contiguous() for value in over_rows]
    rank, states = x.shape[2], step_gpu.power_of_two(d_state)
    elements, warps = _ONE if rank == 1 else _SEVERAL
    channels = max(1, min(step_gpu.power_of_two(head_dim), elements // states))
    kernels: Any = importlib.import_module("mambaseq.ops.trapezoid.triton_kernels")
    given = (state, *(part for value in over_rows for part in (value, value.stride(0))), y, heads)
    # threads that hold the same sum would each round it in their own way, and any of them may write it
    known = {"D_STATE": d_state, "CHANNELS": channels, "num_warps": warps, "enable_fp_fusion": False}
    grid = (batch * heads * -(-head_dim // channels),)
    with portable.on(x):
        if rank == 1:
            kernels.update[grid](*given, head_dim, STATES=states, **known)
        else:
            kernels.update_several[grid](*given, HEAD_DIM=head_dim, RANK=rank, HALF=max(1, states // 2), **known)
    return y


def _can_run_kernels(state: Tensor, *values: Tensor) -> bool:
    if not has_kernels() or state.dtype != torch.float32 or not state.is_contiguous():
        return False
    watched = torch.is_grad_enabled() and any(value.requires_grad for value in (state, *values))
    return not watched and all(
        value.device.type == "cpu" and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for value in (state, *values)
    )


def _on_cpu(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    last_x: Tensor,
    last_B: Tensor,
) -> Tensor:
    kernels: Any = importlib.import_module("mambaseq.ops.trapezoid.step_kernels")
    batch, heads, head_dim, d_state = state.shape
    y = torch.empty(x.shape, dtype=torch.float32)
    values = [flat(value) for value in (state, x, last_x, dt, A, trap, B, C, last_B)]

    def worker() -> Any:
        return lambda first, end: kernels.trapezoidal_update(
            first, end, *values, x.shape[2], head_dim, d_state, y.view(-1).numpy()
        )

    share(batch * heads, worker, serial=state.numel() <= _LITTLE)
    return y.to(x.dtype)
