"""Linear maps of a few rows, for decoding on CPU: bound by reading the weights once, in fp32 or bf16.

PyTorch's own were slower on two cores, bf16 weights most of all (docs/log.md).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# rows of x above which a matrix product of PyTorch's own is faster
FEW_ROWS = 4
# weights below which starting threads costs more than it saves
LITTLE_WORK = 2**17
# outputs that a thread takes at a time
_OUTPUTS = 64


def apply_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)`, by the fast kernel where it can run: x `(rows, in_features)` of few rows on CPU, fp32 or bf16
    weights, no gradient, and a plain `nn.Linear` (or a subclass that declares `adds_bias`, whether it adds its bias).

    Anything else (an adapter around the layer, hooks, autocast) is called as a module.
    """
    if x.dim() != 2 or not is_plain(module) or not can_read_few_rows(x, module.weight):
        return module(x)
    y = _few_rows(x, module.weight)
    adds_bias = getattr(type(module), "adds_bias", True)
    return y + module.bias if adds_bias and module.bias is not None else y


def is_plain(module: nn.Module) -> bool:
    """Whether calling this linear or convolution layer does nothing but its arithmetic, which a kernel may do instead:
    no subclass (unless it says so by `adds_bias`), no adapter around it, no hooks."""
    known = type(module) in (nn.Linear, nn.Conv1d) or hasattr(type(module), "adds_bias")
    return known and not module._forward_hooks and not module._forward_pre_hooks


def can_read_few_rows(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels for a few rows can run: x `(rows, features)`, weights of its dtype on CPU, no gradient."""
    dtype = x.dtype
    if (
        x.shape[0] > FEW_ROWS
        or not x.is_cpu
        or dtype not in (torch.float32, torch.bfloat16)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return all(w is None or (w.dtype == dtype and w.is_cpu and w.is_contiguous()) for w in weights)


def bits(weight: Tensor | None) -> np.ndarray:
    """What the kernels read: float32, or bfloat16 as uint16; a view. None becomes a single number that is not read."""
    if weight is None:
        return np.zeros(1, dtype=np.float32)
    weight = weight.detach()
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x `(rows, in)`, weight `(out, in)`, both fp32 or both bf16; accumulates in fp32."""
    kernels: Any = importlib.import_module("mambaseq.ops.step_kernels")
    team: Any = importlib.import_module("mambaseq.ops.team")
    rows, table = x.float().contiguous().numpy(), bits(weight)
    y = torch.empty(x.shape[0], weight.shape[0])
    out, counters = y.numpy(), np.zeros(2 * team.STRIDE, dtype=np.int64)
    team.run(
        lambda: kernels.linear(counters, _OUTPUTS, rows, table, out),
        serial=weight.numel() < LITTLE_WORK,
    )
    return y.to(x.dtype)
