# mypy: allow-untyped-defs
"""Triton kernels of the delta rule with a decay a channel of the keys: what they do not share with a decay a head.

Products of rows i and j < i, decayed in each channel by what lies between, are made in levels: on each, blocks of two
positions, four and so on are cut in their middle, where the two factors meet, so that the factors' decays are at most
1. Forward, from whole chunks down, the first level on which none of them is below 2^-60 is the last (but in float16): a
block's pairs on one side of its middle are made there as well, by decays of which one is undone, by a factor of at most
2^60. Exponents are differences of `sums` (chunks, heads, parts, SIZE, d_key), of log-decays in units of log 2 from the
chunk's beginning. In bfloat16 there is one part. Else there are two, EXACT: sums of multiples of 1/64, which have all
their digits, and of what is left, so that the differences have float32's.

Backward, a product on a level does for both of those that meet: matrices are their own mirror images, and rows of its
right side are of q where they come later and of k where they come earlier. What a pair's span says of its log-decays is
added at its later end and taken away at its earlier one, to be summed from behind: both are sums of the same rounded
products, so that nothing but float32's rounding is left of spans that do not reach over a position.

For `walk`, `output` and `walk_back` there are Q↓, K↓ and K↑ (chunks, heads, SIZE, d_key), and `total` (chunks, heads,
d_key), the log-decay of a whole chunk.
"""

import triton
import triton.language as tl

from mambaseq.ops.delta_rule.triton_kernels import (
    _CHANGING,
    _FORGOTTEN,
    _LOG2_E,
    _as,
    _decay,
    _dot,
    _inverse,
    _kept,
    _rows,
)
from mambaseq.ops.ssd.triton_kernels import _chunk, _rounded, _row

_LEVELS = tl.constexpr(6)  # until blocks of SIZE are single positions
# the largest exponent of a factor in units of log 2 on the last level: products fit in float32, also of pairs that do
# not meet, and what is multiplied by 2^-60 keeps its digits in all but float16
_FAR = tl.constexpr(60.0)


