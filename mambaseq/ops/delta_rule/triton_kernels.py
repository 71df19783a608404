# mypy: allow-untyped-defs

"""Triton kernels of the delta rule, forward: time is cut into chunks of SIZE positions that are computed as matrices.

Chunks, rows and the table of packed sequences are those of `mambaseq.ops.ssd.triton_kernels`; `bounds` (2, sequences)
int32 has the first chunk of each packed sequence, and how many there are. In a chunk that the state S enters,

    U = T β (V - K↓ Sᵀ),    y = P U + Q↓ Sᵀ,    S' = S decayed + Uᵀ K↑

with P and T = (1 + β tril(K K↓ᵀ, -1))⁻¹ (chunks, heads, SIZE, SIZE) made for all chunks at once, where ↓ is what has
decayed since the chunk began and ↑ will have until its end. `total` (chunks, heads, SIZE) float64 are the sums of
log-decays in units of log 2, of which only differences inside a chunk are exponentiated. States are (chunks, heads,
d_value, d_key), `written` U as (chunks, heads, d_value, SIZE): a program of `walk` has rows of d_value, so that the
result of each of its products is the left side of the next and never leaves the registers.

Operands of matrix products are of the dtype of v; those that are computed are rounded once, and kept in float32 where
they might not fit in float16. Everything else is float32. What a product made is never transposed: on Hopper GPUs
Triton 3.4 to 3.7.0 gets that wrong. Nor is an operand in shared memory narrower than 128 bytes: see `gpu`.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import INTERPRETED
from mambaseq.ops.ssd.triton_kernels import _chunk, _narrow, _rounded, _row

# numbers that a kernel is not compiled anew for
_CHANGING = ["chunks", "chunks_of_row", "length", "sequences", "heads", "heads_of_key", "b_batch", "b_row", "apart"]
_LOG2_E = tl.constexpr(1.4426950408889634)
# a decay below it is 0 in float32, but sums with it would lose the digits of the others
_FORGOTTEN = tl.constexpr(-104.0)
_LEAST = tl.constexpr(16)  # rows of the blocks that are inverted row by row


@triton.jit
def _dot(a, b):
    """a b; of float32 to its digits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def _added(total, value, b):
    """total + value b, of a value in float32 and an operand."""
    narrow, power = _narrow(value, b)
    if INTERPRETED or b.dtype == tl.float16:
        return total + _dot(narrow, b) * power
    if b.dtype == tl.float32:
        return tl.dot(narrow, b, total, input_precision="tf32x3")
    else:
        return tl.dot(narrow, b, total)


@triton.jit
def _kept(value, like):
    """What a kernel has kept as an operand, and what its products are to be multiplied by."""
    if value.dtype == like.dtype:
        return value, 1.0
    else:
        return _narrow(value.to(tl.float32), like)


@triton.jit
def _as(value, dtype: tl.constexpr):
    if value.dtype == dtype:
        return value
    else:
        return _rounded(value.to(tl.float32), dtype)


