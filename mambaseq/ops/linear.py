"""Linear maps of a few rows, for decoding on CPU: bound by reading the weights once, in fp32 or bf16.

PyTorch's matrix-vector products reach about half of the memory's bandwidth on two cores, less in bf16.
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
    """`module(x)`; for x `(rows, in_features)` by the fast kernel where it can run: plain `nn.Linear` on CPU, fp32 or
    bf16 weights, few rows, no gradient. Anything else (an adapter around the layer, autocast) is called as a module."""
    weight = module.weight
    if (
        type(module) is not nn.Linear
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
    return y if module.bias is None else y + module.bias


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
    )
    return y.to(x.dtype)
