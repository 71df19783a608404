# mypy: allow-untyped-defs
"""Triton kernels of one decode step of whole layers, of one sequence: linear maps together with what stands before them
(a norm) and behind them (a convolution, the residual stream), and the scan together with dt's map. They compute in
float32.

With PDL a kernel asks for the next one to be started at once, fetches its weights, and only then waits for the results
of the one before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambaseq.ops.gpu.triton_math import softplus


@triton.jit
def linear_step(
    x,
    gate,
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
    n_out,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
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
    """out `(n_out,)` of x `(COLUMNS,)`; OUTPUTS rows of the weight a program, whole ones: BLOCK >= COLUMNS.

    NORM: x is divided by its root of mean squares and multiplied by `norm`. GATED: x is multiplied by silu(gate)
    before. CONV: the width of the causal convolution that outputs from conv_begin on go through, 0 for none; TAPS: a
    power of two, at least that. ADD: the residual, of out's shape. Sums stay a column of a tile: for a vector of them
    every warp would compute the whole convolution.
    """
    if PDL:
        gdc_launch_dependents()
    n, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, BLOCK)
    there, known = n < n_out, k < COLUMNS
    lines = weight + n[:, None].to(tl.int64) * COLUMNS
    w = tl.load(lines + k[None, :], mask=there[:, None] & known[None, :], other=0.0)
    if NORM:
        factor = tl.load(norm + k, mask=known, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    v = tl.load(x + k, mask=known, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + k, mask=known, other=0.0).to(tl.float32)
        v *= g * tl.sigmoid(g)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(v * v) / COLUMNS + eps)
        v *= factor
    total = tl.sum(w.to(tl.float32) * v[None, :], axis=1)[:, None]
    if NORM:
        total *= scale
    cells = there[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    if CONV:
        c = n - conv_begin
        j = tl.arange(0, TAPS)[None, None, :]
        through = there & (c >= 0) & (c < conv_channels)
        held = through[:, None, None]
        place = conv_state + c[:, None, None] * (CONV - 1) + j
        window = tl.load(place, mask=held & (j < CONV - 1), other=0.0)
        window = tl.where(j == CONV - 1, total[:, :, None], window)  # the latest inputs, oldest first
        taps = tl.load(conv + c.to(tl.int64)[:, None, None] * CONV + j, mask=held & (j < CONV), other=0.0)
        made = tl.sum(window * taps.to(tl.float32), axis=2)
        if HAS_CONV_BIAS:
            made += tl.load(conv_bias + c, mask=through, other=0.0).to(tl.float32)[:, None]
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place - 1, window, mask=held & (j > 0) & (j < CONV))
        total = tl.where(through[:, None], made * tl.sigmoid(made), total)
    at = n[:, None]
    if ADD:
        total += tl.load(residual + at, mask=cells, other=0.0)
    tl.store(out + at, total, mask=cells)


@triton.jit
def scan_step(
    state,
    inner,
    products,
    dt_proj,
    dt_bias,
    A_log,
    D,
    y,
    channels,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """CHANNELS channels of Mamba-1's scan. inner: inputs, then gates, `(2 channels,)`; products: what dt_proj takes, B
    and C, `(RANK + 2 D_STATE,)`. RANKS, STATES: powers of two, at least those."""
    if PDL:
        gdc_launch_dependents()
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, q = tl.arange(0, STATES)[None, :], tl.arange(0, RANKS)
    real, known = c < channels, n < D_STATE
    tile = real[:, None] & known
    line = c.to(tl.int64)[:, None]
    w = tl.load(dt_proj + line * RANK + q[None, :], mask=real[:, None] & (q < RANK)[None, :], other=0.0)
    decay = -tl.exp(tl.load(A_log + line * D_STATE + n, mask=tile, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + c, mask=real, other=0.0).to(tl.float32)
    skip = tl.load(D + c, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    place = state + line * D_STATE + n
    h = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    low = tl.load(products + q, mask=q < RANK, other=0.0).to(tl.float32)
    b = tl.load(products + RANK + n, mask=known, other=0.0).to(tl.float32)
    read = tl.load(products + RANK + D_STATE + n, mask=known, other=0.0).to(tl.float32)
    u = tl.load(inner + c, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(inner + channels + c, mask=real, other=0.0).to(tl.float32)
    delta = softplus(tl.sum(w.to(tl.float32) * low[None, :], axis=1) + bias)
    h = tl.exp(delta[:, None] * decay) * h + (delta * u)[:, None] * b
    out = tl.sum(h * read, axis=1) + skip * u
    tl.debug_barrier()  # all have loaded, whichever threads store
    tl.store(place, h, mask=tile)
    tl.store(y + c, out * gate * tl.sigmoid(gate), mask=real)
