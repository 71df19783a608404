"""Log-decays on GPUs: launching the Triton kernels (kernels.py)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.decays.arguments import DecayArguments
from mambaseq.ops.gpu import portable
from mambaseq.ops.norm import gpu as norm
from mambaseq.ops.operators import Operator, register


def why_not(arguments: DecayArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    f, A_log, dt_bias, _ = arguments
    return norm.why_not(len(dt_bias) // len(A_log), (f, A_log, dt_bias), None)


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.decays.kernels")


def _of(a: DecayArguments, elements: int) -> tuple[Tensor, int, int, dict[str, Any]]:
    """f as rows, the heads, the tiles of rows of one, and the constants of a kernel."""
    rows, heads = norm.rows_of(a.f), len(a.A_log)
    sizes = norm.tile_of(len(a.dt_bias) // heads, elements)
    return rows, heads, -(-rows.shape[0] // sizes["ROWS"]), {**sizes, "BOUNDED": a.lower_bound is not None}


def _empty(a: DecayArguments) -> Tensor:
    heads = len(a.A_log)
    return a.f.new_empty((*a.f.shape[:-1], heads, len(a.dt_bias) // heads), dtype=torch.float32)


def _forward(a: DecayArguments) -> tuple[Tensor]:
    g = _empty(a)
    rows, heads, tiles, sizes = _of(a, norm.TILE)
    with portable.on(a.f):
        _kernels().forward[(tiles, heads)](
            rows, a.A_log.contiguous(), a.dt_bias.contiguous(), g, rows.shape[0], rows.stride(0), heads,
            a.lower_bound or 0.0, **sizes,
        )  # fmt: skip
    return (g,)


def _backward(a: DecayArguments, dg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    df = torch.empty(a.f.shape, dtype=a.f.dtype, device=a.f.device)
    rows, heads, tiles, sizes = _of(a, norm.TILE_BACKWARD)
    programs = min(tiles, max(1, norm.most_programs(a.f.device) // heads))
    of_A, of_bias = a.f.new_empty((2, programs, heads, len(a.dt_bias) // heads), dtype=torch.float32).unbind()
    with portable.on(a.f):
        _kernels().backward[(programs, heads)](
            dg.contiguous(), rows, a.A_log.contiguous(), a.dt_bias.contiguous(), df, of_A, of_bias,
            rows.shape[0], tiles, rows.stride(0), heads, a.lower_bound or 0.0, **sizes,
        )  # fmt: skip
    return df, of_A.sum((0, 2)).to(a.A_log.dtype), of_bias.sum(0).flatten().to(a.dt_bias.dtype)


_run = register(
    Operator(
        "log_decays",
        DecayArguments,
        "Tensor f, Tensor A_log, Tensor dt_bias, float? lower_bound",
        ("f", "A_log", "dt_bias"),
        _forward,
        _backward,
        lambda a: (_empty(a),),
        outputs=1,
    )
)


def run(arguments: DecayArguments) -> Any:
    """(g,), see `mambaseq.ops.log_decays`."""
    return _run(arguments)
