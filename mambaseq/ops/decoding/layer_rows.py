"""One decode step of whole Mamba-1 layers of several sequences on an NVIDIA GPU by five kernels: the norm, in_proj, the
convolution with x_proj, what `rows.py` has, and out_proj with the sum (`layer_rows.cu`). Each begins while the one in
front of it runs, and has its weights and states by the time that one ends.

Used for what a GPU has computed right and faster by them (`_TRIED`); tests and `benchmarks/decode_parts.py` run them
for all that they take by `tuning.untried`.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.decoding import rows
from mambaseq.ops.decoding.block import BlockWeights
from mambaseq.ops.decoding.layer import LayerNorm
from mambaseq.ops.gpu import nvrtc, portable

FILES = (Path(__file__).parent / "rows_common.cu", Path(__file__).parent / "layer_rows.cu")
NORM, PRODUCT, CONV = 1, 2, 3
_NORM_WARPS = 8
_PRODUCT_WARPS = range(8, 17)
_MOST_PIECES = 4  # of 32 numbers of a row of a weight that a warp holds
_FEWEST_BLOCKS = 96  # of a product
_REGISTERS, _OTHER_REGISTERS = 65536, 45  # of a multiprocessor; of a thread, beside what it multiplies
_MOST_PRODUCTS, _MOST_PARTS, _WIDEST_CONV = 160, 16, 8
_ALIGNED = 16  # bytes that are read at once
# d_model, d_inner, states a channel, ranks of dt_proj, types of parameters and states, and the most sequences, of what
# a GPU has stepped right and faster than by single operations: the published 130M, whose step of 2, 8, 16, 32, 64, 128
# sequences took 258, 312, 363, 406, 473, 784 where these took 638, 645, 646, 687, 765, 905 us on an H200; of 256 1,306
# for 1,138.
_TRIED = {(768, 1536, 16, 48, torch.bfloat16, torch.float32): 128}


@dataclasses.dataclass
class Tuning:
    """on: whether layers are stepped whole. untried: of every shape that the kernels take. early: whether a kernel
    begins before the one in front of it has ended. in_tile, out_tile: outputs by sixteens and sequences by eights that
    a block of in_proj and of out_proj has at most; None: cuBLAS's. conv_warps: of a block of the convolution."""

    on: bool = True
    untried: bool = False
    early: bool = True
    in_tile: tuple[int, int] | None = (4, 4)
    out_tile: tuple[int, int] | None = (2, 2)
    conv_warps: int = 6


tuning = Tuning()


class Plan(NamedTuple):
    """Of a product. warps: of a block. outs: outputs by sixteens, rows: sequences by eights, of a block."""

    warps: int
    outs: int
    rows: int

    @property
    def shared(self) -> int:
        """Bytes."""
        return 4 * self.warps * 8 * self.rows * (16 * self.outs + 4)


