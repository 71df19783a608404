"""What Mamba-3 of several inputs writes to its states: an input a head, by a map of each."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.eager import wants_reference
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.trapezoid.gating import by_rows, tiled

_ROWS = 32  # of a program


class WriteArguments(NamedTuple):
    """v `(..., heads, head_dim)`, x_map `(heads, rank, head_dim)`."""

    v: Tensor
    x_map: Tensor


def written(v: Tensor, x_map: Tensor, dtype: torch.dtype) -> Tensor:
    """v x_r, `(..., heads, rank, head_dim)`, rounded to dtype. A kernel makes it of v in half precision on a GPU,
    laid out with the ranks before the heads, as the scan's kernels read it."""
    a = WriteArguments(v, x_map)
    if v.is_cuda and v.dtype == dtype and not wants_reference() and why_not(a) is None:
        return kernel(a)
    wide = working_dtype(v)
    return (v[..., None, :].to(wide) * x_map.to(wide)).to(dtype)


def why_not(a: WriteArguments) -> str | None:
    """The reason why the kernels cannot run, or None."""
    if (reason := portable.why_not(a.v.device.type)) is not None:
        return reason
    if a.v.dtype not in (torch.bfloat16, torch.float16) or a.x_map.dtype == torch.float64:
        return "v is not in half precision, or x_map is float64"
    return "there is nothing" if a.v.numel() == 0 else None


def kernel(a: WriteArguments) -> Tensor:
    """`written` by Triton, of what `why_not` is None for."""
    found: Tensor = _write(a)[0]
    return found.transpose(-2, -3)


def _known(a: WriteArguments) -> dict[str, int]:
    _, rank, head_dim = a.x_map.shape
    return {"P": head_dim, "BLOCK": 1 << (head_dim - 1).bit_length(), "RANK": rank, "ROWS": _ROWS}


def _fake(a: WriteArguments) -> tuple[Tensor]:
    heads, rank, head_dim = a.x_map.shape
    return (torch.empty(*a.v.shape[:-2], rank, heads, head_dim, dtype=a.v.dtype, device=a.v.device),)


def _forward(a: WriteArguments) -> tuple[Tensor]:
    (out,) = _fake(a)
    v, heads = by_rows(a.v), a.v.shape[-2]
    with portable.on(a.v):
        _kernels().write[(-(-v.shape[0] // _ROWS), heads)](
            v, v.stride(0), a.x_map.contiguous(), out, v.shape[0], heads, **_known(a)
        )
    return (out,)


def _backward(a: WriteArguments, dout: Tensor) -> tuple[Tensor, Tensor]:
    v, heads = by_rows(a.v), a.v.shape[-2]
    known = _known(a)
    known["ROWS"], tiles, blocks = tiled(v.shape[0], heads, known["BLOCK"])
    dv = torch.empty(a.v.shape, dtype=a.v.dtype, device=v.device)
    shares = torch.empty(blocks, *a.x_map.shape, dtype=torch.float32, device=v.device)
    with portable.on(a.v):
        _kernels().write_backward[(blocks, heads)](
            v, v.stride(0), a.x_map.contiguous(), dout.contiguous(), dv, shares, v.shape[0], heads, tiles, **known
        )
    return dv, shares.sum(0).to(a.x_map.dtype)


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.trapezoid.gate_kernels")


_write = register(
    Operator(
        "mamba3_write",
        WriteArguments,
        "Tensor v, Tensor x_map",
        WriteArguments._fields,
        _forward,
        _backward,
        _fake,
        outputs=1,
    )
)
