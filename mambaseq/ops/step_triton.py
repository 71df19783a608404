# mypy: allow-untyped-defs
"""The kernels of one decode step, in Triton: they change fp32 states in place and compute in fp32."""

import triton
import triton.language as tl


@triton.jit
def causal_conv_update(
    state,
    x,
    x_stride,
    weight,
    bias,
    y,
    channels,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """CHANNELS channels of one sequence, one a thread. No sums over threads: they would be rounded as it happens."""
    blocks = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    now = tl.load(x + row * x_stride + c, mask=real, other=0.0).to(tl.float32)
    place = state + (row * channels + c) * (WIDTH - 1)
    out = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        out = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + c.to(tl.int64) * WIDTH + k, mask=real, other=0.0).to(tl.float32)
        if k == WIDTH - 1:
            out += now * tap
        else:
            out += tl.load(place + k, mask=real, other=0.0) * tap
    for k in tl.static_range(WIDTH - 1):  # oldest first: each place is read before it is written
        tl.store(place + k, now if k == WIDTH - 2 else tl.load(place + k + 1, mask=real, other=0.0), mask=real)
    if SILU:
        out *= tl.sigmoid(out)
    tl.store(y + row * channels + c, out, mask=real)


@triton.jit
def softplus(v):
    """log(1 + exp(v)), its relative error small where it is small: log1p by the series of 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit(do_not_specialize=["batch", "channels_of_B", "channels_of_C"])
def selective_state_update(
    state,
    x,
    x_stride,
    dt,
    dt_stride,
    A,
    B,
    B_stride,
    B_group_stride,
    channels_of_B,
    C,
    C_stride,
    C_group_stride,
    channels_of_C,
    D,
    z,
    z_stride,
    dt_bias,
    y,
    batch,
    channels,
    D_STATE: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """CHANNELS channels of ROWS sequences, which share A. STATES: a power of two, at least D_STATE.

    channels_of_B, channels_of_C: channels that share a group of B, of C.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)[None, :]
    real = c < channels
    tile = real[:, None] & (n < D_STATE)
    decay = tl.load(A + c.to(tl.int64)[:, None] * D_STATE + n, mask=tile, other=0.0).to(tl.float32)
    if A_IS_LOG:
        decay = -tl.exp(decay)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    for r in range(ROWS):
        row = first + r
        here = real & (row < batch)
        cells = tile & (row < batch)
        place = state + (row * channels + c)[:, None] * D_STATE + n
        h = tl.load(place, mask=cells, other=0.0)
        u = tl.load(x + row * x_stride + c, mask=here, other=0.0).to(tl.float32)
        delta = tl.load(dt + row * dt_stride + c, mask=here, other=0.0).to(tl.float32)
        if HAS_BIAS:
            delta += tl.load(dt_bias + c, mask=real, other=0.0).to(tl.float32)
        if SOFTPLUS:
            delta = softplus(delta)
        out = tl.zeros([CHANNELS], tl.float32)
        if HAS_D:
            out = tl.load(D + c, mask=real, other=0.0).to(tl.float32) * u
        if HAS_Z:
            gate = tl.load(z + row * z_stride + c, mask=here, other=0.0).to(tl.float32)
        if ONE_GROUP:
            known = (n < D_STATE) & (row < batch)
            b = tl.load(B + row * B_stride + n, mask=known, other=0.0).to(tl.float32)
            read = tl.load(C + row * C_stride + n, mask=known, other=0.0).to(tl.float32)
        else:
            at_B = row * B_stride + (c // channels_of_B)[:, None].to(tl.int64) * B_group_stride + n
            at_C = row * C_stride + (c // channels_of_C)[:, None].to(tl.int64) * C_group_stride + n
            b = tl.load(B + at_B, mask=cells, other=0.0).to(tl.float32)
            read = tl.load(C + at_C, mask=cells, other=0.0).to(tl.float32)
        h = tl.exp(delta[:, None] * decay) * h + (delta * u)[:, None] * b
        out += tl.sum(h * read, axis=1)
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place, h, mask=cells)
        if HAS_Z:
            out *= gate * tl.sigmoid(gate)
        tl.store(y + row * channels + c, out, mask=here)
