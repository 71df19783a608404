# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
# ruff: noqa: B007, RUF005 (tuples grow by concatenation: the compiler of the kernels knows no unpacking)
"""Triton kernels of the causal convolution: memory is read once, in order, in float32 arithmetic.

A program owns `BLOCK` channels and `LANES` runs of `steps` time steps, one below the other in memory. It walks all of
its runs at once, and keeps the last `WIDTH - 1` inputs (and, going back, the gradients of that many inputs that still
lack contributions) in registers. What a run needs of its neighbours it reads, or computes, once more.

Time is counted in steps p, in the direction in which time runs; p lies in row p, or in row `length - 1 - p` if
REVERSE. In a packed row, `places` (3, length) int32 says of each row which sequence it belongs to, and where that
sequence begins and ends.
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import sigmoid

_CHANGING = ["n_sequences", "length", "bits", "blocks_of_channels", "runs", "steps"]


@triton.jit
def _input(
    x, x_row, state, s_sequence, s_channel, s_step, sequence, begin, end, q, c, channels, valid,
    REVERSE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inputs of sequences (lanes,) at their steps q (lanes,); before the first they come from `state`, or are 0."""
    row = end - 1 - q if REVERSE else begin + q
    valid = valid[:, None] & (c < channels)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_row + c[None, :], mask=valid & (q >= 0)[:, None], other=0.0)
    value = value.to(tl.float32)
    if state is not None:
        at = sequence.to(tl.int64)[:, None] * s_sequence + (q + WIDTH - 1)[:, None] * s_step
        past = tl.load(state + at + c.to(tl.int64)[None, :] * s_channel, mask=valid & (q < 0)[:, None], other=0.0)
        value = tl.where((q < 0)[:, None], past.to(tl.float32), value)
    return value


@triton.jit
def _weights(weight, c, channels, WIDTH: tl.constexpr):
    """Column k in float32, (1, BLOCK) each."""
    columns = ()
    for k in tl.static_range(WIDTH):
        column = tl.load(weight + c.to(tl.int64) * WIDTH + k, mask=c < channels, other=0.0)
        columns = columns + (column.to(tl.float32)[None, :],)
    return columns


@triton.jit
def _bias(bias, c, channels, BLOCK: tl.constexpr):
    if bias is not None:
        value = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    else:
        value = tl.zeros([BLOCK], dtype=tl.float32)
    return value[None, :]


@triton.jit
def _place(places, p, length, sequence, REVERSE: tl.constexpr):
    """Sequence, begin and end (lanes,) of what lies at p; a row that is not packed is one sequence."""
    if places is not None:
        row = length - 1 - p if REVERSE else p
        inside = p < length
        where = tl.load(places + row, mask=inside, other=0)
        begin = tl.load(places + length + row, mask=inside, other=0)
        end = tl.load(places + 2 * length + row, mask=inside, other=0)
    else:
        where = tl.zeros_like(p) + sequence
        begin = tl.zeros_like(p)
        end = begin + length
    return where, begin, end


