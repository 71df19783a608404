# mypy: allow-untyped-defs
# ruff: noqa: SIM102 (what is known to the compiler is decided apart from what is not)
"""Triton kernels of the state-space dual: time is cut into chunks of SIZE steps that are computed as matrices.

Steps are counted in the direction in which time runs. Chunk c begins in row `first` of its batch and goes on by
`count` rows, downwards if REVERSE; those that a packed row is cut into never hold two sequences, and are told of in a
table (4, chunks) int32: first row, count, sequence, and 1 where a sequence begins + 2 where it ends. What lies beyond
`count` counts as a step of length 0, which changes nothing.

`decay` and `dt` (chunks, heads, SIZE) are what `steps` makes: the sums of dt A log2(e) up to each step of the chunk,
and dt. States are (chunks, heads, head_dim, d_state). RANK neighbouring rows may be one step, which sees all of them;
where `own` (chunks, heads, SIZE) is given, a step sees what it writes itself with this weight in the place of dt.

Operands of matrix products are of the dtype of x, everything else is float32. An operand that is not given but
computed is rounded once; where that is to float16, a tile is scaled by a power of two before, so that it fits.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import INTERPRETED, added_dot, softplus

_CHANGING = ["chunks", "chunks_of_row", "length", "segments", "chunks_of_segment", "n_parts"]


@triton.jit
def _dot(a, b):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """float32 to the nearest of `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:  # which would cut off the digits
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _narrow(value, like):
    """value in the dtype of `like`, and what it is to be multiplied by."""
    if like.dtype == tl.float16:
        most = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
        power = tl.exp2(tl.ceil(tl.log2(tl.maximum(most, 1e-30))))
        return (value / power).to(tl.float16), power
    else:
        return _rounded(value, like.dtype), 1.0


@triton.jit
def _chunk(table, c, chunks, chunks_of_row, length, SIZE: tl.constexpr, REVERSE: tl.constexpr):
    """Batch, first row and count of chunk c."""
    if table is not None:
        batch = c.to(tl.int64) * 0
        first = tl.load(table + c)
        count = tl.load(table + chunks + c)
    else:
        batch = (c // chunks_of_row).to(tl.int64)
        begin = (c % chunks_of_row) * SIZE
        count = tl.minimum(length - begin, SIZE)
        first = length - 1 - begin if REVERSE else begin
    return batch, first.to(tl.int64), count


@triton.jit
def _row(pointer, s_batch, s_row, batch, first):
    return pointer + batch * s_batch + first * s_row


@triton.jit(do_not_specialize=_CHANGING)
def steps(
    raw, s_batch, s_row, s_head, A, dt_bias, table, chunks, chunks_of_row, length, decay, dt, heads,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """decay and dt; a program takes HEADS heads of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    raw = _row(raw, s_batch, s_row, batch, first)
    row = -q if REVERSE else q
    inside = (q < count)[:, None] & (h < heads)[None, :]
    value = tl.load(raw + row[:, None] * s_row + h[None, :] * s_head, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        value += tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        value = softplus(value)
    value = tl.where(inside, value, 0.0)
    rate = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float32) * 1.4426950408889634
    at = (c.to(tl.int64) * heads + h)[None, :] * SIZE + q[:, None]
    known = (h < heads)[None, :] & (q < SIZE)[:, None]
    tl.store(dt + at, value, mask=known)
    tl.store(decay + at, tl.cumsum(value * rate[None, :], axis=0), mask=known)


@triton.jit(do_not_specialize=_CHANGING)
def walk(
    x, x_batch, x_row, x_head, m, m_batch, m_row, m_group, decay, dt, table, chunks, chunks_of_row, length,
    start, end, states, other, flow, sums, factors, heads, heads_of_group, segments, chunks_of_segment,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """States before each chunk; a program takes BLOCK_P x BLOCK_N of a head's and walks over a segment of the chunks.

    Forward: x and m are x and B; `start` and `end` are the initial and final states. BACKWARD, time runs to the
    beginning: x and m are the gradient of y and C, `start` and `end` the gradients of the final and initial states,
    `states` the gradients of the state that leaves each chunk; `other`, if given, are the states that enter chunks, and
    `flow` (chunks, heads, blocks) gets what their product says of the decay of the whole chunk.

    SUMMARY: only what a segment adds to the state (`sums`), and by which factor it keeps what was there (`factors`),
    as if nothing came before. Otherwise those of earlier segments are read, if there are several.
    """
    tile = tl.program_id(0)
    segment = tl.program_id(1)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = blocks_n * ((P + BLOCK_P - 1) // BLOCK_P)
    block = tile % blocks
    line = tile // blocks  # row of the batch and head
    h = line % heads
    batch = line // heads
    p = (block // blocks_n) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (block % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SIZE)
    inside = (p < P)[:, None] & (n < N)[None, :]
    at = p[:, None] * N + n[None, :]
    STATE: tl.constexpr = P * N

    state = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    kept = tl.full([], 1.0, tl.float32)
    if table is None:
        if start is not None:
            if segment == 0:
                state = tl.load(start + line.to(tl.int64) * STATE + at, mask=inside, other=0.0).to(tl.float32)
    if not SUMMARY:
        if sums is not None:
            for earlier in range(0, segment):
                which = line.to(tl.int64) * segments + earlier
                factor = tl.load(factors + which * blocks + block)
                state = state * factor + tl.load(sums + which * STATE + at, mask=inside, other=0.0)

    begin = segment * chunks_of_segment
    for i in range(begin, tl.minimum(begin + chunks_of_segment, chunks_of_row)):
        c = batch * chunks_of_row + (chunks_of_row - 1 - i if BACKWARD else i)
        row_of_batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
        if table is not None:
            sequence = tl.load(table + 2 * chunks + c).to(tl.int64)
            bounds = tl.load(table + 3 * chunks + c)
            starts = (bounds >= 2) if BACKWARD else (bounds % 2 == 1)
            ends = (bounds % 2 == 1) if BACKWARD else (bounds >= 2)
            kept = tl.where(starts, 0.0, kept)
            if starts:
                if start is not None:
                    state = tl.load(start + (sequence * heads + h) * STATE + at, mask=inside, other=0.0).to(tl.float32)
                else:
                    state = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        which = c.to(tl.int64) * heads + h
        sums_to = tl.load(decay + which * SIZE + k)
        whole = tl.load(decay + which * SIZE + SIZE - 1)
        if not SUMMARY:
            tl.store(states + which * STATE + at, _rounded(state, states.dtype.element_ty), mask=inside)
            if other is not None:
                entered = tl.load(other + which * STATE + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(flow + which * blocks + block, tl.exp2(whole) * tl.sum(entered * state))
        if BACKWARD:
            weight = tl.exp2(sums_to)
        else:
            weight = tl.exp2(whole - sums_to) * tl.load(dt + which * SIZE + k)
        row = -k if REVERSE else k
        here = k < count
        xs = tl.load(
            _row(x, x_batch, x_row, row_of_batch, first) + h * x_head + row[None, :] * x_row + p[:, None],
            mask=here[None, :] & (p < P)[:, None],
            other=0.0,
        )
        ms = tl.load(
            _row(m, m_batch, m_row, row_of_batch, first) + (h // heads_of_group) * m_group + row[:, None] * m_row
            + n[None, :],
            mask=here[:, None] & (n < N)[None, :],
            other=0.0,
        )  # fmt: skip
        weighted, power = _narrow(xs.to(tl.float32) * weight[None, :], xs)
        if xs.dtype == tl.float16:
            state = state * tl.exp2(whole) + _dot(weighted, ms) * power
        else:
            state = added_dot(weighted, ms, state * tl.exp2(whole))
        kept *= tl.exp2(whole)
        if table is not None:
            if not SUMMARY:
                if end is not None:
                    if ends:
                        tl.store(end + (sequence * heads + h) * STATE + at, state, mask=inside)
    if SUMMARY:
        which = line.to(tl.int64) * segments + segment
        tl.store(sums + which * STATE + at, state, mask=inside)
        tl.store(factors + which * blocks + block, kept)
    else:
        if table is None:
            if end is not None:
                if segment == segments - 1:
                    tl.store(end + line.to(tl.int64) * STATE + at, state, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def output(
    x, x_batch, x_row, x_head, B, B_batch, B_row, B_group, C, C_batch, C_row, C_group, decay, dt, own, D, states,
    table, chunks, chunks_of_row, length, y, heads, heads_of_group,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """y (batch, length, heads, head_dim), contiguous; a program takes HEADS heads of a group, which share their B and
    C, of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS
    g = h // heads_of_group
    k = tl.arange(0, SIZE)
    at = k // RANK
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -k if REVERSE else k
    here = k < count
    known = here[:, None] & (p < P)[None, :]
    Cs = tl.load(
        _row(C, C_batch, C_row, batch, first) + g * C_group + row[:, None] * C_row + n[None, :],
        mask=here[:, None] & (n < N)[None, :],
        other=0.0,
    )
    Bs = tl.load(
        _row(B, B_batch, B_row, batch, first) + g * B_group + row[None, :] * B_row + n[:, None],
        mask=here[None, :] & (n < N)[:, None],
        other=0.0,
    )
    scores = _dot(Cs, Bs)
    x = _row(x, x_batch, x_row, batch, first) + row[:, None] * x_row + p[None, :]
    y = y + (batch * length + first) * heads * P + row[:, None] * (heads * P) + p[None, :]
    for head in range(h, h + HEADS):
        which = c.to(tl.int64) * heads + head
        sums_to = tl.load(decay + which * SIZE + k)
        step = tl.load(dt + which * SIZE + k)
        entered = tl.load(
            states + which * (P * N) + p[None, :] * N + n[:, None],
            mask=(n < N)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        xs = tl.load(x + head * x_head, mask=known, other=0.0)
        narrow, power = _narrow(entered.to(tl.float32), xs)
        total = _dot(Cs, narrow) * (tl.exp2(sums_to) * power)[:, None]
        exponent = tl.where(at[:, None] >= at[None, :], sums_to[:, None] - sums_to[None, :], float("-inf"))
        weight = step[None, :]
        if own is not None:
            itself = tl.load(own + which * SIZE + k)
            weight = tl.where(at[:, None] == at[None, :], itself[None, :], weight)
        matrix, power = _narrow(scores * tl.exp2(exponent) * weight, xs)
        if xs.dtype == tl.float16:
            total += _dot(matrix, xs) * power
        else:
            total = added_dot(matrix, xs, total)
        if D is not None:
            total += tl.load(D + head).to(tl.float32) * xs.to(tl.float32)
        tl.store(y + head * P, _rounded(total, y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=_CHANGING)
def inner_backward(
    x, x_batch, x_row, x_head, B, B_batch, B_row, B_group, C, C_batch, C_row, C_group, decay, dt, own, D,
    dy, dy_batch, dy_row, dy_head, dstates, table, chunks, chunks_of_row, length,
    dx, dx_batch, dx_row, dx_head, dB, dC, direct, ddecay, down, shares, heads, heads_of_group, groups,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """dx; what pairs of a chunk's own steps and the states that leave it say of dt and of the decays; of dB and dC
    what the pairs say, (parts, chunks, groups, SIZE, d_state) float32.

    Matrices are (later step k of the gradient across, earlier step q down): rows are those of x and B, columns those
    of dy and C. `direct` (chunks, heads, SIZE) is the gradient of dt as a factor of x, `ddecay` that of `decay` in
    natural logarithms, `shares` (3, chunks, heads) has that of D in its first part.
    """
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS
    g = h // heads_of_group
    k = tl.arange(0, SIZE)
    at = k // RANK
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -k if REVERSE else k
    here = k < count
    inside = here[:, None] & (n < N)[None, :]
    known = here[:, None] & (p < P)[None, :]
    B = _row(B, B_batch, B_row, batch, first) + g * B_group + row[:, None] * B_row + n[None, :]
    C = _row(C, C_batch, C_row, batch, first) + g * C_group + row[:, None] * C_row + n[None, :]
    Bs = tl.load(B, mask=inside, other=0.0)
    scores = _dot(Bs, tl.trans(tl.load(C, mask=inside, other=0.0)))
    all_weights = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    x = _row(x, x_batch, x_row, batch, first) + row[:, None] * x_row + p[None, :]
    dy = _row(dy, dy_batch, dy_row, batch, first) + row[:, None] * dy_row + p[None, :]
    dx = _row(dx, dx_batch, dx_row, batch, first) + row[:, None] * dx_row + p[None, :]
    for head in range(h, h + HEADS):
        which = c.to(tl.int64) * heads + head
        sums_to = tl.load(decay + which * SIZE + k)
        whole = tl.load(decay + which * SIZE + SIZE - 1)
        step = tl.load(dt + which * SIZE + k)
        xs = tl.load(x + head * x_head, mask=known, other=0.0)
        dys = tl.load(dy + head * dy_head, mask=known, other=0.0)
        left = tl.load(
            dstates + which * (P * N) + p[None, :] * N + n[:, None],
            mask=(n < N)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        products = _dot(xs, tl.trans(dys))
        exponent = tl.where(at[:, None] <= at[None, :], sums_to[None, :] - sums_to[:, None], float("-inf"))
        between = tl.exp2(exponent)
        matrix = scores * between
        products *= between
        weight = step[:, None]
        if own is not None:
            itself = tl.load(own + which * SIZE + k)
            weight = tl.where(at[:, None] == at[None, :], itself[:, None], weight)
            matrix *= weight
        all_weights += products * weight
        products *= scores
        same = tl.sum(tl.where(at[:, None] == at[None, :], products, 0.0), axis=1)
        # without those of a step with itself, which no decay is part of
        products = tl.where(at[:, None] == at[None, :], 0.0, products)
        of_pairs = tl.sum(products, axis=1)
        of_rows = tl.sum(products * step[:, None], axis=0)
        narrow, power = _narrow(left.to(tl.float32), xs)
        du = _dot(Bs, narrow) * (tl.exp2(whole - sums_to) * power)[:, None]
        of_state = tl.sum(du * xs.to(tl.float32), axis=1)
        if own is not None:
            du *= step[:, None]
        narrow, power = _narrow(matrix, xs)
        if xs.dtype == tl.float16:
            du += _dot(narrow, dys) * power
        else:
            du = added_dot(narrow, dys, du)
        if own is None:
            du *= step[:, None]
        if D is not None:
            wide = dys.to(tl.float32)
            du += tl.load(D + head).to(tl.float32) * wide
            tl.store(shares + which, tl.sum(wide * xs.to(tl.float32)))
        tl.store(dx + head * dx_head, _rounded(du, dx.dtype.element_ty), mask=known)
        of_decay = of_rows - step * (of_pairs + of_state)
        of_decay += tl.where(k == SIZE - 1, tl.sum(step * of_state), 0.0)
        if own is not None:
            tl.store(down + which * SIZE + k, same)
            tl.store(direct + which * SIZE + k, of_pairs + of_state)
        else:
            tl.store(direct + which * SIZE + k, same + of_pairs + of_state)
        tl.store(ddecay + which * SIZE + k, of_decay)
    narrow, power = _narrow(all_weights, Bs)
    part = (h % heads_of_group) // HEADS
    to = ((part.to(tl.int64) * chunks + c) * groups + g) * (SIZE * N) + k[:, None] * N + n[None, :]
    valid = (k < SIZE)[:, None] & (n < N)[None, :]
    tl.store(dB + to, _dot(narrow, tl.load(C, mask=inside, other=0.0)) * power, mask=valid)
    tl.store(dC + to, _dot(tl.trans(narrow), Bs) * power, mask=valid)


@triton.jit(do_not_specialize=_CHANGING)
def outer_backward(
    x, x_batch, x_row, x_head, m, m_batch, m_row, m_group, decay, dt, states, table, chunks, chunks_of_row, length,
    parts, n_parts, dm, dm_batch, dm_row, dm_group, ddecay, heads, heads_of_group, groups,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr, OF_C: tl.constexpr,
):  # fmt: skip
    """dB or, if OF_C, dC: what `inner_backward` found of it, and what the states say, summed over the group's heads.

    OF_C: x is the gradient of y, m is C, `states` those that enter chunks, and `ddecay` (blocks, chunks, heads, SIZE)
    gets what they say of the decays. Otherwise x is x, and `states` the gradients of those that leave. A program takes
    BLOCK_N columns of a group.
    """
    c = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(1) % blocks_n
    g = tl.program_id(1) // blocks_n
    k = tl.arange(0, SIZE)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -k if REVERSE else k
    here = k < count
    inside = here[:, None] & (n < N)[None, :]
    known = here[:, None] & (p < P)[None, :]
    total = tl.zeros([SIZE, BLOCK_N], dtype=tl.float32)
    of_states = (p < P)[:, None] & (n < N)[None, :]
    x = _row(x, x_batch, x_row, batch, first) + row[:, None] * x_row + p[None, :]
    if OF_C:
        ms = tl.load(
            _row(m, m_batch, m_row, batch, first) + g * m_group + row[:, None] * m_row + n[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
    for head in range(g * heads_of_group, (g + 1) * heads_of_group):
        which = c.to(tl.int64) * heads + head
        sums_to = tl.load(decay + which * SIZE + k)
        xs = tl.load(x + head * x_head, mask=known, other=0.0)
        state = tl.load(states + which * (P * N) + p[:, None] * N + n[None, :], mask=of_states, other=0.0)
        narrow, power = _narrow(state.to(tl.float32), xs)
        product = _dot(xs, narrow)
        if OF_C:
            weight = tl.exp2(sums_to) * power
            found = weight * tl.sum(product * ms, axis=1)
            tl.store(ddecay + ((block.to(tl.int64) * chunks + c) * heads + head) * SIZE + k, found)
        else:
            whole = tl.load(decay + which * SIZE + SIZE - 1)
            weight = tl.exp2(whole - sums_to) * tl.load(dt + which * SIZE + k) * power
        total += product * weight[:, None]
    for part in range(0, n_parts):
        at = ((part * tl.full([1, 1], 1, tl.int64) * chunks + c) * groups + g) * (SIZE * N)
        total += tl.load(parts + at + k[:, None] * N + n[None, :], mask=inside, other=0.0)
    dm = _row(dm, dm_batch, dm_row, batch, first) + g * dm_group
    tl.store(dm + row[:, None] * dm_row + n[None, :], _rounded(total, dm.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def steps_backward(
    raw, s_batch, s_row, s_head, A, dt_bias, dt, table, chunks, chunks_of_row, length,
    direct, inner, outer, flow, draw, draw_batch, draw_row, draw_head, shares, heads,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
    OUTER: tl.constexpr, FLOW: tl.constexpr,
):  # fmt: skip
    """The gradient of dt as it was given `(batch, length, heads)`; `shares` (3, chunks, heads) get those of
    A and dt_bias in its second and third part. OUTER, FLOW: how many blocks `outer` and `flow` have."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, REVERSE)
    row = -q if REVERSE else q
    valid = h < heads
    every = valid[None, :] & (q < SIZE)[:, None]
    which = c.to(tl.int64) * heads + h
    at = which[None, :] * SIZE + q[:, None]
    found = tl.load(inner + at, mask=every, other=0.0)
    apart = chunks.to(tl.int64) * heads * SIZE
    for block in tl.static_range(OUTER):
        found += tl.load(outer + block * apart + at, mask=every, other=0.0)
    whole = tl.zeros([HEADS], dtype=tl.float32)
    for block in tl.static_range(FLOW):
        whole += tl.load(flow + which * FLOW + block, mask=valid, other=0.0)
    # a step's decay is part of all sums from it on
    found = tl.cumsum(found, axis=0, reverse=True) + whole[None, :]
    step = tl.load(dt + at, mask=every, other=0.0)
    rate = tl.load(A + h, mask=valid, other=0.0).to(tl.float32)
    gradient = tl.load(direct + at, mask=every, other=0.0) + rate[None, :] * found
    inside = (q < count)[:, None] & valid[None, :]
    if SOFTPLUS:
        raw = _row(raw, s_batch, s_row, batch, first)
        value = tl.load(raw + row[:, None] * s_row + h[None, :] * s_head, mask=inside, other=0.0).to(tl.float32)
        if dt_bias is not None:
            value += tl.load(dt_bias + h, mask=valid, other=0.0).to(tl.float32)[None, :]
        gradient *= tl.sigmoid(value)
    gradient = tl.where(inside, gradient, 0.0)
    draw = _row(draw, draw_batch, draw_row, batch, first)
    tl.store(
        draw + row[:, None] * draw_row + h[None, :] * draw_head, _rounded(gradient, draw.dtype.element_ty), mask=inside
    )
    share = shares + chunks.to(tl.int64) * heads + which
    tl.store(share, tl.sum(step * found, axis=0), mask=valid)
    tl.store(share + chunks.to(tl.int64) * heads, tl.sum(gradient, axis=0), mask=valid)
