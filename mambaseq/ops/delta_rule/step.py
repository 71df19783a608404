"""One step of the gated delta rule on CPU: a kernel by Numba, where nobody differentiates."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.cpu.flat import flat, scratch
from mambaseq.ops.eager import is_eager

_REAL = (torch.float32, torch.bfloat16, torch.float16)  # what the kernel reads; it computes in float32


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