@triton.jit
def _window(
    x, x_row, state, s_sequence, s_channel, s_step, places, sequence, length, p, c, channels,
    REVERSE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inputs before step p, latest first: `WIDTH - 1` of (lanes, BLOCK)."""
    where, begin, end = _place(places, p, length, sequence, REVERSE)
    row = length - 1 - p if REVERSE else p
    q = end - 1 - row if REVERSE else row - begin
    window = ()
    for j in tl.static_range(1, WIDTH):
        window = window + (
            _input(
                x, x_row, state, s_sequence, s_channel, s_step, where, begin, end, q - j, c, channels, p < length,
                REVERSE, WIDTH,
            ),
        )  # fmt: skip
    return window


@triton.jit
def _restarted(window, state, s_sequence, s_channel, s_step, where, starts, c, channels, WIDTH: tl.constexpr):
    """The window, where a sequence starts that of the sequence."""
    restarted = ()
    for j in tl.static_range(1, WIDTH):
        if state is not None:
            at = where.to(tl.int64)[:, None] * s_sequence + (WIDTH - 1 - j) * s_step
            past = tl.load(
                state + at + c.to(tl.int64)[None, :] * s_channel,
                mask=starts[:, None] & (c < channels)[None, :],
                other=0.0,
            )
            restarted = restarted + (tl.where(starts[:, None], past.to(tl.float32), window[j - 1]),)
        else:
            restarted = restarted + (tl.where(starts[:, None], 0.0, window[j - 1]),)
    return restarted


@triton.jit
def _convolved(u, window, columns, bias, WIDTH: tl.constexpr):
    value = bias + columns[WIDTH - 1] * u
    for j in tl.static_range(1, WIDTH):
        value += columns[WIDTH - 1 - j] * window[j - 1]
    return value


@triton.jit
def _shifted(u, window, WIDTH: tl.constexpr):
    """The window one step later."""
    later = ()
    for j in tl.static_range(WIDTH - 1):
        if j == 0:
            later = later + (u,)
        else:
            later = later + (window[j - 1],)
    return later


@triton.jit
def _silu_slope(value):
    s = sigmoid(value)
    return s * (1.0 + value * (1.0 - s))


@triton.jit(do_not_specialize=_CHANGING)
def locate(cu_seqlens, n_sequences, length, bits, places, BLOCK: tl.constexpr):
    """`places`: of each row the last sequence that begins at it or before, and the bounds of that."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < length
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(bits):
        candidate = found + (1 << (bits - 1 - i))
        known = candidate < n_sequences
        begin = tl.load(cu_seqlens + candidate, mask=known, other=0).to(tl.int32)
        found = tl.where(known & (begin <= row), candidate, found)
    tl.store(places + row, found, mask=inside)
    tl.store(places + length + row, tl.load(cu_seqlens + found, mask=inside, other=0).to(tl.int32), mask=inside)
    tl.store(places + 2 * length + row, tl.load(cu_seqlens + found + 1, mask=inside, other=0).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def forward(
    x, x_batch, x_row, weight, bias, state, s_sequence, s_channel, s_step, places, y, y_batch, y_row,
    length, channels, blocks_of_channels, runs, steps,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y; `steps` is a multiple of UNROLL, and `runs` is how many programs share a row of the batch."""
    pid = tl.program_id(0)
    c = (pid % blocks_of_channels) * BLOCK + tl.arange(0, BLOCK)
    run = pid // blocks_of_channels
    n = run // runs
    first = ((run % runs) * LANES + tl.arange(0, LANES)) * steps
    x += n.to(tl.int64) * x_batch
    y += n.to(tl.int64) * y_batch
    columns = _weights(weight, c, channels, WIDTH)
    offset = _bias(bias, c, channels, BLOCK)
    window = _window(
        x, x_row, state, s_sequence, s_channel, s_step, places, n, length, first, c, channels, REVERSE, WIDTH
    )
    for i in range(0, steps, UNROLL):
        inputs = ()
        for k in tl.static_range(UNROLL):
            p = first + i + k
            row = length - 1 - p if REVERSE else p
            valid = (p < length)[:, None] & (c < channels)[None, :]
            inputs = inputs + (tl.load(x + row.to(tl.int64)[:, None] * x_row + c[None, :], mask=valid, other=0.0),)
        for k in tl.static_range(UNROLL):
            p = first + i + k
            row = length - 1 - p if REVERSE else p
            valid = (p < length)[:, None] & (c < channels)[None, :]
            u = inputs[k].to(tl.float32)
            if places is not None:
                where, begin, end = _place(places, p, length, n, REVERSE)
                starts = (p < length) & ((end - 1 == row) if REVERSE else (begin == row))
                window = _restarted(window, state, s_sequence, s_channel, s_step, where, starts, c, channels, WIDTH)
            value = _convolved(u, window, columns, offset, WIDTH)
            if SILU:
                value = value * sigmoid(value)
            tl.store(y + row.to(tl.int64)[:, None] * y_row + c[None, :], value.to(y.dtype.element_ty), mask=valid)
            window = _shifted(u, window, WIDTH)


@triton.jit(do_not_specialize=_CHANGING)
def backward(
    x, x_batch, x_row, weight, bias, state, s_sequence, s_channel, s_step, places, dy, dy_batch, dy_row, dfinal,
    dx, dx_batch, dx_row, partial,
    length, channels, blocks_of_channels, runs, steps,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx, and `partial` (programs, WIDTH + 1, channels): sums over a program's steps, of dweight's columns and dbias.

    `steps + WIDTH - 1` is a multiple of UNROLL. dfinal is (sequences, WIDTH - 1, channels), contiguous.
    """
    pid = tl.program_id(0)
    c = (pid % blocks_of_channels) * BLOCK + tl.arange(0, BLOCK)
    run = pid // blocks_of_channels
    n = run // runs
    first = ((run % runs) * LANES + tl.arange(0, LANES)) * steps
    x += n.to(tl.int64) * x_batch
    dy += n.to(tl.int64) * dy_batch
    dx += n.to(tl.int64) * dx_batch
    columns = _weights(weight, c, channels, WIDTH)
    offset = _bias(bias, c, channels, BLOCK)
    window = _window(
        x, x_row, state, s_sequence, s_channel, s_step, places, n, length, first, c, channels, REVERSE, WIDTH
    )
    pending = ()  # of the latest steps, what is known of dx, latest first
    for j in tl.static_range(WIDTH - 1):
        pending = pending + (tl.zeros([LANES, BLOCK], dtype=tl.float32),)
    sums = ()  # of the gradients of the columns, last column first
    for j in tl.static_range(WIDTH):
        sums = sums + (tl.zeros([LANES, BLOCK], dtype=tl.float32),)
    total = tl.zeros([LANES, BLOCK], dtype=tl.float32)

    for i in range(0, steps + WIDTH - 1, UNROLL):
        inputs = ()
        upstream = ()
        for k in tl.static_range(UNROLL):
            p = first + i + k
            row = (length - 1 - p if REVERSE else p).to(tl.int64)[:, None]
            valid = (p < length)[:, None] & (c < channels)[None, :]
            inputs = inputs + (tl.load(x + row * x_row + c[None, :], mask=valid, other=0.0),)
            upstream = upstream + (tl.load(dy + row * dy_row + c[None, :], mask=valid, other=0.0),)
        for k in tl.static_range(UNROLL):
            p = first + i + k
            row = length - 1 - p if REVERSE else p
            where, begin, end = _place(places, p, length, n, REVERSE)
            since = end - 1 - row if REVERSE else row - begin
            u = inputs[k].to(tl.float32)
            if places is not None:
                starts = (p < length) & (since == 0)
                window = _restarted(window, state, s_sequence, s_channel, s_step, where, starts, c, channels, WIDTH)
            g = upstream[k].to(tl.float32)
            if SILU:
                g = g * _silu_slope(_convolved(u, window, columns, offset, WIDTH))

            # Steps after the program's own give to dx alone: another program sums them up.
            own = tl.where(i + k < steps, g, 0.0)
            total += own
            grown = ()
            for j in tl.static_range(WIDTH):
                if j == 0:
                    grown = grown + (sums[j] + own * u,)
                else:
                    grown = grown + (sums[j] + own * window[j - 1],)
            sums = grown

            known = ()
            for j in tl.static_range(WIDTH):
                part = columns[WIDTH - 1 - j] * g
                if j == 0:
                    if dfinal is not None:
                        left = row - begin if REVERSE else end - 1 - row
                        ending = (p < length) & (left < WIDTH - 1)
                        at = (where.to(tl.int64) * (WIDTH - 1) + (WIDTH - 2 - left))[:, None] * channels
                        mask = ending[:, None] & (c < channels)[None, :]
                        part += tl.load(dfinal + at + c[None, :], mask=mask, other=0.0).to(tl.float32)
                    known = known + (part,)
                else:
                    if places is not None:
                        part = tl.where((since >= j)[:, None], part, 0.0)
                    known = known + (pending[j - 1] + part,)
            done = p - (WIDTH - 1)
            row = (length - 1 - done if REVERSE else done).to(tl.int64)[:, None]
            mask = ((done >= first) & (done < length))[:, None] & (c < channels)[None, :]
            value = known[WIDTH - 1].to(dx.dtype.element_ty)
            tl.store(dx + row * dx_row + c[None, :], value, mask=mask)
            pending = ()
            for j in tl.static_range(WIDTH - 1):
                pending = pending + (known[j],)
            window = _shifted(u, window, WIDTH)

    for j in tl.static_range(WIDTH):
        at = (run.to(tl.int64) * (WIDTH + 1) + (WIDTH - 1 - j)) * channels + c
        tl.store(partial + at, tl.sum(sums[j], axis=0), mask=c < channels)
    if bias is not None:
        at = (run.to(tl.int64) * (WIDTH + 1) + WIDTH) * channels + c
        tl.store(partial + at, tl.sum(total, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=["programs", "channels"])
def gathered(partial, dweight, dbias, programs, channels, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight (channels, WIDTH) and dbias (channels,), contiguous: what `backward` left, summed over its programs."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1)  # WIDTH: dbias
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for i in range(0, programs, ROWS):
        row = i + tl.arange(0, ROWS)
        at = (row.to(tl.int64) * (WIDTH + 1) + k)[:, None] * channels + c[None, :]
        total += tl.load(partial + at, mask=(row < programs)[:, None] & (c < channels)[None, :], other=0.0)
    value = tl.sum(total, axis=0)
    if k < WIDTH:
        tl.store(dweight + c.to(tl.int64) * WIDTH + k, value.to(dweight.dtype.element_ty), mask=c < channels)
    elif dbias is not None:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=c < channels)


@triton.jit
def _bounds(cu_seqlens, sequence, valid, length):
    """Begin and end (lanes,) of whole sequences."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence, mask=valid, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1, mask=valid, other=0).to(tl.int32)
    else:
        begin = tl.zeros_like(sequence)
        end = begin + length
    return begin, end


@triton.jit(do_not_specialize=_CHANGING)
def final_state(
    x, x_batch, x_row, state, s_sequence, s_channel, s_step, cu_seqlens, n_sequences, final,
    length, channels, blocks_of_channels,
    REVERSE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """final (sequences, channels, WIDTH - 1), contiguous; a program takes LANES sequences."""
    pid = tl.program_id(0)
    c = (pid % blocks_of_channels) * BLOCK + tl.arange(0, BLOCK)
    sequence = (pid // blocks_of_channels) * LANES + tl.arange(0, LANES)
    valid = sequence < n_sequences
    begin, end = _bounds(cu_seqlens, sequence, valid, length)
    x += sequence.to(tl.int64)[:, None] * x_batch
    for i in tl.static_range(WIDTH - 1):
        value = _input(
            x, x_row, state, s_sequence, s_channel, s_step, sequence, begin, end, end - begin - (WIDTH - 1) + i, c,
            channels, valid, REVERSE, WIDTH,
        )  # fmt: skip
        at = (sequence.to(tl.int64)[:, None] * channels + c[None, :]) * (WIDTH - 1) + i
        tl.store(final + at, value, mask=valid[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def initial_gradient(
    x, x_batch, x_row, weight, bias, state, s_sequence, s_channel, s_step, cu_seqlens, n_sequences,
    dy, dy_batch, dy_row, dfinal, dinitial, length, channels, blocks_of_channels,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dinitial (sequences, channels, WIDTH - 1), contiguous; dfinal (sequences, WIDTH - 1, channels), contiguous."""
    pid = tl.program_id(0)
    c = (pid % blocks_of_channels) * BLOCK + tl.arange(0, BLOCK)
    sequence = (pid // blocks_of_channels) * LANES + tl.arange(0, LANES)
    valid = sequence < n_sequences
    begin, end = _bounds(cu_seqlens, sequence, valid, length)
    x += sequence.to(tl.int64)[:, None] * x_batch
    dy += sequence.to(tl.int64)[:, None] * dy_batch
    columns = _weights(weight, c, channels, WIDTH)
    offset = _bias(bias, c, channels, BLOCK)
    window = ()
    for j in tl.static_range(1, WIDTH):
        window = window + (
            _input(
                x, x_row, state, s_sequence, s_channel, s_step, sequence, begin, end, tl.zeros_like(begin) - j, c,
                channels, valid, REVERSE, WIDTH,
            ),
        )  # fmt: skip
    slopes = ()  # the gradients of what the first steps give before the activation
    for t in tl.static_range(WIDTH - 1):
        inside = valid & (begin + t < end)
        u = _input(
            x, x_row, state, s_sequence, s_channel, s_step, sequence, begin, end, tl.zeros_like(begin) + t, c, channels,
            inside, REVERSE, WIDTH,
        )  # fmt: skip
        row = end - 1 - t if REVERSE else begin + t
        mask = inside[:, None] & (c < channels)[None, :]
        g = tl.load(dy + row.to(tl.int64)[:, None] * dy_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if SILU:
            g = g * _silu_slope(_convolved(u, window, columns, offset, WIDTH))
        slopes = slopes + (g,)
        window = _shifted(u, window, WIDTH)
    for m in tl.static_range(WIDTH - 1):
        value = tl.zeros([LANES, BLOCK], dtype=tl.float32)
        if dfinal is not None:  # of a sequence that is too short to push this input out
            i = m - (end - begin)
            mask = (valid & (i >= 0))[:, None] & (c < channels)[None, :]
            at = (sequence.to(tl.int64) * (WIDTH - 1) + i)[:, None] * channels + c[None, :]
            value += tl.load(dfinal + at, mask=mask, other=0.0).to(tl.float32)
        for t in tl.static_range(m + 1):
            value += columns[m - t] * slopes[t]
        at = (sequence.to(tl.int64)[:, None] * channels + c[None, :]) * (WIDTH - 1) + m
        tl.store(dinitial + at, value, mask=valid[:, None] & (c < channels)[None, :])
