# mypy: allow-untyped-defs
"""What Mamba-3's recurrence has of its own beside the kernels of the state-space dual (`ops/ssd/triton_kernels.py`):
its steps, handed over as numbers, and their gradients.

`weights` (3, batch, positions, heads) float32, contiguous: log-decay, how much of what a position writes later ones
see, and how much it sees itself. Chunks are of SIZE rows, RANK of which are a position; its decay stands at the first.
"""

import triton
import triton.language as tl

from mambaseq.ops.ssd.triton_kernels import _chunk

_CHANGING = ["chunks", "chunks_of_row", "length", "batches"]


@triton.jit(do_not_specialize=_CHANGING)
def steps(
    weights, table, chunks, chunks_of_row, length, batches, decay, dt, own, heads,
    SIZE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """decay, dt and own (chunks, heads, SIZE); a program takes HEADS heads of a chunk."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, False)
    inside = (q < count)[:, None] & (h < heads)[None, :]
    positions = length // RANK
    apart = batches.to(tl.int64) * positions * heads
    place = weights + (batch * positions + first // RANK) * heads + (q // RANK)[:, None] * heads + h[None, :]
    rate = tl.load(place, mask=inside & (q % RANK == 0)[:, None], other=0.0) * 1.4426950408889634
    to = (c.to(tl.int64) * heads + h)[None, :] * SIZE + q[:, None]
    known = (h < heads)[None, :] & (q < SIZE)[:, None]
    tl.store(decay + to, tl.cumsum(rate, axis=0), mask=known)
    tl.store(dt + to, tl.load(place + apart, mask=inside, other=0.0), mask=known)
    tl.store(own + to, tl.load(place + 2 * apart, mask=inside, other=0.0), mask=known)


@triton.jit
def _of_positions(value, SIZE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr):
    """Sums over a position's rows (SIZE // RANK, HEADS)."""
    if RANK > 1:
        value = tl.sum(tl.reshape(value, [SIZE // RANK, RANK, HEADS]), axis=1)
    return value


@triton.jit(do_not_specialize=_CHANGING)
def steps_backward(
    table, chunks, chunks_of_row, length, batches, direct, down, inner, outer, flow, dweights, heads,
    SIZE: tl.constexpr, HEADS: tl.constexpr, OUTER: tl.constexpr, FLOW: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The gradient of `weights`. OUTER, FLOW: how many blocks `outer` and `flow` have."""
    c = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, SIZE)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, False)
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
    found = tl.where((q % RANK == 0)[:, None], found, 0.0)
    positions = length // RANK
    apart = batches.to(tl.int64) * positions * heads
    j = tl.arange(0, SIZE // RANK)
    inside = (j * RANK < count)[:, None] & valid[None, :]
    place = dweights + (batch * positions + first // RANK) * heads + j[:, None] * heads + h[None, :]
    tl.store(place, _of_positions(found, SIZE, HEADS, RANK), mask=inside)
    of_dt = tl.load(direct + at, mask=every, other=0.0)
    tl.store(place + apart, _of_positions(of_dt, SIZE, HEADS, RANK), mask=inside)
    of_own = tl.load(down + at, mask=every, other=0.0)
    tl.store(place + 2 * apart, _of_positions(of_own, SIZE, HEADS, RANK), mask=inside)


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
