# mypy: allow-untyped-defs
"""The kernels of one decode step, in Triton: they change states in place, fp32 or rounded to bf16, and compute in
fp32."""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import minus_one, softplus


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
    COMPLEX: tl.constexpr,
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

    channels_of_B, channels_of_C: channels that share a group of B, of C. COMPLEX: state, A, B and C hold pairs of real
    and imaginary parts, strides count numbers.
    """
    N: tl.constexpr = 2 if COMPLEX else 1
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)[None, :]
    real = c < channels
    tile = real[:, None] & (n < D_STATE)
    at_A = A + (c.to(tl.int64)[:, None] * D_STATE + n) * N
    decay = tl.load(at_A, mask=tile, other=0.0).to(tl.float32)
    if A_IS_LOG:
        decay = -tl.exp(decay)
    if COMPLEX:
        turn = tl.load(at_A + 1, mask=tile, other=0.0).to(tl.float32)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    for r in range(ROWS):
        row = first + r
        here = real & (row < batch)
        cells = tile & (row < batch)
        place = state + ((row * channels + c)[:, None] * D_STATE + n) * N
        h = tl.load(place, mask=cells, other=0.0).to(tl.float32)
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
            at_B, at_C = B + row * B_stride + n * N, C + row * C_stride + n * N
        else:
            known = cells
            at_B = B + row * B_stride + (c // channels_of_B)[:, None].to(tl.int64) * B_group_stride + n * N
            at_C = C + row * C_stride + (c // channels_of_C)[:, None].to(tl.int64) * C_group_stride + n * N
        b = tl.load(at_B, mask=known, other=0.0).to(tl.float32)
        read = tl.load(at_C, mask=known, other=0.0).to(tl.float32)
        if COMPLEX:
            h_i = tl.load(place + 1, mask=cells, other=0.0)
            b_i = tl.load(at_B + 1, mask=known, other=0.0).to(tl.float32)
            read_i = tl.load(at_C + 1, mask=known, other=0.0).to(tl.float32)
            size = tl.exp(delta[:, None] * decay)
            a, a_i = size * tl.cos(delta[:, None] * turn), size * tl.sin(delta[:, None] * turn)
            du = (delta * u)[:, None]
            h, h_i = a * h - a_i * h_i + du * b, a * h_i + a_i * h + du * b_i
            out += 2 * tl.sum(h * read - h_i * read_i, axis=1)
        else:
            h = tl.exp(delta[:, None] * decay) * h + (delta * u)[:, None] * b
            out += tl.sum(h * read, axis=1)
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place, h, mask=cells)
        if COMPLEX:
            tl.store(place + 1, h_i, mask=cells)
        if HAS_Z:
            out *= gate * tl.sigmoid(gate)
        tl.store(y + row * channels + c, out, mask=here)


@triton.jit(do_not_specialize=["batch"])
def lti_update(
    state,
    x,
    x_stride,
    dt,
    A,
    A_imag,
    B,
    C,
    D,
    z,
    z_stride,
    y,
    batch,
    channels,
    D_STATE: tl.constexpr,
    COMPLEX: tl.constexpr,
    RAW: tl.constexpr,
    RULE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """CHANNELS channels of ROWS sequences, for which the system is discretised once. RULE: zoh, bilinear or mamba (see
    `lti.discretize`). COMPLEX: state, A, B and C hold pairs of real and imaginary parts. RAW: dt holds its logarithm, A
    log(-Re A) and A_imag the rest of it, and B is real."""
    N: tl.constexpr = 2 if COMPLEX else 1
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)[None, :]
    real = c < channels
    tile = real[:, None] & (n < D_STATE)
    number = c.to(tl.int64)[:, None] * D_STATE + n
    at = number * N
    step = tl.load(dt + c, mask=real, other=0.0).to(tl.float32)[:, None]
    if RAW:
        step = tl.exp(step)
        v = -step * tl.exp(tl.load(A + number, mask=tile, other=0.0).to(tl.float32))
        b = step * tl.load(B + number, mask=tile, other=0.0).to(tl.float32)
    else:
        v = step * tl.load(A + at, mask=tile, other=0.0).to(tl.float32)
        b = step * tl.load(B + at, mask=tile, other=0.0).to(tl.float32)
    read = tl.load(C + at, mask=tile, other=0.0).to(tl.float32)
    if COMPLEX:
        if RAW:
            w = step * tl.load(A_imag + number, mask=tile, other=0.0).to(tl.float32)
            b_i = tl.zeros_like(b)
        else:
            w = step * tl.load(A + at + 1, mask=tile, other=0.0).to(tl.float32)
            b_i = step * tl.load(B + at + 1, mask=tile, other=0.0).to(tl.float32)
        read_i = tl.load(C + at + 1, mask=tile, other=0.0).to(tl.float32)
        if RULE == "bilinear":
            # 1 / (1 - z / 2)
            low, low_i = 1 - v / 2, -w / 2
            size = low * low + low_i * low_i
            r, r_i = low / size, -low_i / size
            a, a_i = (1 + v / 2) * r - w / 2 * r_i, (1 + v / 2) * r_i + w / 2 * r
        else:
            half = tl.sin(w / 2)
            size, sine, cosine = tl.exp(v), tl.sin(w), tl.cos(w)
            a, a_i = size * cosine, size * sine
            # (exp(z) - 1) / z, which is 1 + z / 2 near 0
            more, more_i = minus_one(v) * cosine - 2 * half * half, a_i
            square = v * v + w * w
            near = square < 1e-12
            square = tl.where(near, 1.0, square)
            r = tl.where(near, 1 + v / 2, (more * v + more_i * w) / square)
            r_i = tl.where(near, w / 2, (more_i * v - more * w) / square)
        if RULE != "mamba":
            b, b_i = r * b - r_i * b_i, r * b_i + r_i * b
    else:
        if RULE == "bilinear":
            a = (1 + v / 2) / (1 - v / 2)
            b = b / (1 - v / 2)
        else:
            a = tl.exp(v)
        if RULE == "zoh":
            near = tl.abs(v) < 1e-6
            b *= tl.where(near, 1 + v / 2, minus_one(v) / tl.where(near, 1.0, v))
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        here = real & (row < batch)
        cells = tile & (row < batch)
        place = state + ((row * channels + c)[:, None] * D_STATE + n) * N
        u = tl.load(x + row * x_stride + c, mask=here, other=0.0).to(tl.float32)
        h = tl.load(place, mask=cells, other=0.0)
        if COMPLEX:
            h_i = tl.load(place + 1, mask=cells, other=0.0)
            h, h_i = a * h - a_i * h_i + b * u[:, None], a * h_i + a_i * h + b_i * u[:, None]
            out = 2 * tl.sum(h * read - h_i * read_i, axis=1)
        else:
            h = a * h + b * u[:, None]
            out = tl.sum(h * read, axis=1)
        if HAS_D:
            out += tl.load(D + c, mask=real, other=0.0).to(tl.float32) * u
        if HAS_Z:
            gate = tl.load(z + row * z_stride + c, mask=here, other=0.0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.debug_barrier()  # all have loaded, whichever threads store
        tl.store(place, h, mask=cells)
        if COMPLEX:
            tl.store(place + 1, h_i, mask=cells)
        tl.store(y + row * channels + c, out, mask=here)


@triton.jit
def ssd_update(
    state,
    x,
    x_stride,
    dt,
    dt_stride,
    A,
    B,
    B_stride,
    B_group_stride,
    C,
    C_stride,
    C_group_stride,
    D,
    dt_bias,
    y,
    channels,
    head_dim,
    channels_of_group,
    D_STATE: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """CHANNELS channels of one sequence and of one head, which have dt, A, B, C and D in common; they divide it."""
    blocks = channels // CHANNELS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * CHANNELS
    c = first + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    real = n < D_STATE
    place = state + (row * channels + c)[:, None] * D_STATE + n[None, :]
    h = tl.load(place, mask=real[None, :], other=0.0).to(tl.float32)  # first, as it takes longest
    head, group = first // head_dim, (first // channels_of_group).to(tl.int64)
    u = tl.load(x + row * x_stride + c).to(tl.float32)
    delta = tl.load(dt + row * dt_stride + head).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    rate = tl.load(A + head).to(tl.float32)
    if A_IS_LOG:
        rate = -tl.exp(rate)
    b = tl.load(B + row * B_stride + group * B_group_stride + n, mask=real, other=0.0).to(tl.float32)
    read = tl.load(C + row * C_stride + group * C_group_stride + n, mask=real, other=0.0).to(tl.float32)
    h = tl.fma(tl.exp(delta * rate), h, (delta * u)[:, None] * b[None, :])
    out = tl.sum(h * read[None, :], axis=1)
    if HAS_D:
        out += tl.load(D + head).to(tl.float32) * u
    tl.debug_barrier()  # all have loaded, whichever threads store
    tl.store(place, h, mask=real[None, :])
    tl.store(y + row * channels + c, out)


@triton.jit
def likeliest(logits, stride, ids, peaks, n, BLOCK: tl.constexpr):
    """The first greatest of n logits of a row, and its place; infinity where one is no number."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, n, BLOCK):
        i = begin + at
        v = tl.load(logits + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
        v = tl.where(v != v, float("inf"), v)
        better = v > best
        best = tl.where(better, v, best)
        place = tl.where(better, i, place)
    peak = tl.max(best, axis=0)
    tl.store(peaks + row, peak)
    # where all are -infinity, the first
    tl.store(ids + row, tl.min(tl.where(best == peak, place, n), axis=0).to(tl.int64))