def can_step(residual: Tensor, norm: LayerNorm, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether the kernels can run: what `rows.can_step_rows` asks for, a contiguous fp32 stream `(rows, d_model)` of
    two rows or more, no biases of in_proj and out_proj, and sizes that are multiples of what a warp has."""
    w, d_model = weights, residual.shape[1]
    if len(residual) < 2 or not residual.is_cuda or not tuning.on or w.in_bias is not None or w.out_bias is not None:
        return False
    channels, d_state, rank = ssm_state.shape[1], ssm_state.shape[2], w.dt_proj.shape[1]
    shape = (d_model, channels, d_state, rank, w.in_proj.dtype, ssm_state.dtype)
    if not tuning.untried and len(residual) > _TRIED.get(shape, 0):
        return False
    tensors = (norm.weight, w.in_proj, w.out_proj)
    if residual.dtype != torch.float32 or any(t.dtype != w.x_proj.dtype or not t.is_contiguous() for t in tensors):
        return False
    if any(t.device != residual.device for t in tensors) or not residual.is_contiguous():
        return False
    if channels % 32 or rank + 2 * d_state > _MOST_PRODUCTS or not 2 <= w.conv.shape[-1] <= _WIDEST_CONV:
        return False
    if -(-channels // (32 * tuning.conv_warps)) > _MOST_PARTS:
        return False
    if planned(2 * channels, d_model, 2, (1, 1)) is None or planned(d_model, channels, 2, (1, 1)) is None:
        return False
    if any(t.data_ptr() % _ALIGNED for t in (residual, w.in_proj, w.x_proj, w.out_proj)):
        return False
    return rows.can_step_rows(w.in_proj, conv_state, ssm_state, w)


def step_(residual: Tensor, norm: LayerNorm, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> Tensor:
    """residual + block(norm(residual)), `(rows, d_model)` fp32; changes the states in place. A row's numbers are the
    same however many there are.

    conv_state `(rows, d_inner, d_conv - 1)` fp32; ssm_state `(rows, d_inner, d_state)` fp32 or bf16.
    """
    w, (n, channels, _) = weights, ssm_state.shape
    with portable.on(residual):
        y = _norm(residual, norm, w.in_proj.dtype)
        inner = y.new_empty(n, 2 * channels)
        if not _product(y, w.in_proj, None, inner, tuning.in_tile):
            inner = F.linear(y, w.in_proj)
        u, products = _conv(inner, conv_state, w)
        y = rows.scan_rows_(u, products, inner[:, channels:], ssm_state, w, tuning.early)
        out = torch.empty(n, residual.shape[1], dtype=torch.float32, device=residual.device)
        if not _product(y, w.out_proj, residual, out, tuning.out_tile):
            return residual + F.linear(y, w.out_proj)
    return out


def _norm(stream: Tensor, norm: LayerNorm, dtype: torch.dtype) -> Tensor:
    n, width = stream.shape
    y = torch.empty(n, width, dtype=dtype, device=stream.device)
    _kernel("norm_rows", _macros(NORM, dtype, _NORM_WARPS) | norm_macros(width, norm.eps), 0, stream)(
        n, stream, norm.weight, y
    )
    return y


def _product(x: Tensor, weight: Tensor, stream: Tensor | None, out: Tensor, tile: tuple[int, int] | None) -> bool:
    """Whether it was made."""
    (n, n_in), n_out = x.shape, len(weight)
    plan = None if tile is None else planned(n_out, n_in, n, tile)
    if plan is None:
        return False
    macros = _macros(PRODUCT, x.dtype, plan.warps) | product_macros(plan, n_in, stream is not None)
    grid = -(-n_out // (16 * plan.outs)), -(-n // (8 * plan.rows))
    _kernel("product_rows", macros, plan.shared, x)(grid, x, x.stride(0), weight, stream, out, n, n_out)
    return True


def _conv(inner: Tensor, state: Tensor, w: BlockWeights) -> tuple[Tensor, Tensor]:
    """What the convolution makes, `(rows, channels)`, and the summands of its products with x_proj."""
    (n, channels, remembered), n_out, warps = state.shape, len(w.x_proj), tuning.conv_warps
    blocks = -(-channels // (32 * warps))
    u = inner.new_empty(n, channels)
    parts = torch.empty(blocks, n, n_out, dtype=torch.float32, device=inner.device)
    macros = _macros(CONV, inner.dtype, warps) | conv_macros(remembered + 1, n_out, w.conv_bias is not None)
    _kernel("conv_rows", macros, 0, inner)(
        (blocks, -(-n // 8)), inner, inner.stride(0), state, w.conv, w.conv_bias, w.x_proj, u, parts, n, channels
    )
    return u, parts


def planned(n_out: int, n_in: int, n: int, tile: tuple[int, int]) -> Plan | None:
    """How a product is spread over blocks of at most this tile; None where the kernel does not take it. Warps, which
    decide in what order is summed, do not depend on n, the rows."""
    if n_out % 16:
        return None
    warps = next((w for w in _PRODUCT_WARPS if n_in % (32 * w) == 0 and n_in <= 32 * w * _MOST_PIECES), None)
    if warps is None:
        return None
    pieces, room = n_in // (32 * warps), min(255, _REGISTERS // (32 * warps)) - _OTHER_REGISTERS
    outs, by_eight = tile
    while by_eight > 1 and 4 * by_eight >= n:
        by_eight //= 2
    while outs > 1 and -(-n_out // (16 * outs)) * -(-n // (8 * by_eight)) < _FEWEST_BLOCKS:
        outs //= 2
    while pieces * (8 * outs + 4 * by_eight) + 4 * outs * by_eight > room and outs * by_eight > 1:
        outs, by_eight = (outs, by_eight // 2) if by_eight >= outs else (outs // 2, by_eight)
    return Plan(warps, outs, by_eight)


def _macros(part: int, dtype: torch.dtype, warps: int) -> dict[str, int]:
    return {"IN": rows.CODES[dtype], "PART": part, "WARPS": warps}


def norm_macros(width: int, eps: float) -> dict[str, int]:
    """What layer_rows.cu is compiled with beside the part, types and warps."""
    return {"WIDTH": width, "EPS_BITS": struct.unpack("<I", struct.pack("<f", eps))[0]}


def product_macros(plan: Plan, n_in: int, adds: bool) -> dict[str, int]:
    """The same of a product."""
    return {"IN_SIZE": n_in, "OUTS": plan.outs, "ROWS": plan.rows, "ADDS": int(adds)}


def conv_macros(taps: int, n_out: int, has_bias: bool) -> dict[str, int]:
    """The same of the convolution."""
    return {"TAPS": taps, "N_OUT": n_out, "HAS_BIAS": int(has_bias)}


def _kernel(name: str, macros: dict[str, int], shared: int, x: Tensor) -> nvrtc.Kernel:
    return _kernels(name, tuple(macros.items()), shared, x.device.index, tuning.early)


@functools.cache
def _kernels(name: str, settings: tuple[tuple[str, int], ...], shared: int, device: int, early: bool) -> nvrtc.Kernel:
    macros = dict(settings)
    return nvrtc.kernel(FILES, name, macros, 32 * macros["WARPS"], shared, device, early=early)
