"""B and C of Mamba-3 as its scan takes them: biases of each head added, pairs of channels turned by angles."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.eager import wants_reference
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register

_PROGRAMS = 1024  # wanted before one takes several heads
_MOST_STATES = 256
_ALIGNMENT = 16  # bytes


class _Tile(NamedTuple):
    """What a program takes: rows, pairs, heads of a group at most, by so many warps."""

    rows: int
    pairs: int
    heads: int
    warps: int


_FORWARD = _Tile(8, 64, 8, 4)
_BACKWARD = _Tile(32, 32, 64, 2)  # sums over rows, a head's at a time, stay with two warps


class TurnArguments(NamedTuple):
    """B, C `(..., rank, groups, d_state)`, biases `(heads, rank, d_state)`, angle `(..., heads, n_angles)` float64, or
    float32 of few whole turns.

    halves: channel i is turned with i + d_state / 2, otherwise with its neighbour; the first n_angles pairs turn.
    rounded: they are wanted in bfloat16, otherwise in the dtype of B.
    """

    B: Tensor
    C: Tensor
    B_bias: Tensor
    C_bias: Tensor
    angle: Tensor
    halves: bool
    rounded: bool = False

    @property
    def heads(self) -> int:
        return self.angle.shape[-2]


def turned(a: TurnArguments) -> tuple[Tensor, Tensor]:
    """B and C `(..., heads, rank, d_state)`; on a GPU by a kernel."""
    if a.B.is_cuda and not wants_reference() and why_not(a) is None:
        return kernel(a)
    per_group = a.heads // a.B.shape[-2]
    B, C = (
        M.transpose(-2, -3).repeat_interleave(per_group, dim=-3) + bias.to(M.dtype)
        for M, bias in ((a.B, a.B_bias), (a.C, a.C_bias))
    )
    cos, sin = (value.to(B.dtype)[..., None, :] for value in (torch.cos(a.angle), torch.sin(a.angle)))
    B, C = _rotated(B, cos, sin, a.halves), _rotated(C, cos, sin, a.halves)
    return (B.bfloat16(), C.bfloat16()) if a.rounded else (B, C)


def kernel(a: TurnArguments) -> tuple[Tensor, Tensor]:
    """The same, of what `why_not` is None for."""
    B, C = _turn(a)
    return B.transpose(-2, -3), C.transpose(-2, -3)


def _rotated(M: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    a, b = M.chunk(2, dim=-1) if halves else M.unflatten(-1, (-1, 2)).unbind(-1)
    n = cos.shape[-1]
    one, other = a[..., :n] * cos - b[..., :n] * sin, a[..., :n] * sin + b[..., :n] * cos
    one, other = torch.cat([one, a[..., n:]], dim=-1), torch.cat([other, b[..., n:]], dim=-1)
    return torch.cat([one, other], dim=-1) if halves else torch.stack([one, other], dim=-1).flatten(-2)


def why_not(a: TurnArguments) -> str | None:
    """The reason why the kernels cannot run, or None."""
    if (reason := portable.why_not(a.B.device.type)) is not None:
        return reason
    if a.B.dtype != torch.float32 or a.C.dtype != torch.float32 or a.angle.dtype not in (torch.float32, torch.float64):
        return "B and C are not float32, or the angles neither float32 nor float64"
    if a.B.numel() == 0 or a.B.shape[-1] > _MOST_STATES:
        return f"there is nothing, or more than {_MOST_STATES} states"
    return None


def _sizes(a: TurnArguments, tile: _Tile) -> tuple[tuple[int, int, int], dict[str, Any], tuple[int, ...]]:
    """The grid; what kernels know when they are compiled; rows, heads, groups, heads of a group and of a program."""
    rank, groups, d_state = a.B.shape[-3:]
    rows, per_group = a.angle.shape[:-2].numel(), a.heads // groups
    pairs = min(tile.pairs, 1 << (d_state // 2 - 1).bit_length())
    blocks, columns = -(-rows // tile.rows), -(-d_state // (2 * pairs))
    heads = max(1, min(tile.heads, per_group, blocks * columns * rank * a.heads // _PROGRAMS))
    known = {
        "N": d_state,
        "ANGLES": a.angle.shape[-1],
        "RANK": rank,
        "HALVES": a.halves,
        "ROWS": tile.rows,
        "PAIRS": pairs,
        "num_warps": tile.warps,
    }
    grid = blocks, groups * rank * columns, -(-per_group // heads)
    return grid, known, (rows, a.heads, groups, per_group, heads)


def _aligned(*values: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, and begun where words of two numbers may be read, as parts of a larger tensor need not be."""
    values = tuple(value.contiguous() for value in values)
    return tuple(value.clone() if value.data_ptr() % _ALIGNMENT else value for value in values)


def _fake(a: TurnArguments) -> tuple[Tensor, Tensor]:
    rank, _, d_state = a.B.shape[-3:]
    shape = (*a.B.shape[:-3], rank, a.heads, d_state)
    dtype = torch.bfloat16 if a.rounded else a.B.dtype
    B, C = (torch.empty(shape, dtype=dtype, device=a.B.device) for _ in range(2))
    return B, C


def _forward(a: TurnArguments) -> tuple[Tensor, Tensor]:
    to = _fake(a)
    grid, known, counts = _sizes(a, _FORWARD)
    with portable.on(a.B):
        _kernels().turn[grid](*_aligned(*a[:5]), *to, *counts, **known)
    return to


def _backward(a: TurnArguments, dB_to: Tensor, dC_to: Tensor) -> tuple[Tensor, ...]:
    grid, known, counts = _sizes(a, _BACKWARD)
    blocks, _, parts = grid
    rank, _, d_state = a.B.shape[-3:]
    device = a.B.device
    dB, dC = (torch.empty(parts, *M.shape, dtype=torch.float32, device=device) for M in (a.B, a.C))
    # each (blocks, heads, rank, d_state)
    shares = torch.empty(2, blocks, a.heads, rank, d_state, dtype=torch.float32, device=device)
    dangle = torch.empty(rank, *a.angle.shape, dtype=torch.float32, device=device)
    with portable.on(a.B):
        _kernels().turn_backward[grid](*_aligned(*a[:5], dB_to, dC_to), dB, dC, *shares, dangle, *counts, **known)
    dB_bias, dC_bias = shares.sum(1).unbind(0)
    dB, dC = (M.squeeze(0) if parts == 1 else M.sum(0) for M in (dB, dC))
    dangle = dangle.squeeze(0) if rank == 1 else dangle.sum(0)
    return dB, dC, dB_bias.to(a.B_bias.dtype), dC_bias.to(a.C_bias.dtype), dangle.to(a.angle.dtype)


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.trapezoid.turn_kernels")


_turn = register(
    Operator(
        "mamba3_turn",
        TurnArguments,
        "Tensor B, Tensor C, Tensor B_bias, Tensor C_bias, Tensor angle, bool halves, bool rounded",
        ("B", "C", "B_bias", "C_bias", "angle"),
        _forward,
        _backward,
        _fake,
        zeros=True,
    )
)
