# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""Triton kernels of what a stretch of time does to a state (see ends.py). A program takes some channels of a split of
the positions; no program waits for another one."""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import softplus


@triton.jit
def _steps(dt, row, bias, t, c, end, channels, SOFTPLUS: tl.constexpr):
    """Step sizes (tile, channels), 0 past the end."""
    inside = (t < end)[:, None] & (c < channels)[None, :]
    delta = tl.load(dt + t.to(tl.int64)[:, None] * row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        delta += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(inside, delta, 0.0)


@triton.jit(do_not_specialize=["length"])
def sum_steps(
    dt, dt_batch, dt_row, bias, sums, length, channels,
    SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The step sizes of each split, added up."""
    split, sequence = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    end = tl.minimum(length, split * SPLIT + SPLIT)
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for tile in range(SPLIT // TILE):
        t = split * SPLIT + tile * TILE + tl.arange(0, TILE)
        total += tl.sum(_steps(dt + sequence * dt_batch, dt_row, bias, t, c, end, channels, SOFTPLUS), 0)
    at = (sequence * tl.num_programs(0) + split) * channels
    tl.store(sums + at + c, total, mask=c < channels)


@triton.jit(do_not_specialize=["length"])
def weighted(
    values, v_batch, v_row, dt, dt_batch, dt_row, M, M_batch, M_row, z, z_batch, z_row, A, bias, beyond, parts,
    length, channels, d_state, per_group, SOFTPLUS: tl.constexpr, BACK: tl.constexpr, LEAST: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The weighted sum over each split; nothing is read of one whose weights are all too small."""
    split, sequence = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c0 = tl.program_id(1) * CHANNELS
    c, n = c0 + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    exists = (c < channels)[:, None] & (n < d_state)[None, :]
    rates = tl.load(A + c.to(tl.int64)[:, None] * d_state + n[None, :], mask=exists, other=0.0) * 1.4426950408889634
    at = (sequence * tl.num_programs(0) + split) * channels
    steps = tl.load(beyond + at + c, mask=c < channels, other=0.0)
    total = tl.zeros([CHANNELS, STATES], dtype=tl.float32)
    strongest = tl.max(tl.max(tl.where(exists, rates * steps[:, None], 2.0 * LEAST), 1), 0)
    if strongest > LEAST:
        begin = split * SPLIT
        end = tl.minimum(length, begin + SPLIT)
        column = (c0 // per_group) * d_state
        for tile in range(SPLIT // TILE):
            t = begin + (tile if BACK else SPLIT // TILE - 1 - tile) * TILE + tl.arange(0, TILE)
            inside = (t < end)[:, None]
            real = inside & (c < channels)[None, :]
            delta = _steps(dt + sequence * dt_batch, dt_row, bias, t, c, end, channels, SOFTPLUS)
            row = t.to(tl.int64)[:, None]
            v = tl.load(values + sequence * v_batch + row * v_row + c[None, :], mask=real, other=0.0).to(tl.float32)
            if z is not None:
                gate = tl.load(z + sequence * z_batch + row * z_row + c[None, :], mask=real, other=0.0).to(tl.float32)
                v *= gate * tl.sigmoid(gate)
            wanted = inside & (n < d_state)[None, :]
            m = tl.load(M + sequence * M_batch + row * M_row + column + n[None, :], mask=wanted, other=0.0)
            if BACK:
                between = steps[None, :] + tl.cumsum(delta, 0)
            else:
                between = steps[None, :] + tl.cumsum(delta, 0, reverse=True) - delta
                v *= delta
            weights = tl.exp2(rates[None, :, :] * between[:, :, None])
            total += tl.sum(weights * v[:, :, None] * m.to(tl.float32)[:, None, :], 0)
            steps += tl.sum(delta, 0)
    place = parts + at * d_state + c.to(tl.int64)[:, None] * d_state + n[None, :]
    tl.store(place, total, mask=exists)
