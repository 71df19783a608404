"""Rows of one length on GPUs: launching the Triton kernels (kernels.py)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.gpu import portable
from mambaseq.ops.norm import gpu
from mambaseq.ops.norm.arguments import UnitNormArguments
from mambaseq.ops.operators import Operator, register


def why_not(arguments: UnitNormArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    return gpu.why_not(arguments.group_size, (arguments.x,), None)


def _launch(name: str, a: UnitNormArguments, *tensors: Tensor, tile: int, eps: tuple[float, ...] = ()) -> None:
    """Over tiles of rows of each group. tensors: of the kernel, x among them."""
    rows = gpu.rows_of(a.x)
    groups = rows.shape[1] // a.group_size
    shape = gpu.tile_of(a.group_size, tile)
    kernels: Any = importlib.import_module("mambaseq.ops.norm.kernels")
    with portable.on(a.x):
        getattr(kernels, name)[(-(-rows.shape[0] // shape["ROWS"]), groups)](
            *(rows if value is a.x else value for value in tensors),
            rows.shape[0], rows.stride(0), groups, a.scale, *eps, **shape,
        )  # fmt: skip


def _forward(a: UnitNormArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and 1 / length of each row and group."""
    y = torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device)
    inverse = torch.empty(a.x.numel() // a.group_size, dtype=torch.float32, device=a.x.device)
    _launch("unit_forward", a, a.x, y, inverse, tile=gpu.TILE, eps=(a.eps,))
    return y, inverse


def _backward(a: UnitNormArguments, dy: Tensor, inverse: Tensor) -> tuple[Tensor]:
    dx = torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device)
    _launch("unit_backward", a, dy.contiguous(), a.x, inverse, dx, tile=gpu.TILE_BACKWARD)
    return (dx,)


def _fake(a: UnitNormArguments, keep: bool) -> tuple[Tensor, Tensor]:
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.numel() // a.group_size, dtype=torch.float32)


_run = register(
    Operator(
        "unit_norm",
        UnitNormArguments,
        "Tensor x, int group_size, float scale, float eps",
        ("x",),
        _forward,
        _backward,
        _fake,
        outputs=1,
        kept=1,
    )
)


def run(arguments: UnitNormArguments) -> Any:
    """(y,), see `reference.run_unit`."""
    return _run(arguments)
