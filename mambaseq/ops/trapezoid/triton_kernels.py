# mypy: allow-untyped-defs
"""What Mamba-3's recurrence has of its own beside the kernels of the state-space dual (`ops/ssd/triton_kernels.py`):
its steps and their gradients.

dt, A and trap (batch, positions, heads) float32, with strides. Chunks are of SIZE rows, RANK of which are a position;
its log-decay, at least LEAST, stands at the first. What a position writes is seen by itself with the weight
trap dt, and later with what the next one of its sequence, if there is one, adds to that: (1 - trap) dt of its own.
"""

import triton
import triton.language as tl

from mambaseq.ops.ssd.triton_kernels import _chunk

_CHANGING = ["chunks", "chunks_of_row", "length"]


@triton.jit
def _bounds(table, c, chunks, chunks_of_row, length, first, count):
    """Whether a sequence begins and whether one ends with chunk c."""
    if table is not None:
        bounds = tl.load(table + 3 * chunks + c)
        return bounds % 2 == 1, bounds >= 2
    else:
        return c % chunks_of_row == 0, first + count >= length


@triton.jit
def _given(m, m_batch, m_row, m_head, batch, position, h, mask):
    """m at positions and heads (..., HEADS)."""
    at = batch * m_batch + position[:, None] * m_row + (h * m_head)[None, :]
    return tl.load(m + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=_CHANGING)
