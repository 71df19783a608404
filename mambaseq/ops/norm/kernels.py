# mypy: allow-untyped-defs
"""Triton kernels of the norms. A program takes tiles of ROWS whole rows (of a group), and computes in fp32.

Backward, a program walks over every so many tiles and keeps its share of the weight's gradient in registers; the
shares are summed outside, so that two runs give the same bits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows"])
def add_forward(
    x, residual, weight, y, total, rstd, n_rows, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, HAS_X: tl.constexpr, STORE_TOTAL: tl.constexpr,
):  # fmt: skip
    """x, residual, y, total `(n_rows, WIDTH)`, contiguous; rstd `(n_rows,)`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    r = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_X:
        r += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if STORE_TOTAL:
        tl.store(total + at, r, mask=inside)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, axis=1) / WIDTH + eps)
    tl.store(rstd + rows, scale, mask=rows < n_rows)
    tl.store(y + at, (r * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def add_backward(
    dy, dtotal, total, rstd, weight, dresidual, dx, dweight, n_rows, n_tiles,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, HAS_DTOTAL: tl.constexpr, STORE_DX: tl.constexpr,
):  # fmt: skip
    """dweight `(programs, WIDTH)` fp32: the share of each program."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    share = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        rows = tile * tl.full((ROWS,), ROWS, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)
        normed = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        share += d * normed
        d *= w[None, :]
        mean = tl.sum(d * normed, axis=1) / WIDTH
        d = (d - normed * mean[:, None]) * scale[:, None]
        if HAS_DTOTAL:
            d += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=inside)
        if STORE_DX:
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + program.to(tl.int64) * WIDTH + columns, tl.sum(share, axis=0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["n_rows"])
def gated_forward(
    x, z, weight, y, rstd, n_rows, x_stride, z_stride, n_groups, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BEFORE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x, z: rows of n_groups x WIDTH channels, so many elements apart; y contiguous; rstd `(n_rows, n_groups)`."""
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    channels = group * WIDTH + columns
    u = tl.load(x + rows[:, None] * x_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + rows[:, None] * z_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = gate * tl.sigmoid(gate) if SILU else tl.sigmoid(gate)
    w = tl.load(weight + channels, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if not BEFORE:
        u *= gate
    scale = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / WIDTH + eps)
    tl.store(rstd + rows * n_groups + group, scale, mask=rows < n_rows)
    u *= scale[:, None] * w[None, :]
    if BEFORE:
        u *= gate
    at = rows[:, None] * (WIDTH * n_groups) + channels[None, :]
    tl.store(y + at, u.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def gated_backward(
    dy, x, z, weight, rstd, dx, dz, dweight, n_rows, n_tiles, x_stride, z_stride, dz_stride, n_groups,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BEFORE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dy, dx contiguous; dweight `(programs, n_groups x WIDTH)` fp32: the share of each program."""
    program = tl.program_id(0)
    group = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    channels = group * WIDTH + columns
    w = tl.load(weight + channels, mask=columns < WIDTH, other=0.0).to(tl.float32)
    share = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        rows = tile * tl.full((ROWS,), ROWS, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * (WIDTH * n_groups) + channels[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        xs = tl.load(x + rows[:, None] * x_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        zs = tl.load(z + rows[:, None] * z_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        to_dz = dz + rows[:, None] * dz_stride + channels[None, :]
        scale = tl.load(rstd + rows * n_groups + group, mask=rows < n_rows, other=0.0)
        sig = tl.sigmoid(zs)
        gate = zs * sig if SILU else sig
        slope = sig * (1.0 + zs * (1.0 - sig)) if SILU else sig * (1.0 - sig)
        if BEFORE:
            normed = xs * scale[:, None]
            tl.store(to_dz, (d * normed * w[None, :] * slope).to(dz.dtype.element_ty), mask=inside)
            d *= gate
        else:
            normed = xs * gate * scale[:, None]
        share += d * normed
        d *= w[None, :]
        mean = tl.sum(d * normed, axis=1) / WIDTH
        d = (d - normed * mean[:, None]) * scale[:, None]
        if not BEFORE:
            tl.store(to_dz, (d * xs * slope).to(dz.dtype.element_ty), mask=inside)
            d *= gate
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    to = dweight + program.to(tl.int64) * (WIDTH * n_groups) + channels
    tl.store(to, tl.sum(share, axis=0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["n_rows"])
def unit_forward(
    x, y, inverse, n_rows, x_stride, n_groups, scale, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x: rows of n_groups x WIDTH channels, so many elements apart; y contiguous; inverse `(n_rows, n_groups)`."""
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    channels = group * WIDTH + columns
    u = tl.load(x + rows[:, None] * x_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    of_row = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) + eps)
    tl.store(inverse + rows * n_groups + group, of_row, mask=rows < n_rows)
    at = rows[:, None] * (WIDTH * n_groups) + channels[None, :]
    tl.store(y + at, (u * (of_row * scale)[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def unit_backward(
    dy, x, inverse, dx, n_rows, x_stride, n_groups, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dy, dx contiguous."""
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    channels = group * WIDTH + columns
    at = rows[:, None] * (WIDTH * n_groups) + channels[None, :]
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + rows[:, None] * x_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    of_row = tl.load(inverse + rows * n_groups + group, mask=rows < n_rows, other=0.0)
    u *= of_row[:, None]
    d = (d - u * tl.sum(d * u, axis=1)[:, None]) * (of_row * scale)[:, None]
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
