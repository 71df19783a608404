# mypy: allow-untyped-defs
"""Triton kernels of the angles of Mamba-3: what positions turn by, added up over time in pieces of ROWS positions.

`values` `(batch, length, heads or 1, ANGLES)` and dt `(batch, length, heads)` float32, with strides; a position turns
by pi tanh(values) dt. Sums of pieces are `(batch, pieces, heads, ANGLES)` float64. HALF: ANGLES, to a power of two.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import tanh

_PI = tl.constexpr(3.141592653589793)
_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _piece(pieces, length, ROWS: tl.constexpr):
    """Which piece it is of all, of which sequence, its rows, and which of these there are."""
    number = tl.program_id(0)
    row = number % pieces * ROWS + tl.arange(0, ROWS)
    return number.to(tl.int64), (number // pieces).to(tl.int64), row, row < length


@triton.jit
def _tanh(values, batch, v_batch, row, v_row, h, v_head, here, i, ANGLES: tl.constexpr):
    at = batch * v_batch + row[:, None].to(tl.int64) * v_row + h * v_head + i[None, :]
    v = tl.load(values + at, mask=here[:, None] & (i < ANGLES)[None, :], other=0.0)
    return tanh(v)


@triton.jit
def _steps(dt, batch, d_batch, row, d_row, h, d_head, here):
    return tl.load(dt + batch * d_batch + row.to(tl.int64) * d_row + h * d_head, mask=here, other=0.0)


@triton.jit
def _exact(size, step):
    """tanh(values) dt, which float64 holds to the last digit: the roundings of many positions would add up."""
    return size.to(tl.float64) * step.to(tl.float64)[:, None]


@triton.jit(do_not_specialize=["pieces", "length"])
def totals(
    values, v_batch, v_row, v_head, dt, d_batch, d_row, d_head, places, found, pieces, length, heads,
    ANGLES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over pieces; of the values themselves where there is no dt. With `places` of one row, over the positions
    that are before each place in its piece, found (places, heads, ANGLES). A program takes a head's of a piece."""
    number, batch, row, here = _piece(pieces, length, ROWS)
    if places is not None:
        place = tl.load(places + number)
        row = tl.minimum(place // ROWS, pieces - 1) * ROWS + tl.arange(0, ROWS)
        here = row < place
        batch = number * 0
    h = tl.program_id(1)
    i = tl.arange(0, HALF)
    if dt is None:
        at = batch * v_batch + row[:, None].to(tl.int64) * v_row + h * v_head + i[None, :]
        v = tl.load(values + at, mask=here[:, None] & (i < ANGLES)[None, :], other=0.0)
    else:
        size = _tanh(values, batch, v_batch, row, v_row, h, v_head, here, i, ANGLES)
        v = _exact(size, _steps(dt, batch, d_batch, row, d_row, h, d_head, here))
    total = tl.sum(v.to(tl.float64), axis=0)
    if dt is not None:
        total *= _PI
    tl.store(found + (number * heads + h) * ANGLES + i, total, mask=i < ANGLES)


@triton.jit
def _of_sequences(offset, sequence, row, here, h, heads, i, ANGLES: tl.constexpr):
    """What is added to each row (ROWS, HALF); sequence: the packed one of each row."""
    s = tl.load(sequence + row, mask=here, other=0).to(tl.int64)
    return tl.load(
        offset + (s * heads + h)[:, None] * ANGLES + i[None, :], mask=here[:, None] & (i < ANGLES)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["pieces", "length"])
def upto(
    values, v_batch, v_row, v_head, dt, d_batch, d_row, d_head, sequence, offset, before, angle, pieces, length, heads,
    ANGLES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """angle (batch, length, heads, ANGLES) float32, whole turns taken off; before: those before each piece; offset
    (sequences, heads, ANGLES) float64 or none: what is added in each packed sequence."""
    number, batch, row, here = _piece(pieces, length, ROWS)
    h = tl.program_id(1)
    i = tl.arange(0, HALF)
    size = _tanh(values, batch, v_batch, row, v_row, h, v_head, here, i, ANGLES)
    v = _exact(size, _steps(dt, batch, d_batch, row, d_row, h, d_head, here))
    start = tl.load(before + (number * heads + h) * ANGLES + i, mask=i < ANGLES, other=0.0)
    total = tl.cumsum(v, axis=0) * _PI + start[None, :]
    if offset is not None:
        total += _of_sequences(offset, sequence, row, here, h, heads, i, ANGLES)
    total -= tl.floor(total * (1 / _TURN)) * _TURN
    to = ((batch * length + row) * heads + h)[:, None] * ANGLES + i[None, :]
    tl.store(angle + to, total.to(tl.float32), mask=here[:, None] & (i < ANGLES)[None, :])


@triton.jit(do_not_specialize=["pieces", "length", "of_part"])
def backward(
    values, v_batch, v_row, v_head, dt, d_batch, d_row, d_head, sequence, offset, dangle, after, dvalues, ddt,
    pieces, length, heads, of_part, SHARED: tl.constexpr, ANGLES: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dvalues as values and ddt as dt, contiguous; after: sums of dangle behind each piece; offset as above. A program
    takes of_part heads of a piece; SHARED: they have the values in common, and each part of the heads has dvalues of
    its own."""
    number, batch, row, here = _piece(pieces, length, ROWS)
    part = tl.program_id(1)
    i = tl.arange(0, HALF)
    known = here[:, None] & (i < ANGLES)[None, :]
    of_row = batch * length + row
    total = tl.zeros([ROWS, HALF], dtype=tl.float32)
    for h in range(part * of_part, tl.minimum((part + 1) * of_part, heads)):
        size = _tanh(values, batch, v_batch, row, v_row, h, v_head, here, i, ANGLES)
        step = _steps(dt, batch, d_batch, row, d_row, h, d_head, here)
        at = (of_row * heads + h)[:, None] * ANGLES + i[None, :]
        d = tl.cumsum(tl.load(dangle + at, mask=known, other=0.0), axis=0, reverse=True)
        behind = tl.load(after + (number * heads + h) * ANGLES + i, mask=i < ANGLES, other=0.0)[None, :]
        if offset is not None:
            behind += _of_sequences(offset, sequence, row, here, h, heads, i, ANGLES)
        d = _PI * (d + behind.to(tl.float32))
        tl.store(ddt + of_row * heads + h, tl.sum(d * size, axis=1), mask=here)
        d *= step[:, None] * (1 - size * size)
        if SHARED:
            total += d
        else:
            tl.store(dvalues + at, d, mask=known)
    if SHARED:
        of_row += part * (tl.num_programs(0) // pieces).to(tl.int64) * length
        tl.store(dvalues + of_row[:, None] * ANGLES + i[None, :], total, mask=known)
