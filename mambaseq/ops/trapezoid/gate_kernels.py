# mypy: allow-untyped-defs, disable-error-code="assignment"
"""Triton kernels of what follows Mamba-3's scan: skip, gate, and the map of several outputs a head to one; and of the
map of an input a head to several before it.

    out = sum over r of o_r silu(z z_r) (y_r + D v x_r)

y `(rows, RANK, heads, P)`, v, z and out `(rows, heads, P)` with strides between rows, maps x_r, z_r and o_r `(heads,
RANK, P)` or none. A program takes ROWS rows of a head, backward so many tiles of them.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import sigmoid
from mambaseq.ops.ssd.triton_kernels import _rounded


@triton.jit
def _map(m, h, r, p, P: tl.constexpr, RANK: tl.constexpr):
    return tl.load(m + (h * RANK + r) * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def gate(
    y, v, v_row, z, z_row, D, x_map, z_map, o_map, out, rows, heads,
    P: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    h = tl.program_id(1)
    p = tl.arange(0, BLOCK)
    known = (row < rows)[:, None] & (p < P)[None, :]
    channel = (h * P + p)[None, :]
    skip = tl.load(v + row[:, None] * v_row + channel, mask=known, other=0.0).to(tl.float32)
    skip *= tl.load(D + h).to(tl.float32)
    gates = tl.load(z + row[:, None] * z_row + channel, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for r in tl.static_range(RANK):
        here = tl.load(y + ((row * RANK + r) * heads)[:, None] * P + channel, mask=known, other=0.0).to(tl.float32)
        g = gates
        if x_map is not None:
            here += skip * _map(x_map, h, r, p, P, RANK)
            g = g * _map(z_map, h, r, p, P, RANK)
        else:
            here += skip
        here *= g * sigmoid(g)
        if x_map is not None:
            here *= _map(o_map, h, r, p, P, RANK)
        total += here
    tl.store(out + (row * heads)[:, None] * P + channel, _rounded(total, out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows", "blocks", "tiles"])
def gate_backward(
    y, v, v_row, z, z_row, D, x_map, z_map, o_map, dout, dy, dv, dz, shares, dD, rows, heads, blocks, tiles,
    P: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dv and dz `(rows, heads, P)`; of each block of tiles times ROWS rows dD `(blocks, heads)` and the gradients of
    the maps, `shares` (3, blocks, heads, RANK, P). What is summed over rows stays with its threads until the end."""
    MAPS: tl.constexpr = x_map is not None
    h = tl.program_id(1)
    p = tl.arange(0, BLOCK)
    channel = (h * P + p)[None, :]
    scale = tl.load(D + h).to(tl.float32)
    of_D = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_maps = ()  # of each rank those of x_map, z_map and o_map
    for _ in tl.static_range(3 * RANK if MAPS else 0):
        of_maps += (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    for tile in range(0, tiles):
        row = ((tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        known = (row < rows)[:, None] & (p < P)[None, :]
        values = tl.load(v + row[:, None] * v_row + channel, mask=known, other=0.0).to(tl.float32)
        skip = scale * values
        gates = tl.load(z + row[:, None] * z_row + channel, mask=known, other=0.0).to(tl.float32)
        at = (row * heads)[:, None] * P + channel
        d = tl.load(dout + at, mask=known, other=0.0).to(tl.float32)
        of_v = tl.zeros([ROWS, BLOCK], dtype=tl.float32)  # of v and of D, as a factor of the other
        of_z = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        more = ()
        for r in tl.static_range(RANK):
            of_row = ((row * RANK + r) * heads)[:, None] * P + channel
            here = tl.load(y + of_row, mask=known, other=0.0).to(tl.float32)
            g = gates
            e = d
            if MAPS:
                from_v = _map(x_map, h, r, p, P, RANK)
                from_z = _map(z_map, h, r, p, P, RANK)
                here += skip * from_v
                g = g * from_z
                e = e * _map(o_map, h, r, p, P, RANK)
            else:
                here += skip
            open = sigmoid(g)
            of_gate = e * here * (open * (1 + g * (1 - open)))
            open *= g
            back = e * open  # of y_r
            tl.store(dy + of_row, _rounded(back, dy.dtype.element_ty), mask=known)
            if MAPS:
                more += (
                    of_maps[3 * r] + back * skip,
                    of_maps[3 * r + 1] + of_gate * gates,
                    of_maps[3 * r + 2] + d * open * here,
                )
                of_v += back * from_v
                of_z += of_gate * from_z
            else:
                of_v += back
                of_z += of_gate
        of_maps = more
        of_D += of_v * values
        tl.store(dv + at, _rounded(of_v * scale, dv.dtype.element_ty), mask=known)
        tl.store(dz + at, _rounded(of_z, dz.dtype.element_ty), mask=known)
    tl.store(dD + tl.program_id(0) * heads + h, tl.sum(tl.sum(of_D, axis=1), axis=0))
    if MAPS:
        for m in tl.static_range(3):
            for r in tl.static_range(RANK):
                to = shares + (((m * blocks + tl.program_id(0)).to(tl.int64) * heads + h) * RANK + r) * P + p
                tl.store(to, tl.sum(of_maps[3 * r + m], axis=0), mask=p < P)


@triton.jit(do_not_specialize=["rows"])
def write(
    v, v_row, x_map, out, rows, heads, P: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr
):
    """out `(rows, RANK, heads, P)`: v x_r."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    h = tl.program_id(1)
    p = tl.arange(0, BLOCK)
    known = (row < rows)[:, None] & (p < P)[None, :]
    channel = (h * P + p)[None, :]
    values = tl.load(v + row[:, None] * v_row + channel, mask=known, other=0.0).to(tl.float32)
    for r in tl.static_range(RANK):
        to = out + ((row * RANK + r) * heads)[:, None] * P + channel
        tl.store(to, _rounded(values * _map(x_map, h, r, p, P, RANK), out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows", "tiles"])
def write_backward(
    v, v_row, x_map, dout, dv, shares, rows, heads, tiles,
    P: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dout `(rows, RANK, heads, P)`, dv `(rows, heads, P)`; shares `(blocks of rows, heads, RANK, P)` of x_map."""
    h = tl.program_id(1)
    p = tl.arange(0, BLOCK)
    channel = (h * P + p)[None, :]
    of_map = ()
    for _ in tl.static_range(RANK):
        of_map += (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    for tile in range(0, tiles):
        row = ((tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        known = (row < rows)[:, None] & (p < P)[None, :]
        values = tl.load(v + row[:, None] * v_row + channel, mask=known, other=0.0).to(tl.float32)
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        more = ()
        for r in tl.static_range(RANK):
            at = ((row * RANK + r) * heads)[:, None] * P + channel
            d = tl.load(dout + at, mask=known, other=0.0).to(tl.float32)
            more += (of_map[r] + d * values,)
            total += d * _map(x_map, h, r, p, P, RANK)
        of_map = more
        tl.store(dv + (row * heads)[:, None] * P + channel, _rounded(total, dv.dtype.element_ty), mask=known)
    for r in tl.static_range(RANK):
        to = shares + ((tl.program_id(0).to(tl.int64) * heads + h) * RANK + r) * P + p
        tl.store(to, tl.sum(of_map[r], axis=0), mask=p < P)