def steps(
    dt, dt_batch, dt_row, dt_head, A, A_batch, A_row, A_head, trap, trap_batch, trap_row, trap_head,
    table, chunks, chunks_of_row, length, decay, weight, own, heads,
    LEAST: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """decay, weight and own (chunks, heads, SIZE); a program takes HEADS heads of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, False)
    _, ends = _bounds(table, c, chunks, chunks_of_row, length, first, count)
    valid = (h < heads)[None, :]
    inside = (q < count)[:, None] & valid
    position = first // RANK + q // RANK
    step = _given(dt, dt_batch, dt_row, dt_head, batch, position, h, inside)
    rate = _given(A, A_batch, A_row, A_head, batch, position, h, inside & (q % RANK == 0)[:, None])
    at_once = step * _given(trap, trap_batch, trap_row, trap_head, batch, position, h, inside)
    last = (q // RANK + 1) * RANK >= count
    followed = inside & ((last == 0) | (ends == 0))[:, None]
    share = _given(trap, trap_batch, trap_row, trap_head, batch, position + 1, h, followed)
    later = _given(dt, dt_batch, dt_row, dt_head, batch, position + 1, h, followed) * (1 - share)
    to = (c.to(tl.int64) * heads + h)[None, :] * SIZE + q[:, None]
    known = valid & (q < SIZE)[:, None]
    rate *= step
    rate = tl.where(rate < LEAST, LEAST, rate) * 1.4426950408889634  # NaN stays
    tl.store(decay + to, tl.cumsum(rate, axis=0), mask=known)
    tl.store(weight + to, at_once + later, mask=known)
    tl.store(own + to, at_once, mask=known)


@triton.jit
def _of_positions(value, SIZE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr):
    """Sums over a position's rows (SIZE // RANK, HEADS)."""
    if RANK > 1:
        value = tl.sum(tl.reshape(value, [SIZE // RANK, RANK, HEADS]), axis=1)
    return value


@triton.jit(do_not_specialize=_CHANGING)
def steps_backward(
    dt, dt_batch, dt_row, dt_head, A, A_batch, A_row, A_head, trap, trap_batch, trap_row, trap_head,
    table, chunks, chunks_of_row, length, direct, down, inner, outer, flow, ddt, dA, dtrap, heads,
    LEAST: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, OUTER: tl.constexpr, FLOW: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """The gradients of dt, A and trap, contiguous. direct, down: those of `weight` and `own`. OUTER, FLOW: how many
    blocks `outer` and `flow` have."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, False)
    starts, _ = _bounds(table, c, chunks, chunks_of_row, length, first, count)
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
    of_decay = _of_positions(tl.where((q % RANK == 0)[:, None], found, 0.0), SIZE, HEADS, RANK)
    of_weight = tl.load(direct + at, mask=every, other=0.0)
    of_own = _of_positions(of_weight + tl.load(down + at, mask=every, other=0.0), SIZE, HEADS, RANK)
    # of what the position before has of this one; that of a chunk's first is the last of the chunk before
    j = tl.arange(0, SIZE // RANK)
    before = tl.where(j == 0, SIZE - heads.to(tl.int64) * SIZE, j * RANK) - RANK
    has_one = valid[None, :] & ((j > 0) | (starts == 0))[:, None]
    of_old = tl.zeros([SIZE // RANK, HEADS], dtype=tl.float32)
    for r in tl.static_range(RANK):
        of_old += tl.load(direct + which[None, :] * SIZE + (before + r)[:, None], mask=has_one, other=0.0)
    inside = (j * RANK < count)[:, None] & valid[None, :]
    position = first // RANK + j
    step = _given(dt, dt_batch, dt_row, dt_head, batch, position, h, inside)
    rate = _given(A, A_batch, A_row, A_head, batch, position, h, inside)
    share = _given(trap, trap_batch, trap_row, trap_head, batch, position, h, inside)
    of_decay = tl.where(step * rate >= LEAST, of_decay, 0.0)
    to = (batch * (length // RANK) + position)[:, None] * heads + h[None, :]
    tl.store(ddt + to, share * of_own + (1 - share) * of_old + rate * of_decay, mask=inside)
    tl.store(dA + to, step * of_decay, mask=inside)
    tl.store(dtrap + to, step * (of_own - of_old), mask=inside)


@triton.jit
def _states(m, n, D_STATE: tl.constexpr):
    """Those n from m on, (1, ...) float32."""
    return tl.load(m + n, mask=n < D_STATE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def update(
    state, x, x_row, last_x, last_x_row, B, B_row, C, C_row, last_B, last_B_row,
    dt, dt_row, A, A_row, trap, trap_row, y, heads, head_dim,
    D_STATE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One step of CHANNELS channels of one row's head, of one input. Of a row, all heads and channels are side by
    side."""
    blocks = tl.cdiv(head_dim, CHANNELS)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row = line // heads
    h = line % heads
    p = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    real = p < head_dim
    known = n < D_STATE
    tile = real[:, None] & known[None, :]
    step = tl.load(dt + row * dt_row + h).to(tl.float32)
    decay = tl.exp(step * tl.load(A + row * A_row + h).to(tl.float32))
    share = tl.load(trap + row * trap_row + h).to(tl.float32)
    now = share * step
    old = (1 - share) * step * decay
    place = state + (line * head_dim + p)[:, None] * D_STATE + n[None, :]
    new = decay * tl.load(place, mask=tile, other=0.0).to(tl.float32)
    before = old * tl.load(last_x + row * last_x_row + h * head_dim + p, mask=real, other=0.0).to(tl.float32)
    u = now * tl.load(x + row * x_row + h * head_dim + p, mask=real, other=0.0).to(tl.float32)
    last = _states(last_B + row * last_B_row + h * D_STATE, n, D_STATE)
    new = tl.fma(u[:, None], _states(B + row * B_row + h * D_STATE, n, D_STATE), tl.fma(before[:, None], last, new))
    tl.debug_barrier()  # all have loaded, whichever threads store
    tl.store(place, new, mask=tile)
    out = tl.sum(new * _states(C + row * C_row + h * D_STATE, n, D_STATE), axis=1)
    tl.store(y + line * head_dim + p, out, mask=real)


@triton.jit
def update_several(
    state, x, x_row, last_x, last_x_row, B, B_row, C, C_row, last_B, last_B_row,
    dt, dt_row, A, A_row, trap, trap_row, y, heads,
    HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The same of several inputs a head, by two halves of HALF states: what is read of them is added up within threads,
    and half as many sums go on between threads."""
    blocks: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row = line // heads
    h = line % heads
    p = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, HALF)
    other = n + HALF
    real = p < HEAD_DIM
    place = state + (line * HEAD_DIM + p)[:, None] * D_STATE + n[None, :]
    here = real[:, None] & (n < D_STATE)[None, :]
    there = real[:, None] & (other < D_STATE)[None, :]
    one = tl.load(place, mask=here, other=0.0).to(tl.float32)
    two = tl.load(place + HALF, mask=there, other=0.0).to(tl.float32)
    step = tl.load(dt + row * dt_row + h).to(tl.float32)
    decay = tl.exp(step * tl.load(A + row * A_row + h).to(tl.float32))
    share = tl.load(trap + row * trap_row + h).to(tl.float32)
    now = share * step
    old = (1 - share) * step * decay
    one *= decay
    two *= decay
    of_x = h * RANK * HEAD_DIM + p
    of_B = h * RANK * D_STATE
    for r in tl.static_range(RANK):
        before = tl.load(last_x + row * last_x_row + of_x + r * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        before = (old * before)[:, None]
        u = tl.load(x + row * x_row + of_x + r * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        u = (now * u)[:, None]
        last = last_B + row * last_B_row + of_B + r * D_STATE
        b = B + row * B_row + of_B + r * D_STATE
        one = tl.fma(u, _states(b, n, D_STATE), tl.fma(before, _states(last, n, D_STATE), one))
        two = tl.fma(u, _states(b, other, D_STATE), tl.fma(before, _states(last, other, D_STATE), two))
    tl.debug_barrier()  # all have loaded, whichever threads store
    tl.store(place, one, mask=here)
    tl.store(place + HALF, two, mask=there)
    for r in tl.static_range(RANK):
        read = C + row * C_row + of_B + r * D_STATE
        out = tl.fma(two, _states(read, other, D_STATE), one * _states(read, n, D_STATE))
        tl.store(y + (line * RANK + r) * HEAD_DIM + p, tl.sum(out, axis=1), mask=real)
