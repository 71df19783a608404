"""Linear maps of a few rows, for decoding on CPU: bound by reading the weights once, in fp32 or bf16.

PyTorch's own were slower on two cores, bf16 weights most of all (docs/log.md).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from mambaseq.ops import threads

# rows of x above which a matrix product of PyTorch's own is faster
FEW_ROWS = 4
# weights below which starting threads costs more than it saves
_LITTLE_WORK = 2**17


def apply_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)`, by the fast kernel where it can run: x `(rows, in_features)` of few rows on CPU, fp32 or bf16
    weights, no gradient, and a plain `nn.Linear` (or a subclass that declares `adds_bias`, whether it adds its bias).

    Anything else (an adapter around the layer, hooks, autocast) is called as a module.
    """
    weight = module.weight
    plain = type(module) is nn.Linear
    adds_bias = getattr(type(module), "adds_bias", plain)  # a subclass that says so is known to be nothing but linear
    if (
        not (plain or hasattr(type(module), "adds_bias"))
        or x.device.type != "cpu"
        or x.dim() != 2
        or x.shape[0] > FEW_ROWS
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or weight.dtype not in (torch.float32, torch.bfloat16)
        or x.dtype != weight.dtype
        or not weight.is_contiguous()
        or module._forward_hooks
        or module._forward_pre_hooks
        or torch.is_autocast_enabled("cpu")
    ):
        return module(x)
    y = _few_rows(x, weight)
    return y + module.bias if adds_bias and module.bias is not None else y


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x `(rows, in)`, weight `(out, in)`, both fp32 or both bf16; accumulates in fp32."""
    kernels: Any = importlib.import_module("mambaseq.ops.linear_kernels")
    n_out = weight.shape[0]
    rows = x.float().contiguous().numpy()
    y = torch.empty(x.shape[0], n_out)
    out = y.numpy()
    if weight.dtype == torch.bfloat16:
        kernel, table = kernels.bf16, weight.detach().view(torch.uint16).numpy()
    else:
        kernel, table = kernels.fp32, weight.detach().numpy()
    threads.share(
        n_out,
        lambda: lambda first, end: kernel(first, end, rows, table, out),
        serial=weight.numel() < _LITTLE_WORK,
        portions=1,  # microseconds of work: a second portion's call would cost more than it evens out
    )
    return y.to(x.dtype)
