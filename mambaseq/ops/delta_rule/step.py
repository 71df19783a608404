"""One step of the gated delta rule where nobody differentiates: a kernel by Numba on a CPU, by Triton on GPUs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.cpu.flat import flat, scratch
from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable

_REAL = (torch.float32, torch.bfloat16, torch.float16)  # what the kernel reads; it computes in float32
# Numbers of the state that a program holds on a GPU, and its warps: the same for any batch, so that sums are rounded
# alike.
_ELEMENTS, _WARPS = 2048, 4


def can_run_on_cpu(state: Tensor, *values: Tensor | None) -> bool:
    """Whether the CPU's kernel can run: a contiguous state in fp32, which nobody differentiates."""
    given = [value for value in (state, *values) if value is not None]
    if not is_eager(*given) or state.dtype != torch.float32 or not state.is_contiguous():
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        return False
    return all(value.device.type == "cpu" and value.dtype in _REAL for value in given)


def update_on_cpu_(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
    """See `delta_rule_update_`; of what `can_run_on_cpu`."""
    y = torch.empty(v.shape, dtype=torch.float32)
    if y.numel() == 0:
        return y.to(v.dtype)
    decay = None if g is None else torch.exp(g.float())
    kernels: Any = importlib.import_module("mambaseq.ops.delta_rule.cpu_kernels")
    kernels.delta_update(
        state.view(-1).numpy(), flat(q), flat(k), flat(v), flat(decay), 0 if g is None else g[0, 0].numel(), flat(beta),
        beta is not None, *state.shape, k.shape[1], y.view(-1).numpy(),
        scratch(3 * k.shape[2]),
    )  # fmt: skip
    return y.to(v.dtype)


def can_run_on_gpu(state: Tensor, *values: Tensor | None) -> bool:
    """Whether the GPU's kernel can run: a contiguous state in fp32 or bf16, which nobody differentiates."""
    return not state.is_complex() and step_gpu.can_run(state, *values) and step_gpu.can_update(state)


def update_on_gpu_(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
    """See `delta_rule_update_`; of what `can_run_on_gpu`."""
    batch, heads, d_value, d_key = state.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel() == 0:
        return y
    q, k, v = (value if value.stride(2) == 1 else value.contiguous() for value in (q, k, v))
    if g is not None and g.ndim == 3 and g.stride(2) != 1:
        g = g.contiguous()
    keys = step_gpu.power_of_two(d_key)
    rows = max(1, min(step_gpu.power_of_two(d_value), _ELEMENTS // keys))
    kernels: Any = importlib.import_module("mambaseq.ops.delta_rule.triton_step")
    with portable.on(state):
        kernels.update[(batch * heads * -(-d_value // rows),)](
            state,
            *(part for value in (q, k, v, g, beta) for part in (value, *_first_strides(value))),
            y,
            heads,
            heads // k.shape[1],
            d_value,
            D_KEY=d_key,
            CHANNELS=g is not None and g.ndim == 3,
            KEYS=keys,
            ROWS=rows,
            num_warps=_WARPS,
            # threads that hold the same sum would each round it in their own way, and any of them may write it
            enable_fp_fusion=False,
        )
    return y


def _first_strides(value: Tensor | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.stride(0), value.stride(1))
