"""Linear maps on CPU where PyTorch's are slower: of a few rows, for decoding, where reading the weights once takes all
the time; and large ones in fp32, where oneDNN is faster than MKL on some processors (docs/log.md).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.ops.eager import has_kernels

# rows of x above which a matrix product is faster
FEW_ROWS = 8
# weights below which starting threads costs more than it saves
LITTLE_WORK = 2**17
# outputs that a thread takes at a time
_OUTPUTS = 64
# multiply-adds from which oneDNN is worth its preparations, and features below which it was slower than MKL
_MUCH_WORK, _MANY_FEATURES = 2**28, 256


def apply_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)`, by the faster kernels where they can run: a plain `nn.Linear` (or a subclass that declares
    `adds_bias`, whether it adds its bias), on CPU.

    Anything else (an adapter around the layer, hooks, autocast) is called as a module.
    """
    if not is_plain(module):
        return module(x)
    if x.dim() == 2 and can_read_few_rows(x, module.weight):
        y = _few_rows(x, module.weight)
    elif _can_run_onednn(x, module.weight):
        y = _OneDNN.apply(x, module.weight)
    else:
        return module(x)
    adds_bias = getattr(type(module), "adds_bias", True)
    return y + module.bias if adds_bias and module.bias is not None else y


def is_plain(module: nn.Module) -> bool:
    """Whether calling this linear layer, convolution or norm does nothing but arithmetic, which a kernel may do:
    no subclass (unless it says so by `adds_bias`), no adapter in its place, no forward of its own, no hooks, no
    quantised or sharded weight."""
    kind, state = type(module), module.__dict__  # looked up without nn.Module's detours: decoding asks for every layer
    return (
        (kind is nn.Linear or kind is nn.Conv1d or hasattr(kind, "adds_bias"))
        and type(state["_parameters"].get("weight")) in (nn.Parameter, Tensor)
        and "forward" not in state
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
        and not _has_any_global_hook()
    )


def can_read_few_rows(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels for a few rows can run: x `(rows, features)`, weights of its dtype on CPU, no gradient."""
    return can_read_rows(x, x.dtype, *weights)


def can_read_rows(x: Tensor, dtype: torch.dtype, *weights: Tensor | None) -> bool:
    """The same for weights of this dtype, whatever x's is."""
    if (
        x.shape[0] > FEW_ROWS
        or not x.is_cpu
        or dtype not in (torch.float32, torch.bfloat16)
        or torch.is_grad_enabled()
        or not has_kernels()
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
    kernels: Any = importlib.import_module("mambaseq.ops.decoding.kernels")
    team: Any = importlib.import_module("mambaseq.ops.cpu.team")
    rows, table = x.float().contiguous().numpy(), bits(weight).reshape(-1)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    out, counters = y.numpy(), np.zeros(2 * team.STRIDE, dtype=np.int64)
    team.run(
        lambda: kernels.linear(counters, _OUTPUTS, rows, table, out),
        1 if weight.numel() < LITTLE_WORK else -(-weight.shape[0] // _OUTPUTS),
    )
    return y.to(x.dtype)


def _can_run_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        has_kernels()
        and weight.dtype == x.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and min(weight.shape) >= _MANY_FEATURES
        and x.numel() * weight.shape[0] >= _MUCH_WORK
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = _OneDNN.apply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None  # (out, in)
        return dx, dweight