@triton.jit
def _rows(pointer, row, s_row, column, here, width):
    """(rows, columns) of what is given; zeros beyond `here` and `width`."""
    mask = here[:, None] & (column < width)[None, :]
    return tl.load(pointer + row[:, None] * s_row + column[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(pointer, row, s_row, column, here, width):
    """The same as (columns, rows)."""
    mask = here[None, :] & (column < width)[:, None]
    return tl.load(pointer + row[None, :] * s_row + column[:, None], mask=mask, other=0.0)


@triton.jit
def _made(pointer, which, i, n, N, SIZE: tl.constexpr):
    """(SIZE, d_key) of a head of a chunk."""
    known = (n < N)[None, :] & (i < SIZE)[:, None]
    return tl.load(pointer + which * (SIZE * N) + i[:, None] * N + n[None, :], mask=known, other=0.0)


@triton.jit
def _decay(exponent):
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def _span(bounds, s, sequences, chunks_of_row, part, PARTS: tl.constexpr):
    """The first chunk of a part of sequence s, and how many it has."""
    if bounds is None:
        begin, n = s * chunks_of_row, chunks_of_row
    else:
        begin, n = tl.load(bounds + s), tl.load(bounds + sequences + s)
    if PARTS > 1:
        more = n % PARTS  # of the parts have a chunk more
        begin += n // PARTS * part + tl.minimum(part, more)
        n = n // PARTS + tl.where(part < more, 1, 0)
    return begin, n


@triton.jit
def _first(start, line, p, n, at, inside, P: tl.constexpr, STATE: tl.constexpr, MAPS: tl.constexpr):
    """The state that a walk begins with, of rows p; in rows from P on the identity."""
    if MAPS:
        return tl.where((p[:, None] - P == n[None, :]) & inside, 1.0, 0.0)
    elif start is None:
        return tl.zeros(at.shape, dtype=tl.float32)
    else:
        return tl.load(start + line.to(tl.int64) * STATE + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _doubled(found, A, half: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the blocks of `half` rows on the diagonal of 1 + A to those of blocks twice as large."""
    block = tl.arange(0, SIZE) // half
    corner = tl.where((block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None], A, 0.0)
    return found - tl.dot(tl.dot(found, corner, input_precision=PRECISION), found, input_precision=PRECISION)


@triton.jit
def _inverse(A, scratch, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + A)⁻¹ of what is below A's diagonal: of blocks by elimination, then twice as large ones by products, whose
    terms are no larger than the result. A thread has a column of a block, to which the rows of A are read from
    `scratch`, 2 SIZE _LEAST numbers that nothing else is in."""
    LEVELS: tl.constexpr = 2  # SIZE is 4 blocks
    i = tl.arange(0, SIZE)
    block, column = i // _LEAST, i % _LEAST
    own = block[:, None] == block[None, :]
    at = i[:, None] * _LEAST + column[None, :]
    tl.store(scratch + at, A, mask=own)
    tl.debug_barrier()  # before other threads read them
    first = scratch + block * (_LEAST * _LEAST)
    found = scratch + SIZE * _LEAST
    rows = ()
    for r in tl.static_range(0, _LEAST):
        row = tl.where(column == r, 1.0, 0.0)
        for j in tl.static_range(0, r):
            row -= tl.load(first + (r * _LEAST + j)) * rows[j]
        rows += (row,)  # type: ignore[assignment]  # of any length
    # behind all reads, none of which has to wait for a row then
    for r in tl.static_range(0, _LEAST):
        tl.store(found + block * (_LEAST * _LEAST) + r * _LEAST + column, rows[r])
    tl.debug_barrier()
    whole = tl.load(found + at, mask=own, other=0.0)
    for level in tl.static_range(0, LEVELS):
        whole = _doubled(whole, A, _LEAST << level, SIZE, PRECISION)
    return whole


@triton.jit(do_not_specialize=[*_CHANGING, "g_batch", "g_row"])
def pairs(
    q, q_batch, q_row, q_head, k, k_batch, k_row, k_head, g, g_batch, g_row, g_head, beta, b_batch, b_row, b_head,
    table, chunks, chunks_of_row, length, total, scores, inverse, heads, heads_of_key,
    N: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total, P (`scores`) and, with beta, T (`inverse`); a program takes a head of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    log = tl.zeros([SIZE], dtype=tl.float64)
    if g is not None:
        log += tl.load(_row(g, g_batch, g_row, batch, first) + h * g_head + row * g_row, mask=here, other=0.0)
        log = tl.where(log < _FORGOTTEN, _FORGOTTEN, log) * _LOG2_E  # NaN stays
    sums = tl.cumsum(log, axis=0)
    tl.store(total + which * SIZE + i, sums)
    q = _row(q, q_batch, q_row, batch, first) + h // heads_of_key * q_head
    k = _row(k, k_batch, k_row, batch, first) + h // heads_of_key * k_head
    products = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    overlaps = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ks = _rows(k, row, k_row, n, here, N)
        products += _dot(_rows(q, row, q_row, n, here, N), tl.trans(ks))
        if beta is not None:
            overlaps += _dot(ks, tl.trans(ks))
    exponent = (sums[:, None] - sums[None, :]).to(tl.float32)
    decays = tl.exp2(tl.where(i[:, None] >= i[None, :], exponent, float("-inf")))
    at = which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :]
    tl.store(scores + at, _as(products * decays, scores.dtype.element_ty))
    if beta is not None:
        rate = tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)
        below = tl.where(i[:, None] > i[None, :], overlaps * decays * rate.to(tl.float32)[:, None], 0.0)
        scratch = (inverse + which * (SIZE * SIZE)).to(tl.pointer_type(tl.float32))
        tl.store(inverse + at, _as(_inverse(below, scratch, SIZE, PRECISION), inverse.dtype.element_ty))


@triton.jit(do_not_specialize=_CHANGING)
def walk(
    k, k_batch, k_row, k_head, up, v, v_batch, v_row, v_head, beta, b_batch, b_row, b_head, total, inverse,
    table, bounds, sequences, chunks, chunks_of_row, length, start, end, states, written, heads, heads_of_key,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, PARTS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """The states before each chunk, and U; a program takes BLOCK_P rows of a head's state through a part of a sequence.
    Starts and ends are (PARTS, sequences, heads, d_value, d_key).

    MAPS: nothing is kept but the ends, where d_key more rows are what the part makes of the identity, so that a start
    S ends as S times these, and the other rows. With a decay a channel there is `up`, K↑, and k is K↓; see
    `triton_channels`.
    """
    ROWS: tl.constexpr = P + N if MAPS else P
    tile = tl.program_id(0)
    blocks: tl.constexpr = (ROWS + BLOCK_P - 1) // BLOCK_P
    line = tile // blocks
    h = line % heads
    s = line // heads
    p = (tile % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, SIZE)
    STATE: tl.constexpr = ROWS * N
    at = p[:, None] * N + n[None, :]
    inside = (p < ROWS)[:, None] & (n < N)[None, :]
    row = -i if REVERSE else i
    state = _first(start, line, p, n, at, inside, P, STATE, MAPS)
    begin, n_chunks = _span(bounds, s % sequences, sequences, chunks_of_row, s // sequences, PARTS)
    for number in range(0, n_chunks):
        c = begin + number
        batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
        here = i < count
        which = c.to(tl.int64) * heads + h
        if up is None:
            pointer = _row(k, k_batch, k_row, batch, first) + h // heads_of_key * k_head
            ks = _rows(pointer, row, k_row, n, here, N)
            sums = tl.load(total + which * SIZE + i)
            whole = tl.load(total + which * SIZE + SIZE - 1)
            ups = ks
        else:
            ups = _made(up, which, i, n, N, SIZE)
            whole = tl.load(total + which * N + n, mask=n < N, other=0.0)[None, :]
        u = _columns(_row(v, v_batch, v_row, batch, first) + h * v_head, row, v_row, p, here, P).to(tl.float32)
        if not MAPS:
            tl.store(states + which * STATE + at, _as(state, states.dtype.element_ty), mask=inside)
        if beta is not None:
            T = tl.load(inverse + which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :])
            rate = tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)
            narrow, power = _narrow(state, ups)
            if up is None:
                u -= _dot(narrow, tl.trans(ks)) * (_decay(sums) * power)[None, :]
            else:
                u -= _dot(narrow, tl.trans(_made(k, which, i, n, N, SIZE))) * power
            T, power = _kept(T, ups)
            narrow, more = _narrow(u * rate.to(tl.float32)[None, :], ups)
            u = _dot(narrow, tl.trans(T)) * (power * more)
        if not MAPS:
            tl.store(
                written + which * (P * SIZE) + p[:, None] * SIZE + i[None, :], _as(u, written.dtype.element_ty),
                mask=(p < P)[:, None] & (i < SIZE)[None, :],
            )  # fmt: skip
        weighted = u * _decay(whole - sums)[None, :] if up is None else u
        state = _added(state * _decay(whole), weighted, ups)
    if end is not None:
        tl.store(end + line.to(tl.int64) * STATE + at, state, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def output(
    q, q_batch, q_row, q_head, total, scores, states, written, table, chunks, chunks_of_row, length, y, heads,
    heads_of_key, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y (batch, length, heads, d_value), contiguous; a program takes BLOCK_P columns of a head of a chunk. With a decay
    a channel q is Q↓."""
    OPERAND: tl.constexpr = y.dtype.element_ty
    c = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, SIZE)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    if not CHANNELS:
        q = _row(q, q_batch, q_row, batch, first) + h // heads_of_key * q_head
    result = tl.zeros([SIZE, BLOCK_P], dtype=tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        qs = _made(q, which, i, n, N, SIZE) if CHANNELS else _rows(q, row, q_row, n, here, N)
        entered = tl.load(
            states + which * (P * N) + p[:, None] * N + n[None, :],
            mask=(p < P)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        entered, power = _kept(entered, qs)
        result += _dot(qs, tl.trans(entered)) * power
    if not CHANNELS:
        result *= _decay(tl.load(total + which * SIZE + i))[:, None]
    pair = tl.load(scores + which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :])
    u = tl.load(
        written + which * (P * SIZE) + p[:, None] * SIZE + i[None, :],
        mask=(p < P)[:, None] & (i < SIZE)[None, :],
        other=0.0,
    )
    pair, power = _kept(pair, qs)
    u, more = _kept(u, qs)
    result += _dot(pair, tl.trans(u)) * (power * more)
    y += (batch * length + first) * (heads * P) + h * P
    tl.store(y + row[:, None] * (heads * P) + p[None, :], _as(result, OPERAND), mask=here[:, None] & (p < P)[None, :])
