# mypy: allow-untyped-defs
"""Triton kernels of one decode step of whole layers: linear maps of a few rows together with what stands before them (a
norm) and behind them (a convolution, the residual stream), and the scan together with dt's map. They compute in
float32.

With PDL a kernel asks for the next one to be started at once, fetches its weights, and only then waits for the results
of the one before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambaseq.ops.gpu.triton_math import added_dot, softplus


@triton.jit(do_not_specialize=["rows"])
def linear_step(
    x,
    x_stride,
    gate,
    gate_stride,
    norm,
    eps,
    weight,
    bias,
    out,
    residual,
    conv_state,
    conv,
    conv_bias,
    conv_begin,
    conv_channels,
    rows,
    n_out,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONV: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out `(rows, n_out)` of x `(rows, COLUMNS)`; OUTPUTS rows of the weight, and ROWS of x, a program.

    One row of x is multiplied whole (BLOCK >= COLUMNS), several as a matrix, BLOCK columns at a time. NORM: x is
    divided by its root of mean squares and multiplied by `norm`. GATED: x is multiplied by silu(gate) before. CONV: the
    width of the causal convolution that outputs from conv_begin on go through, 0 for none; TAPS: a power of two, at
    least that. ADD: the residual, of out's shape.
    """
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there, real = n < n_out, r < rows
    lines = weight + n[:, None].to(tl.int64) * COLUMNS
    if ROWS == 1:
        k = tl.arange(0, BLOCK)
        known = k < COLUMNS
        w = tl.load(lines + k[None, :], mask=there[:, None] & known[None, :], other=0.0)
        if NORM:
            factor = tl.load(norm + k, mask=known, other=0.0).to(tl.float32)
        if PDL:
            gdc_wait()
        row = tl.program_id(1).to(tl.int64)
        v = tl.load(x + row * x_stride + k, mask=known, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + row * gate_stride + k, mask=known, other=0.0).to(tl.float32)
            v *= g * tl.sigmoid(g)
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(v * v) / COLUMNS + eps)
            v *= factor
        total = tl.sum(w.to(tl.float32) * v[None, :], axis=1)[:, None]
        if NORM:
            total *= scale
    else:
        if PDL:
            gdc_wait()
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        line = r[None, :].to(tl.int64)
        for start in range(0, COLUMNS, BLOCK):
            k = start + tl.arange(0, BLOCK)
            known = k < COLUMNS
            cells = known[:, None] & real[None, :]
            w = tl.load(lines + k[None, :], mask=there[:, None] & known[None, :], other=0.0)
            v = tl.load(x + line * x_stride + k[:, None], mask=cells, other=0.0)
            if GATED:
                g = tl.load(gate + line * gate_stride + k[:, None], mask=cells, other=0.0).to(tl.float32)
                v = v.to(tl.float32) * g * tl.sigmoid(g)
            if NORM:
                v = v.to(tl.float32)
                squares += tl.sum(v * v, axis=0)
                v *= tl.load(norm + k, mask=known, other=0.0).to(tl.float32)[:, None]
            total = added_dot(w, v.to(w.dtype), total)
        if NORM:
            total *= (1.0 / tl.sqrt(squares / COLUMNS + eps))[None, :]
    cells = there[:, None] & real[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    if CONV:
        c = n - conv_begin
        j = tl.arange(0, TAPS)[None, None, :]
        through = there & (c >= 0) & (c < conv_channels)
        held = through[:, None, None] & real[None, :, None]
        place = conv_state + (r[None, :, None].to(tl.int64) * conv_channels + c[:, None, None]) * (CONV - 1) + j
        window = tl.load(place, mask=held & (j < CONV - 1), other=0.0)
        window = tl.where(j == CONV - 1, total[:, :, None], window)  # the latest inputs, oldest first
        taps = tl.load(conv + c.to(tl.int64)[:, None, None] * CONV + j, mask=held & (j < CONV), other=0.0)
        made = tl.sum(window * taps.to(tl.float32), axis=2)
        if HAS_CONV_BIAS:
            made += tl.load(conv_bias + c, mask=through, other=0.0).to(tl.float32)[:, None]
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place - 1, window, mask=held & (j > 0) & (j < CONV))
        total = tl.where(through[:, None], made * tl.sigmoid(made), total)
    at = r[None, :].to(tl.int64) * n_out + n[:, None]
    if ADD:
        total += tl.load(residual + at, mask=cells, other=0.0)
    tl.store(out + at, total, mask=cells)


@triton.jit(do_not_specialize=["batch"])
def scan_step(
    state,
    inner,
    inner_stride,
    products,
    products_stride,
    dt_proj,
    dt_bias,
    A_log,
    D,
    y,
    batch,
    channels,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """CHANNELS channels of ROWS sequences of Mamba-1's scan. inner: inputs, then gates, `(batch, 2 channels)`;
    products: what dt_proj takes, B and C, `(batch, RANK + 2 D_STATE)`. RANKS, STATES: powers of two, at least those."""
    if PDL:
        gdc_launch_dependents()
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n, q = tl.arange(0, STATES)[None, :], tl.arange(0, RANKS)
    real = c < channels
    tile = real[:, None] & (n < D_STATE)
    line = c.to(tl.int64)[:, None]
    w = tl.load(dt_proj + line * RANK + q[None, :], mask=real[:, None] & (q < RANK)[None, :], other=0.0)
    decay = -tl.exp(tl.load(A_log + line * D_STATE + n, mask=tile, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + c, mask=real, other=0.0).to(tl.float32)
    skip = tl.load(D + c, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        here = real & (row < batch)
        cells = tile & (row < batch)
        place = state + (row * channels + c)[:, None] * D_STATE + n
        h = tl.load(place, mask=cells, other=0.0).to(tl.float32)
        known = (n < D_STATE) & (row < batch)
        made = products + row * products_stride
        low = tl.load(made + q, mask=(q < RANK) & (row < batch), other=0.0).to(tl.float32)
        b = tl.load(made + RANK + n, mask=known, other=0.0).to(tl.float32)
        read = tl.load(made + RANK + D_STATE + n, mask=known, other=0.0).to(tl.float32)
        u = tl.load(inner + row * inner_stride + c, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(inner + row * inner_stride + channels + c, mask=here, other=0.0).to(tl.float32)
        delta = softplus(tl.sum(w.to(tl.float32) * low[None, :], axis=1) + bias)
        h = tl.exp(delta[:, None] * decay) * h + (delta * u)[:, None] * b
        out = tl.sum(h * read, axis=1) + skip * u
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place, h, mask=cells)
        tl.store(y + row * channels + c, out * gate * tl.sigmoid(gate), mask=here)