@triton.jit
def _cut_off(values):
    """Their first 8 bits: a GPU rounds two numbers at once, but not where it needs each of them in float32 as well."""
    return (values.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _summed(chosen, values, EXACT: tl.constexpr):
    """The sums of those rows of `values` that are chosen, in parts of 8 bits each: of 16 bits, EXACT of float32's."""
    ones = tl.where(chosen, 1.0, 0.0).to(tl.bfloat16)
    high = _cut_off(values)
    low = values - high
    total = _dot(ones, high.to(tl.bfloat16))
    if EXACT:
        rest = low
        low = _cut_off(rest)
        total += _dot(ones, _rounded(rest - low, tl.bfloat16))
    return total + _dot(ones, _rounded(low, tl.bfloat16))


@triton.jit
def _log_decays(g, row, g_row, n, here, N):
    """(rows, channels) in units of log 2."""
    mask = here[:, None] & (n < N)[None, :]
    log = tl.load(g + row[:, None] * g_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(log < _FORGOTTEN, _FORGOTTEN, log) * _LOG2_E  # NaN stays


@triton.jit
def _cut(log, EXACT: tl.constexpr):
    """Multiples of 1/64, whose sums over a chunk have all digits, and the rest."""
    coarse = tl.floor(log * 64) / 64 if EXACT else log
    return coarse, log - coarse


@triton.jit
def _sums(sums, r, n, N, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Of log-decays up to positions r, in two parts (positions, channels)."""
    at = sums + r[:, None] * N + n[None, :]
    known = (r < SIZE)[:, None] & (n < N)[None, :]
    coarse = tl.load(at, mask=known, other=0.0)
    return coarse, tl.load(at + SIZE * N, mask=known, other=0.0) if EXACT else coarse


@triton.jit
def _span(coarse, fine, sums, r, n, N, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """The sums of log-decays from behind positions r."""
    other, rest = _sums(sums, r, n, N, SIZE, EXACT)
    return (coarse - other) + (fine - rest) if EXACT else coarse - other


@triton.jit
def _since(coarse, fine, EXACT: tl.constexpr):
    """The decays from the chunk's beginning."""
    return tl.exp2(coarse + fine if EXACT else coarse)


@triton.jit
def _until(coarse, fine, sums, n, N, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """The decays to the chunk's end."""
    return tl.exp2(-_span(coarse, fine, sums, tl.full([1], SIZE - 1, tl.int32), n, N, SIZE, EXACT))


@triton.jit
def _from_middle(coarse, fine, sums, i, n, level, N, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """The sums of log-decays from the middle of their blocks to positions, of later ones; of earlier ones less them."""
    middle = ((i >> level | 1) << level) - 1  # the last position of the earlier half
    return _span(coarse, fine, sums, middle, n, N, SIZE, EXACT)


@triton.jit
def _nearer(span, i, level):
    """The decays between positions and the middle of their blocks."""
    return tl.exp2(tl.where((i >> level & 1 == 1)[:, None], span, -span))


@triton.jit
def _to_middle(coarse, fine, sums, i, n, level, N, SIZE: tl.constexpr, EXACT: tl.constexpr):
    return _nearer(_from_middle(coarse, fine, sums, i, n, level, N, SIZE, EXACT), i, level)


@triton.jit
def _far(span, MOST: tl.constexpr):
    """Whether a decay, or what undoes it, may be too much for a number to hold."""
    return tl.max(tl.max(tl.abs(span), axis=1), axis=0) > MOST


@triton.jit
def _met(products, overlaps, meeting, qs, ks, right, DELTA: tl.constexpr):
    """Products of q and k, and of k and k with DELTA, with those of the pairs that are meeting."""
    right = tl.trans(right)
    products += tl.where(meeting, _dot(qs, right), 0.0)
    if DELTA:
        overlaps += tl.where(meeting, _dot(ks, right), 0.0)
    return products, overlaps


@triton.jit(do_not_specialize=_CHANGING)
def pairs_of_channels(
    q, q_batch, q_row, q_head, k, k_batch, k_row, k_head, g, g_batch, g_row, g_head, beta, b_batch, b_row, b_head,
    table, chunks, chunks_of_row, length, total, sums, scores, inverse, kept_overlaps, q_down, k_down, k_up, heads,
    heads_of_key, N: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `pairs`; and `sums`, Q↓, K↓ and K↑, those of keys only with beta for K↓; and tril(K K↓ᵀ, -1), if there
    is room for it (`kept_overlaps`)."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    PARTS: tl.constexpr = 2 if EXACT else 1
    DELTA: tl.constexpr = beta is not None
    MOST: tl.constexpr = 0.0 if k.dtype.element_ty == tl.float16 else _FAR
    c = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    q = _row(q, q_batch, q_row, batch, first) + h // heads_of_key * q_head
    k = _row(k, k_batch, k_row, batch, first) + h // heads_of_key * k_head
    g = _row(g, g_batch, g_row, batch, first) + h * g_head
    sums += which * (PARTS * SIZE * N)
    later, earlier = i[:, None], i[None, :]
    own = tl.zeros([SIZE], dtype=tl.float32)
    # two loops, since one would have no registers for the products
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = i[:, None] * N + n[None, :]
        known = (i < SIZE)[:, None] & (n < N)[None, :]
        coarse, fine = _cut(_log_decays(g, row, g_row, n, here, N), EXACT)
        tl.store(sums + at, _summed(earlier <= later, coarse, EXACT), mask=known)
        if EXACT:
            tl.store(sums + SIZE * N + at, _summed(earlier <= later, fine, EXACT), mask=known)
        tl.debug_barrier()  # before other threads read them
        coarse, fine = _sums(sums, i, n, N, SIZE, EXACT)
        last = sums + (SIZE - 1) * N + n
        whole = tl.load(last, mask=n < N, other=0.0)
        if EXACT:
            whole += tl.load(last + SIZE * N, mask=n < N, other=0.0)
        tl.store(total + which * N + n, whole, mask=n < N)
        ks = _rows(k, row, k_row, n, here, N).to(tl.float32)
        qs = _rows(q, row, q_row, n, here, N).to(tl.float32)
        own += tl.sum(qs * ks, axis=1)
        into = which * (SIZE * N) + at
        since = _since(coarse, fine, EXACT)
        tl.store(q_down + into, _as(qs * since, OPERAND), mask=known)
        if DELTA:
            tl.store(k_down + into, _as(ks * since, OPERAND), mask=known)
        until = _until(coarse, fine, sums, n, N, SIZE, EXACT)
        tl.store(k_up + into, _as(ks * until, OPERAND), mask=known)

    products = tl.where(later == earlier, own[:, None], 0.0)
    overlaps = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        coarse, fine = _sums(sums, i, n, N, SIZE, EXACT)
        span = _span(coarse, fine, sums, tl.full([1], SIZE // 2 - 1, tl.int32), n, N, SIZE, EXACT)
        level = _LEVELS - 1
        # k and q are read again on each level, for which there are no registers either
        while (level > 0) & _far(span, MOST):
            decay = _nearer(span, i, level)
            right = _as(_rows(k, row, k_row, n, here, N).to(tl.float32) * decay, OPERAND)
            left = _as(_rows(q, row, q_row, n, here, N).to(tl.float32) * decay, OPERAND)
            half = (later >> level) << level
            meeting = (earlier < half) & (earlier >= half - ((later >> level & 1) << level))
            products, overlaps = _met(products, overlaps, meeting, left, right, right, DELTA)
            level -= 1
            coarse, fine = _sums(sums, i, n, N, SIZE, EXACT)
            span = _from_middle(coarse, fine, sums, i, n, level, N, SIZE, EXACT)
        # the last one: all pairs of a block
        meeting = (earlier < later) & (earlier >= (later >> (level + 1)) << (level + 1))
        ks = _rows(k, row, k_row, n, here, N).to(tl.float32)
        qs = _rows(q, row, q_row, n, here, N).to(tl.float32)
        decay = tl.exp2(span)
        right = _as(ks * tl.exp2(tl.minimum(-span, MOST)), OPERAND)
        left = _as(ks * decay, OPERAND)
        products, overlaps = _met(products, overlaps, meeting, _as(qs * decay, OPERAND), left, right, DELTA)
    at = which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :]
    tl.store(scores + at, _as(products, scores.dtype.element_ty))
    if beta is not None:
        rate = tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)
        if kept_overlaps is not None:
            tl.store(kept_overlaps + at, _as(overlaps, kept_overlaps.dtype.element_ty))
        below = overlaps * rate.to(tl.float32)[:, None]
        scratch = (inverse + which * (SIZE * SIZE)).to(tl.pointer_type(tl.float32))
        tl.store(inverse + at, _as(_inverse(below, scratch, SIZE, PRECISION), inverse.dtype.element_ty))


@triton.jit(do_not_specialize=_CHANGING)
def gradients_of_pairs(
    v, v_batch, v_row, v_head, dy, dy_batch, dy_row, dy_head, beta, b_batch, b_row, b_head, written, errors, overlaps,
    table, chunks, chunks_of_row, length, dv, of_pairs, of_keys, of_rates, heads,
    P: tl.constexpr, BLOCK_P: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dv (batch, length, heads, d_value), contiguous; dy Uᵀ and, with beta, -β Z Uᵀ (chunks, heads, SIZE, SIZE), both
    with the mirror image of what is below the diagonal above it; and what v and `overlaps`, those that
    `pairs_of_channels` kept, say of beta (chunks, heads, SIZE). A program takes a head of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    v = _row(v, v_batch, v_row, batch, first) + h * v_head
    dy = _row(dy, dy_batch, dy_row, batch, first) + h * dy_head
    dv += (batch * length + first) * (heads * P) + h * P
    rate = tl.full([SIZE], 1.0, dtype=tl.float32)
    if beta is not None:
        rate *= tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)
    of_rate = tl.zeros([SIZE], dtype=tl.float32)
    pairs = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    mirrored = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    keys = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    mirrored_keys = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        dys = _rows(dy, row, dy_row, p, here, P)
        of_u = which * (P * SIZE) + p[:, None] * SIZE + i[None, :]
        mask = (p < P)[:, None] & (i < SIZE)[None, :]  # all: zeros stand beyond `count`
        u, power = _kept(tl.load(written + of_u, mask=mask, other=0.0), dys)
        pairs += _dot(dys, u) * power
        mirrored += _dot(tl.trans(u), tl.trans(dys)) * power
        z = tl.load(errors + of_u, mask=mask, other=0.0)
        wide = tl.trans(z).to(tl.float32)
        tl.store(
            dv + row[:, None] * (heads * P) + p[None, :], _as(wide * rate[:, None], dv.dtype.element_ty),
            mask=here[:, None] & (p < P)[None, :],
        )  # fmt: skip
        if beta is not None:
            of_rate += tl.sum(wide * _rows(v, row, v_row, p, here, P).to(tl.float32), axis=1)
            z, more = _kept(z, dys)
            keys -= _dot(tl.trans(z), u) * (power * more)
            mirrored_keys -= _dot(tl.trans(u), z) * (power * more)
    above = i[:, None] < i[None, :]
    at = which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :]
    tl.store(of_pairs + at, _as(tl.where(above, mirrored, pairs), of_pairs.dtype.element_ty))
    if beta is not None:
        of_rate += tl.sum(keys * tl.load(overlaps + at).to(tl.float32), axis=1)
        tl.store(of_rates + which * SIZE + i, of_rate)
        keys = tl.where(above, mirrored_keys * rate[None, :], keys * rate[:, None])
        tl.store(of_keys + at, _as(keys, of_keys.dtype.element_ty))


@triton.jit(do_not_specialize=_CHANGING)
def gradients_of_channels(
    q, q_batch, q_row, q_head, k, k_batch, k_row, k_head, dy, dy_batch, dy_row, dy_head,
    beta, b_batch, b_row, b_head, total, sums, states, left, written, errors, of_pairs, of_keys, of_rates,
    table, chunks, chunks_of_row, length, dq, dk, dg, dbeta, apart, heads, heads_of_key,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """See `gradients`, but dv; dg (batch, length, heads, d_key)."""
    OPERAND: tl.constexpr = dy.dtype.element_ty
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    c = tl.program_id(0)
    h = tl.program_id(1)
    block = tl.program_id(2) if BLOCKS > 1 else 0
    i = tl.arange(0, SIZE)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    dy = _row(dy, dy_batch, dy_row, batch, first) + h * dy_head
    at = (batch * length + first) * (heads * N) + h * N + row[:, None] * (heads * N) + n[None, :]
    inside = here[:, None] & (n < N)[None, :]
    rate = tl.zeros([SIZE], dtype=tl.float32)
    if beta is not None:
        rate += tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)

    # by the states
    of_q = tl.zeros([SIZE, BLOCK_N], dtype=tl.float32)
    of_k = tl.zeros([SIZE, BLOCK_N], dtype=tl.float32)
    of_read = tl.zeros([SIZE, BLOCK_N], dtype=tl.float32)
    of_rate = tl.zeros([SIZE], dtype=tl.float32)
    flow = tl.zeros([BLOCK_N], dtype=tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        dys = _rows(dy, row, dy_row, p, here, P)
        of_state = which * (P * N) + p[:, None] * N + n[None, :]
        mask = (p < P)[:, None] & (n < N)[None, :]
        entered = tl.load(states + of_state, mask=mask, other=0.0)
        dleft = tl.load(left + of_state, mask=mask, other=0.0)
        of_u = which * (P * SIZE) + p[:, None] * SIZE + i[None, :]
        mask = (p < P)[:, None] & (i < SIZE)[None, :]  # all: zeros stand beyond `count`
        u = tl.load(written + of_u, mask=mask, other=0.0)
        flow += tl.sum(entered.to(tl.float32) * dleft.to(tl.float32), axis=0)
        entered, of_entered = _kept(entered, dys)
        dleft, of_left = _kept(dleft, dys)
        u, of_written = _kept(u, dys)
        of_q += _dot(dys, entered) * of_entered
        of_k += _dot(tl.trans(u), dleft) * (of_written * of_left)
        if beta is not None:
            z, of_error = _kept(tl.load(errors + of_u, mask=mask, other=0.0), dys)
            of_read -= _dot(tl.trans(z), entered) * (of_error * of_entered)

    later, earlier = i[:, None], i[None, :]
    ks = _rows(_row(k, k_batch, k_row, batch, first) + h // heads_of_key * k_head, row, k_row, n, here, N)
    qs = _rows(_row(q, q_batch, q_row, batch, first) + h // heads_of_key * q_head, row, q_row, n, here, N)
    sums += which * ((2 if EXACT else 1) * SIZE * N)
    coarse, fine = _sums(sums, i, n, N, SIZE, EXACT)
    decay = _since(coarse, fine, EXACT)
    of_q *= decay
    since = of_q * qs.to(tl.float32)
    if beta is not None:
        of_read *= decay
        of_rate += tl.sum(of_read * ks.to(tl.float32), axis=1)
        of_read *= rate[:, None]
        since += of_read * ks.to(tl.float32)
    of_k *= _until(coarse, fine, sums, n, N, SIZE, EXACT)
    until = of_k * ks.to(tl.float32)
    flow = _decay(tl.load(total + which * N + n, mask=n < N, other=0.0)) * flow + tl.sum(until, axis=0)
    since -= until
    of_k += of_read
    # by pairs, and with beta by pairs of keys
    of_pairs += which * (SIZE * SIZE)
    itself = tl.load(of_pairs + i * (SIZE + 1)).to(tl.float32)[:, None]
    of_q += itself * ks.to(tl.float32)
    of_k += itself * qs.to(tl.float32)
    # float32 takes the registers that 16 bits take, and no instructions to widen it
    wide_k, wide_q = ks.to(tl.float32), qs.to(tl.float32)
    pairs, scale = _kept(tl.load(of_pairs + later * SIZE + earlier), ks)
    pairs = pairs.to(tl.float32)
    if beta is not None:
        keys, scale_keys = _kept(tl.load(of_keys + which * (SIZE * SIZE) + later * SIZE + earlier), ks)
        keys = keys.to(tl.float32)
    for level in range(0, _LEVELS):
        decay = _to_middle(coarse, fine, sums, i, n, level, N, SIZE, EXACT)
        meeting = later >> level ^ earlier >> level == 1
        half = later >> level & 1
        second = half.to(tl.float32)
        mixed = _as(tl.where(half == 1, wide_q, wide_k) * decay, OPERAND)
        by_pairs = _dot(_as(tl.where(meeting, pairs, 0.0), OPERAND), mixed) * scale
        said = by_pairs * mixed.to(tl.float32)
        by_pairs *= decay
        of_q += by_pairs * second
        of_k += by_pairs * (1.0 - second)
        if beta is not None:
            right = _as(wide_k * decay, OPERAND)
            by_keys = _dot(_as(tl.where(meeting, keys, 0.0), OPERAND), right) * scale_keys
            said += by_keys * right.to(tl.float32)
            of_k += by_keys * decay
        since += said * (2.0 * second - 1.0)
    # of all digits: what lies behind a reset may be much larger than what is left before it
    of_decay = _summed(later <= earlier, since, True) + flow[None, :]
    tl.store(dq + at, _as(of_q, dq.dtype.element_ty), mask=inside)
    tl.store(dk + at, _as(of_k, dk.dtype.element_ty), mask=inside)
    tl.store(dg + at, _as(of_decay, dg.dtype.element_ty), mask=inside)
    if dbeta is not None:
        if block == 0:
            of_rate += tl.load(of_rates + which * SIZE + i)
        into = block * apart + (batch * length + first) * heads + h + row * heads
        tl.store(dbeta + into, _as(of_rate, dbeta.dtype.element_ty), mask=here)
