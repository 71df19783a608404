# mypy: allow-untyped-defs
"""Triton kernels that turn B and C of Mamba-3: biases of each head are added, and pairs of channels turn by angles.

B and C `(rows, RANK, groups, N)` float32, biases `(heads, RANK, N)`, angles `(rows, heads, ANGLES)` float64, of which a
program takes whole turns off before it goes on in float32, or float32 of few turns. Turned ones are `(rows, RANK,
heads, N)` float32 or bfloat16. Pairs are halves of the channels (HALVES) or neighbours; those behind the first ANGLES
stay. A program takes ROWS rows and PAIRS pairs, and of_part heads of a group one after the other.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import cos_sin
from mambaseq.ops.ssd.triton_kernels import _rounded


@triton.jit
def _pairs(m, place, i, mask, N: tl.constexpr, HALVES: tl.constexpr):
    """The two of each pair, float32; place: how many times N from m on. Neighbours are read as one word."""
    if HALVES:
        one = tl.load(m + place * N + i, mask=mask, other=0.0).to(tl.float32)
        return one, tl.load(m + place * N + N // 2 + i, mask=mask, other=0.0).to(tl.float32)
    elif m.dtype.element_ty == tl.bfloat16:
        both = tl.load(m.to(tl.pointer_type(tl.int32)) + place * (N // 2) + i, mask=mask, other=0)
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        both = tl.load(m.to(tl.pointer_type(tl.int64)) + place * (N // 2) + i, mask=mask, other=0)
        return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _store(m, place, i, mask, one, other, N: tl.constexpr, HALVES: tl.constexpr):
    if HALVES:
        tl.store(m + place * N + i, _rounded(one, m.dtype.element_ty), mask=mask)
        tl.store(m + place * N + N // 2 + i, _rounded(other, m.dtype.element_ty), mask=mask)
    elif m.dtype.element_ty == tl.bfloat16:
        low = _rounded(one, tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
        high = _rounded(other, tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
        tl.store(m.to(tl.pointer_type(tl.int32)) + place * (N // 2) + i, low | (high << 16), mask=mask)
    else:
        low = one.to(tl.uint32, bitcast=True).to(tl.int64)
        high = other.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(m.to(tl.pointer_type(tl.int64)) + place * (N // 2) + i, low | (high << 32), mask=mask)


@triton.jit
def _turn(angle, row, known, h, heads, i, turns, ANGLES: tl.constexpr):
    """Cosine and sine (ROWS, PAIRS); turns: whether any of the pairs does."""
    cos = tl.full([row.shape[0], i.shape[0]], 1.0, tl.float32)
    sin = tl.zeros([row.shape[0], i.shape[0]], dtype=tl.float32)
    if turns:
        at = (row.to(tl.int64) * heads + h)[:, None] * ANGLES + i[None, :]
        value = tl.load(angle + at, mask=known[:, None] & (i < ANGLES)[None, :], other=0.0)
        if angle.dtype.element_ty == tl.float64:
            value = (value - tl.floor(value * 0.15915494309189535) * 6.283185307179586).to(tl.float32)
        cos, sin = cos_sin(value)
    return cos, sin


@triton.jit
def _program(heads_of_group, of_part, N: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Rows; pairs, and the first of them; group, rank, the first of its heads and the one behind the last."""
    blocks: tl.constexpr = (N // 2 + PAIRS - 1) // PAIRS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) % blocks * PAIRS
    i = begin + tl.arange(0, PAIRS)
    g = tl.program_id(1) // blocks // RANK
    r = tl.program_id(1) // blocks % RANK
    first = g * heads_of_group + tl.program_id(2) * of_part
    return row, i, begin, g, r, first, tl.minimum(first + of_part, (g + 1) * heads_of_group)


@triton.jit
def _biased(bias, one, other, h, r, i, N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr):
    bias_one, bias_other = _pairs(bias, h * RANK + r, i, i < N // 2, N, HALVES)
    return one + bias_one[None, :], other + bias_other[None, :]


@triton.jit(do_not_specialize=["rows", "of_part"])
def turn(
    B, C, B_bias, C_bias, angle, B_to, C_to, rows, heads, groups, heads_of_group, of_part,
    N: tl.constexpr, ANGLES: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    row, i, begin, g, r, first, end = _program(heads_of_group, of_part, N, RANK, ROWS, PAIRS)
    known = row < rows
    mask = known[:, None] & (i < N // 2)[None, :]
    of_row = row.to(tl.int64) * RANK + r
    B_one, B_other = _pairs(B, (of_row * groups + g)[:, None], i[None, :], mask, N, HALVES)
    C_one, C_other = _pairs(C, (of_row * groups + g)[:, None], i[None, :], mask, N, HALVES)
    for h in range(first, end):
        cos, sin = _turn(angle, row, known, h, heads, i, begin < ANGLES, ANGLES)
        place = (of_row * heads + h)[:, None]
        one, other = _biased(B_bias, B_one, B_other, h, r, i, N, RANK, HALVES)
        _store(B_to, place, i[None, :], mask, one * cos - other * sin, one * sin + other * cos, N, HALVES)
        one, other = _biased(C_bias, C_one, C_other, h, r, i, N, RANK, HALVES)
        _store(C_to, place, i[None, :], mask, one * cos - other * sin, one * sin + other * cos, N, HALVES)


@triton.jit
def _turned_back(m_to, place, i, mask, one, other, cos, sin, N: tl.constexpr, HALVES: tl.constexpr):
    """The gradient before turning (both of the pairs) and that of the angle."""
    d_one, d_other = _pairs(m_to, place, i[None, :], mask, N, HALVES)
    back_one = d_one * cos + d_other * sin
    back_other = d_other * cos - d_one * sin
    return back_one, back_other, back_other * one - back_one * other


@triton.jit
def _four_sums(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit(do_not_specialize=["rows", "of_part"])
def turn_backward(
    B, C, B_bias, C_bias, angle, dB_to, dC_to, dB, dC, dB_bias, dC_bias, dangle, rows, heads, groups,
    heads_of_group, of_part,
    N: tl.constexpr, ANGLES: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """dB and dC as B, one share a part of a group; gradients of the biases (blocks, heads, RANK, N), one
    share a block of rows, of the angles (RANK, rows, heads, ANGLES), all float32. A program takes one rank's."""
    row, i, begin, g, r, first, end = _program(heads_of_group, of_part, N, RANK, ROWS, PAIRS)
    turns = begin < ANGLES
    known = row < rows
    pair = i < N // 2
    mask = known[:, None] & pair[None, :]
    of_row = row.to(tl.int64) * RANK + r
    B_one, B_other = _pairs(B, (of_row * groups + g)[:, None], i[None, :], mask, N, HALVES)
    C_one, C_other = _pairs(C, (of_row * groups + g)[:, None], i[None, :], mask, N, HALVES)
    dB_one = tl.zeros([ROWS, PAIRS], dtype=tl.float32)
    dB_other = tl.zeros([ROWS, PAIRS], dtype=tl.float32)
    dC_one = tl.zeros([ROWS, PAIRS], dtype=tl.float32)
    dC_other = tl.zeros([ROWS, PAIRS], dtype=tl.float32)
    for h in range(first, end):
        cos, sin = _turn(angle, row, known, h, heads, i, turns, ANGLES)
        place = (of_row * heads + h)[:, None]
        one, other = _biased(B_bias, B_one, B_other, h, r, i, N, RANK, HALVES)
        b_one, b_other, of_B = _turned_back(dB_to, place, i, mask, one, other, cos, sin, N, HALVES)
        one, other = _biased(C_bias, C_one, C_other, h, r, i, N, RANK, HALVES)
        c_one, c_other, of_C = _turned_back(dC_to, place, i, mask, one, other, cos, sin, N, HALVES)
        if turns:
            at = ((r * tl.full([1], 1, tl.int64) * rows + row) * heads + h)[:, None] * ANGLES + i[None, :]
            tl.store(dangle + at, of_B + of_C, mask=known[:, None] & (i < ANGLES)[None, :])
        dB_one += b_one
        dB_other += b_other
        dC_one += c_one
        dC_other += c_other
        b_one, b_other, c_one, c_other = tl.reduce((b_one, b_other, c_one, c_other), 0, _four_sums)
        share = (tl.program_id(0).to(tl.int64) * heads + h) * RANK + r
        _store(dB_bias, share, i, pair, b_one, b_other, N, HALVES)
        _store(dC_bias, share, i, pair, c_one, c_other, N, HALVES)
    place = (((tl.program_id(2) * tl.full([1], 1, tl.int64) * rows + row) * RANK + r) * groups + g)[:, None]
    _store(dB, place, i[None, :], mask, dB_one, dB_other, N, HALVES)
    _store(dC, place, i[None, :], mask, dC_one, dC_other, N, HALVES)
