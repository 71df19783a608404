# mypy: allow-untyped-defs

"""Triton kernels of the delta rule, backward; chunks and names as in `triton_kernels`.

With the gradient of the state that leaves a chunk, dS', and of its outputs, dy,

    Z = Tᵀ (Pᵀ dy + K↑ dS'ᵀ),    dS = dS' decayed + dyᵀ Q↓ - (β Z)ᵀ K↓

where Z is the gradient of β (V - K↓ Sᵀ). That of P is dy Uᵀ and that of β tril(K K↓ᵀ, -1) is -Z Uᵀ, each where the
matrix is not 0. The gradient of a log-decay is the sum of what the decays of all spans over it say; no span that does
not reach over it is added and taken away again.
"""

import triton
import triton.language as tl

from mambaseq.ops.delta_rule.triton_kernels import (
    _CHANGING,
    _added,
    _as,
    _columns,
    _decay,
    _dot,
    _first,
    _kept,
    _made,
    _rows,
    _span,
)
from mambaseq.ops.ssd.triton_kernels import _chunk, _narrow, _row


@triton.jit(do_not_specialize=_CHANGING)
def walk_back(
    q, q_batch, q_row, q_head, k, k_batch, k_row, k_head, up, dy, dy_batch, dy_row, dy_head,
    beta, b_batch, b_row, b_head, total, scores, inverse, table, bounds, sequences, chunks, chunks_of_row, length,
    start, end, left, errors, heads, heads_of_key,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, PARTS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """dS' of each chunk (`left`), and Z as (chunks, heads, d_value, SIZE) (`errors`); see `walk`. `start` and `end` are
    the gradients of the final and of the initial states, parts are counted from the last. With a decay a channel q is
    Q↓ there."""
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
    group = h // heads_of_key
    state = _first(start, line, p, n, at, inside, P, STATE, MAPS)
    begin, n_chunks = _span(bounds, s % sequences, sequences, chunks_of_row, PARTS - 1 - s // sequences, PARTS)
    for number in range(0, n_chunks):
        c = begin + n_chunks - 1 - number
        batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
        here = i < count
        which = c.to(tl.int64) * heads + h
        if up is None:
            qs = _rows(_row(q, q_batch, q_row, batch, first) + group * q_head, row, q_row, n, here, N)
            ups = _rows(_row(k, k_batch, k_row, batch, first) + group * k_head, row, k_row, n, here, N)
            ks = ups
            sums = tl.load(total + which * SIZE + i)
            whole = tl.load(total + which * SIZE + SIZE - 1)
            decay = _decay(sums)[None, :]
        else:
            qs = _made(q, which, i, n, N, SIZE)
            ups = _made(up, which, i, n, N, SIZE)
            whole = tl.load(total + which * N + n, mask=n < N, other=0.0)[None, :]
        dys = _columns(_row(dy, dy_batch, dy_row, batch, first) + h * dy_head, row, dy_row, p, here, P)
        pair = tl.load(scores + which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :])
        if not MAPS:
            tl.store(left + which * STATE + at, _as(state, left.dtype.element_ty), mask=inside)
        pair, power = _kept(pair, ups)
        z = _dot(dys, pair) * power
        narrow, power = _narrow(state, ups)
        by_state = _dot(narrow, tl.trans(ups)) * power
        z += by_state * _decay(whole - sums)[None, :] if up is None else by_state
        state *= _decay(whole)
        if beta is not None:
            T = tl.load(inverse + which * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :])
            rate = tl.load(_row(beta, b_batch, b_row, batch, first) + h * b_head + row * b_row, mask=here, other=0.0)
            narrow, power = _narrow(z, ups)
            T, more = _kept(T, ups)
            z = _dot(narrow, T) * (power * more)
            erased = z * -rate.to(tl.float32)[None, :]
            if up is None:
                state = _added(state, erased * decay, ks)
            else:
                state = _added(state, erased, _made(k, which, i, n, N, SIZE))
        if not MAPS:
            tl.store(
                errors + which * (P * SIZE) + p[:, None] * SIZE + i[None, :], _as(z, errors.dtype.element_ty),
                mask=(p < P)[:, None] & (i < SIZE)[None, :],
            )  # fmt: skip
        if up is None:
            state = _added(state, dys.to(tl.float32) * decay, qs)
        else:
            state += _dot(dys, qs)
    if end is not None:
        tl.store(end + line.to(tl.int64) * STATE + at, state, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def gradients(
    q, q_batch, q_row, q_head, k, k_batch, k_row, k_head, v, v_batch, v_row, v_head, dy, dy_batch, dy_row, dy_head,
    beta, b_batch, b_row, b_head, total, states, left, written, errors, table, chunks, chunks_of_row, length,
    dq, dk, dv, dg, dbeta, apart, heads, heads_of_key,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """dq and dk (batch, length, heads, d_key) and dv, contiguous; a program takes BLOCK_N columns of d_key of a head of
    a chunk. dg and dbeta are sums over the blocks of (blocks, batch, length, heads), which lie `apart`."""
    OPERAND: tl.constexpr = v.dtype.element_ty
    c = tl.program_id(0)
    h = tl.program_id(1)
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(2) if BLOCKS > 1 else 0
    i = tl.arange(0, SIZE)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -i if REVERSE else i
    here = i < count
    which = c.to(tl.int64) * heads + h
    q = _row(q, q_batch, q_row, batch, first) + h // heads_of_key * q_head
    k = _row(k, k_batch, k_row, batch, first) + h // heads_of_key * k_head
    v = _row(v, v_batch, v_row, batch, first) + h * v_head
    dy = _row(dy, dy_batch, dy_row, batch, first) + h * dy_head
    dv += (batch * length + first) * (heads * P) + h * P
    at = (batch * length + first) * (heads * N) + h * N + row[:, None] * (heads * N) + n[None, :]
    inside = here[:, None] & (n < N)[None, :]
    sums = tl.load(total + which * SIZE + i)
    whole = tl.load(total + which * SIZE + SIZE - 1)
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
        z = tl.load(errors + of_u, mask=mask, other=0.0)
        flow += tl.sum(entered.to(tl.float32) * dleft.to(tl.float32), axis=0)
        wide = tl.trans(z).to(tl.float32)
        if block == 0:
            if beta is not None:
                of_rate += tl.sum(wide * _rows(v, row, v_row, p, here, P).to(tl.float32), axis=1)
                wide *= rate[:, None]
            tl.store(
                dv + row[:, None] * (heads * P) + p[None, :], _as(wide, OPERAND), mask=here[:, None] & (p < P)[None, :]
            )
        entered, of_entered = _kept(entered, dys)
        dleft, of_left = _kept(dleft, dys)
        u, of_u = _kept(u, dys)
        z, of_z = _kept(z, dys)
        of_q += _dot(dys, entered) * of_entered
        of_k += _dot(tl.trans(u), dleft) * (of_u * of_left)
        if beta is not None:
            of_read += _dot(tl.trans(z), entered) * (of_z * of_entered)

    ks = _rows(k, row, k_row, n, here, N)
    qs = _rows(q, row, q_row, n, here, N)
    grown = _decay(sums)[:, None]
    of_q *= grown
    of_k *= _decay(whole - sums)[:, None]
    since = tl.sum(of_q * qs.to(tl.float32), axis=1)
    until = tl.sum(of_k * ks.to(tl.float32), axis=1)
    if beta is not None:
        of_read *= -grown
        read = tl.sum(of_read * ks.to(tl.float32), axis=1)
        of_rate += read
        since += rate * read
        of_k += rate[:, None] * of_read

    # by pairs: rows are the later positions, in the second of each two the earlier ones
    later = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    earlier = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    later_written = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    earlier_written = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        dys = _rows(dy, row, dy_row, p, here, P)
        of_u = which * (P * SIZE) + p[:, None] * SIZE + i[None, :]
        mask = (p < P)[:, None] & (i < SIZE)[None, :]  # all: zeros stand beyond `count`
        u, power = _kept(tl.load(written + of_u, mask=mask, other=0.0), dys)
        later += _dot(dys, u) * power
        earlier += _dot(tl.trans(u), tl.trans(dys)) * power
        if beta is not None:
            z, more = _kept(tl.load(errors + of_u, mask=mask, other=0.0), dys)
            later_written += _dot(tl.trans(z), u) * (power * more)
            earlier_written += _dot(tl.trans(u), z) * (power * more)
    exponent = (sums[:, None] - sums[None, :]).to(tl.float32)
    decays = tl.exp2(tl.where(i[:, None] >= i[None, :], exponent, float("-inf")))
    later *= decays
    of_q = _added(of_q, later, ks)
    before = i[:, None] > i[None, :]
    of_decay = tl.cumsum(since, axis=0, reverse=True) + tl.sum(tl.where(before, until[None, :], 0.0), axis=1)
    of_decay += _decay(whole) * tl.sum(flow)
    if beta is not None:
        later_written *= tl.where(before, -decays, 0.0)
        of_k = _added(of_k, later_written * rate[:, None], ks)
    if block == 0:
        products = tl.zeros([SIZE, SIZE], dtype=tl.float32)
        overlaps = tl.zeros([SIZE, SIZE], dtype=tl.float32)
        for n0 in tl.static_range(0, N, BLOCK_N):
            m = n0 + tl.arange(0, BLOCK_N)
            right = tl.trans(_rows(k, row, k_row, m, here, N))
            products += _dot(_rows(q, row, q_row, m, here, N), right)
            if beta is not None:
                overlaps += _dot(_rows(k, row, k_row, m, here, N), right)
        said = later * products
        if beta is not None:
            corrected = later_written * overlaps
            of_rate += tl.sum(corrected, axis=1)
            said += corrected * rate[:, None]
        # of spans that end at a position or beyond, those from before it
        of_decay += tl.sum(tl.where(before, tl.cumsum(said, axis=0, reverse=True), 0.0), axis=1)
    decays = tl.exp2(tl.where(i[:, None] <= i[None, :], -exponent, float("-inf")))
    of_k = _added(of_k, earlier * decays, qs)
    if beta is not None:
        decays = tl.where(i[:, None] < i[None, :], -decays, 0.0)
        of_k = _added(of_k, earlier_written * decays * rate[None, :], ks)
    tl.store(dq + at, _as(of_q, dq.dtype.element_ty), mask=inside)
    tl.store(dk + at, _as(of_k, dk.dtype.element_ty), mask=inside)
    into = block * apart + (batch * length + first) * heads + h + row * heads
    if dg is not None:
        tl.store(dg + into, _as(of_decay, dg.dtype.element_ty), mask=here)
    if dbeta is not None:
        tl.store(dbeta + into, _as(of_rate, dbeta.dtype.element_ty), mask=here)
