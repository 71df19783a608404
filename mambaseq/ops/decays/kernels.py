# mypy: allow-untyped-defs
"""Triton kernels of log-decays, in fp32. Backward, a program walks over every so many tiles of rows of a head and keeps
its share of the gradients of A_log and dt_bias in registers; the shares are summed outside, so that two runs give the
same bits."""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import softplus


@triton.jit(do_not_specialize=["n_rows"])
def forward(
    f, A_log, dt_bias, g, n_rows, f_stride, n_heads, bound,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """f: rows of n_heads x WIDTH channels, so many elements apart; g contiguous."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    channels = head * WIDTH + columns
    bias = tl.load(dt_bias + channels, mask=columns < WIDTH, other=0.0).to(tl.float32)
    A = tl.exp(tl.load(A_log + head).to(tl.float32))
    u = tl.load(f + rows[:, None] * f_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    u += bias[None, :]
    found = bound * tl.sigmoid(A * u) if BOUNDED else -A * softplus(u)
    at = rows[:, None] * (WIDTH * n_heads) + channels[None, :]
    tl.store(g + at, found, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def backward(
    dg, f, A_log, dt_bias, df, dA_log, ddt_bias, n_rows, n_tiles, f_stride, n_heads, bound,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """dg, df contiguous; dA_log and ddt_bias `(programs, n_heads x WIDTH)` fp32: the share of each program."""
    program = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    channels = head * WIDTH + columns
    bias = tl.load(dt_bias + channels, mask=columns < WIDTH, other=0.0).to(tl.float32)
    A = tl.exp(tl.load(A_log + head).to(tl.float32))
    of_A = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        rows = tile * tl.full((ROWS,), ROWS, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * (WIDTH * n_heads) + channels[None, :]
        d = tl.load(dg + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(f + rows[:, None] * f_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        u += bias[None, :]
        if BOUNDED:
            sig = tl.sigmoid(A * u)
            d *= bound * sig * (1.0 - sig)  # of A u
            of_A += d * A * u
            d *= A
        else:
            of_A -= d * A * softplus(u)
            d *= -A * tl.sigmoid(u)
        of_bias += d
        tl.store(df + at, d.to(df.dtype.element_ty), mask=inside)
    to = program.to(tl.int64) * (WIDTH * n_heads) + channels
    tl.store(dA_log + to, tl.sum(of_A, axis=0), mask=columns < WIDTH)
    tl.store(ddt_bias + to, tl.sum(of_bias, axis=0), mask=columns < WIDTH)
