# mypy: allow-untyped-defs
"""Triton kernels that turn B and C of Mamba-3: biases of each head are added, and pairs of channels turn by angles.

B and C `(rows, RANK, groups, N)` float32, biases `(heads, RANK, N)`, angles `(rows, heads, ANGLES)` float64 or
float32, of which a program takes whole turns off before it goes on in float32. Turned ones are `(rows, RANK, heads,
N)`. Pairs are halves of the channels (HALVES) or neighbours; those behind the first ANGLES stay. A program takes ROWS
rows.
"""

import triton
import triton.language as tl

from mambaseq.ops.ssd.triton_kernels import _rounded


@triton.jit
def _angle(angle, row, known, h, heads, ANGLES: tl.constexpr, HALF: tl.constexpr):
    """Cosine and sine (ROWS, HALF)."""
    i = tl.arange(0, HALF)
    at = (row.to(tl.int64) * heads + h)[:, None] * ANGLES + i[None, :]
    value = tl.load(angle + at, mask=known[:, None] & (i < ANGLES)[None, :], other=0.0)
    value = (value - tl.floor(value * 0.15915494309189535) * 6.283185307179586).to(tl.float32)
    return tl.cos(value), tl.sin(value)


@triton.jit
def _pairs(m, row, known, N: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr):
    """The two of each pair (ROWS, HALF) float32; m points to a row of N for each row."""
    i = tl.arange(0, HALF)
    mask = known[:, None] & (i < N // 2)[None, :]
    if HALVES:
        one = tl.load(m[:, None] + i[None, :], mask=mask, other=0.0)
        other = tl.load(m[:, None] + N // 2 + i[None, :], mask=mask, other=0.0)
    else:
        n = tl.arange(0, 2 * HALF)
        both = tl.load(m[:, None] + n[None, :], mask=known[:, None] & (n < N)[None, :], other=0.0)
        one, other = tl.split(tl.reshape(both, [row.shape[0], HALF, 2]))
    return one.to(tl.float32), other.to(tl.float32)


@triton.jit
def _store(m, row, known, one, other, N: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    mask = known[:, None] & (i < N // 2)[None, :]
    if HALVES:
        tl.store(m[:, None] + i[None, :], _rounded(one, m.dtype.element_ty), mask=mask)
        tl.store(m[:, None] + N // 2 + i[None, :], _rounded(other, m.dtype.element_ty), mask=mask)
    else:
        n = tl.arange(0, 2 * HALF)
        both = tl.reshape(tl.join(one, other), [row.shape[0], 2 * HALF])
        tl.store(m[:, None] + n[None, :], _rounded(both, m.dtype.element_ty), mask=known[:, None] & (n < N)[None, :])


@triton.jit
def _turned(m, bias, to, row, known, h, r, heads, groups, heads_of_group, cos, sin,
            N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    of_row = row.to(tl.int64) * RANK + r
    one, other = _pairs(m + (of_row * groups + h // heads_of_group) * N, row, known, N, HALVES, HALF)
    none = row.to(tl.int64) * 0
    bias_one, bias_other = _pairs(bias + (h * RANK + r) * N + none, row, known, N, HALVES, HALF)
    one += bias_one
    other += bias_other
    _store(to + (of_row * heads + h) * N, row, known, one * cos - other * sin, one * sin + other * cos, N, HALVES, HALF)


@triton.jit(do_not_specialize=["rows"])
def turn(
    B, C, B_bias, C_bias, angle, B_to, C_to, rows, heads, groups, heads_of_group,
    N: tl.constexpr, ANGLES: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A program turns one head's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    known = row < rows
    cos, sin = _angle(angle, row, known, h, heads, ANGLES, HALF)
    for r in tl.static_range(RANK):
        _turned(B, B_bias, B_to, row, known, h, r, heads, groups, heads_of_group, cos, sin, N, RANK, HALVES, HALF)
        _turned(C, C_bias, C_to, row, known, h, r, heads, groups, heads_of_group, cos, sin, N, RANK, HALVES, HALF)


@triton.jit
def _turned_back(m, bias, dm_to, dbias, row, known, h, r, heads, groups, heads_of_group, cos, sin,
                 N: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """The gradient before turning (both of the pairs) and that of the angle; stores its sum over the rows."""
    of_row = row.to(tl.int64) * RANK + r
    one, other = _pairs(m + (of_row * groups + h // heads_of_group) * N, row, known, N, HALVES, HALF)
    none = row.to(tl.int64) * 0
    bias_one, bias_other = _pairs(bias + (h * RANK + r) * N + none, row, known, N, HALVES, HALF)
    one += bias_one
    other += bias_other
    d_one, d_other = _pairs(dm_to + (of_row * heads + h) * N, row, known, N, HALVES, HALF)
    back_one = d_one * cos + d_other * sin
    back_other = d_other * cos - d_one * sin
    d_angle = back_other * one - back_one * other
    i = tl.arange(0, HALF)
    to = dbias + ((tl.program_id(0).to(tl.int64) * heads + h) * RANK + r) * N
    apart: tl.constexpr = 1 if HALVES else 2
    beside: tl.constexpr = N // 2 if HALVES else 1
    tl.store(to + i * apart, tl.sum(back_one, axis=0), mask=i < N // 2)
    tl.store(to + i * apart + beside, tl.sum(back_other, axis=0), mask=i < N // 2)
    return back_one, back_other, d_angle


@triton.jit(do_not_specialize=["rows"])
def turn_backward(
    B, C, B_bias, C_bias, angle, dB_to, dC_to, dB, dC, dB_bias, dC_bias, dangle, rows, heads, groups, heads_of_group,
    N: tl.constexpr, ANGLES: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dB and dC as B, one share a part of HEADS heads of a group; gradients of the biases (blocks, heads, RANK, N), one
    share a block of rows, of the angles (RANK, rows, heads, ANGLES), all float32. A program takes a part's of one
    rank."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(1) // RANK
    r = tl.program_id(1) % RANK
    part = tl.program_id(2)
    known = row < rows
    i = tl.arange(0, HALF)
    B_one = tl.zeros([ROWS, HALF], dtype=tl.float32)
    B_other = tl.zeros([ROWS, HALF], dtype=tl.float32)
    C_one = tl.zeros([ROWS, HALF], dtype=tl.float32)
    C_other = tl.zeros([ROWS, HALF], dtype=tl.float32)
    first = g * heads_of_group + part * HEADS
    for h in range(first, tl.minimum(first + HEADS, (g + 1) * heads_of_group)):
        cos, sin = _angle(angle, row, known, h, heads, ANGLES, HALF)
        one, other, of_B = _turned_back(
            B, B_bias, dB_to, dB_bias, row, known, h, r, heads, groups, heads_of_group, cos, sin, N, RANK, HALVES, HALF
        )
        B_one += one
        B_other += other
        one, other, of_C = _turned_back(
            C, C_bias, dC_to, dC_bias, row, known, h, r, heads, groups, heads_of_group, cos, sin, N, RANK, HALVES, HALF
        )
        C_one += one
        C_other += other
        at = ((r * tl.full([1], 1, tl.int64) * rows + row) * heads + h)[:, None] * ANGLES + i[None, :]
        tl.store(dangle + at, of_B + of_C, mask=known[:, None] & (i < ANGLES)[None, :])
    at = (((part * tl.full([1], 1, tl.int64) * rows + row) * RANK + r) * groups + g) * N
    _store(dB + at, row, known, B_one, B_other, N, HALVES, HALF)
    _store(dC + at, row, known, C_one, C_other, N, HALVES, HALF)
