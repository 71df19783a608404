"""What follows Mamba-3's scan: skip, gate, and the map of several outputs a head to one."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.eager import wants_reference
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register

_ROWS = 32  # of a program
# backward: numbers of a tile, which leave registers for sums (more of them where there are maps), tiles of a program
_TILE, _TILE_OF_MAPS, _MOST_TILES = 512, 256, 16
_PROGRAMS = 1024  # wanted before one takes several tiles


class GateArguments(NamedTuple):
    """y `(..., heads, rank, head_dim)`, v and z `(..., heads, head_dim)`, D `(heads,)`; maps `(heads, rank, head_dim)`
    of several inputs and outputs a head, else None and rank 1."""

    y: Tensor
    v: Tensor
    z: Tensor
    D: Tensor
    x_map: Tensor | None = None
    z_map: Tensor | None = None
    o_map: Tensor | None = None


def gated(a: GateArguments) -> Tensor:
    """sum over r of o_r silu(z z_r) (y_r + D v x_r), `(..., heads, head_dim)`, in full precision; by a kernel, of y in
    half precision on a GPU, in the dtype of y."""
    if a.y.is_cuda and not wants_reference() and why_not(a) is None:
        return kernel(a)
    wide = torch.promote_types(a.y.dtype, torch.float32)
    y, v, z = (value.to(wide) for value in (a.y, a.v[..., None, :], a.z[..., None, :]))
    if a.x_map is not None and a.z_map is not None and a.o_map is not None:
        v, z = v * a.x_map.to(wide), z * a.z_map.to(wide)
    y = (y + a.D.to(wide)[:, None, None] * v) * F.silu(z)
    if a.o_map is not None:
        y = y * a.o_map.to(wide)
    return y.sum(-2) if a.y.shape[-2] > 1 else y.squeeze(-2)


def why_not(a: GateArguments) -> str | None:
    """The reason why the kernels cannot run, or None."""
    if (reason := portable.why_not(a.y.device.type)) is not None:
        return reason
    if a.y.dtype not in (torch.bfloat16, torch.float16) or a.v.dtype != a.y.dtype or a.z.dtype != a.y.dtype:
        return "y, v and z are not of one half precision"
    return "there is nothing" if a.y.numel() == 0 else None


def kernel(a: GateArguments) -> Tensor:
    """`gated` by Triton, of what `why_not` is None for."""
    found: Tensor = _gate(a._replace(y=a.y.transpose(-2, -3)))[0]
    return found


def by_rows(value: Tensor) -> Tensor:
    """`(..., heads, head_dim)` as rows `(rows, heads * head_dim)`, without a copy where they are side by side."""
    rows = value.flatten(-2).flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tiled(rows: int, heads: int, block: int, most: int = _TILE) -> tuple[int, int, int]:
    """Of kernels that keep sums over rows in registers: rows of a tile of block columns and at most so many numbers,
    tiles of a program, and programs of a head."""
    of_tile = max(1, most // block)
    tiles = -(-rows // of_tile)
    of_program = max(1, min(_MOST_TILES, tiles * heads // _PROGRAMS))
    return of_tile, of_program, -(-tiles // of_program)


def _given(a: GateArguments) -> tuple[Any, ...]:
    v, z = by_rows(a.v), by_rows(a.z)
    maps = (None if m is None else m.contiguous() for m in (a.x_map, a.z_map, a.o_map))
    return a.y.contiguous(), v, v.stride(0), z, z.stride(0), a.D.contiguous(), *maps


def _known(a: GateArguments) -> dict[str, int]:
    head_dim = a.y.shape[-1]
    return {"P": head_dim, "BLOCK": 1 << (head_dim - 1).bit_length(), "RANK": a.y.shape[-3], "ROWS": _ROWS}


def _fake(a: GateArguments) -> tuple[Tensor]:
    return (torch.empty(a.v.shape, dtype=a.y.dtype, device=a.y.device),)


def _forward(a: GateArguments) -> tuple[Tensor]:
    (out,) = _fake(a)
    rows, heads = a.v.shape[:-2].numel(), a.v.shape[-2]
    with portable.on(a.y):
        _kernels().gate[(-(-rows // _ROWS), heads)](*_given(a), out, rows, heads, **_known(a))
    return (out,)


def _backward(a: GateArguments, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, (heads, head_dim), device = a.v.shape[:-2].numel(), a.v.shape[-2:], a.y.device
    known = _known(a)
    tile = _TILE if a.x_map is None else _TILE_OF_MAPS
    known["ROWS"], tiles, blocks = tiled(rows, heads, known["BLOCK"], tile)
    dy, dv, dz = (torch.empty(m.shape, dtype=m.dtype, device=device) for m in (a.y, a.v, a.z))
    dD = torch.empty(blocks, heads, dtype=torch.float32, device=device)
    shares = None
    if a.x_map is not None:
        shares = torch.empty(3, blocks, heads, known["RANK"], head_dim, dtype=torch.float32, device=device)
    with portable.on(a.y):
        _kernels().gate_backward[(blocks, heads)](
            *_given(a), dout.contiguous(), dy, dv, dz, shares, dD, rows, heads, blocks, tiles, **known
        )
    maps: list[Tensor | None] = [None] * 3
    if shares is not None:
        maps = [
            None if m is None else share.sum(0).to(m.dtype)
            for share, m in zip(shares, (a.x_map, a.z_map, a.o_map), strict=True)
        ]
    return dy, dv, dz, dD.sum(0).to(a.D.dtype), *maps


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.trapezoid.gate_kernels")


_gate = register(
    Operator(
        "mamba3_gate",
        GateArguments,
        "Tensor y, Tensor v, Tensor z, Tensor D, Tensor? x_map, Tensor? z_map, Tensor? o_map",
        GateArguments._fields,
        _forward,
        _backward,
        _fake,
        outputs=1,
    )
)
