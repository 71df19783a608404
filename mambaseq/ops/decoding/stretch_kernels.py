# mypy: allow-untyped-defs
"""Position after position of sequences on a CPU: the phases of `stretch.py`, and the drawing of each token.

A thread takes some sequences, each by itself: what comes of one does not depend on the others. Parts of complex numbers
and states of channels are planes, `(parts, d_state, channels)`, so that loops run over channels.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import pointer
from mambaseq.ops.cpu.vector_math import FASTMATH, LOG2_E, exp2, sigmoid, softplus
from mambaseq.ops.decoding.stretch import COMPLEX, CONV, EMBEDS, GATED, GLU, LTI, MAMBA, OUT, SCAN, SWIGLU

# columns of a program: numbers, addresses of what all sequences share, addresses of what each has, and those' strides
NUMBERS = ("kind", "level", "rows", "cols", "normed", "flags", "n_states", "width", "held_cols", "pool")
SHARED = ("weight", "bias", "a", "b", "c", "D", "conv", "conv_bias", "up")
OWN = ("source", "out", "state", "conv_state", "residual", "window", "copy", "held")
_KIND, _LEVEL, _ROWS, _COLS, _NORMED, _FLAGS, _STATES, _WIDTH, _HELD_COLS, _POOL = range(10)
_WEIGHT, _BIAS, _A, _B, _C, _D, _CONV, _CONV_BIAS, _UP = range(10, 19)
_SOURCE, _OUT, _STATE, _CONV_STATE, _RESIDUAL, _WINDOW, _COPY, _HELD = range(19, 27)
_STRIDES = 8  # from an address to its stride
_ZERO, _ONE, _HALF, _ROOT = np.float32(0), np.float32(1), np.float32(0.5), np.float32(math.sqrt(0.5))
_LOWEST = np.float32(-87)  # below, a share is 0


@inner_njit(nogil=True)
def _array(address, size):
    return carray(pointer(address), (size,), dtype=np.float32)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _multiply(weight, rows, cols, x, scale, y):
    """y[row] = scale * weight[row] · x, four rows at a time."""
    o = 0
    while o + 4 <= rows:
        w = np.uint64(o * cols)
        w1, w2, w3 = w + np.uint64(cols), w + np.uint64(2 * cols), w + np.uint64(3 * cols)
        t0 = t1 = t2 = t3 = _ZERO
        for i in range(np.uint64(cols)):
            t0 += weight[w + i] * x[i]
            t1 += weight[w1 + i] * x[i]
            t2 += weight[w2 + i] * x[i]
            t3 += weight[w3 + i] * x[i]
        y[o], y[o + 1], y[o + 2], y[o + 3] = scale * t0, scale * t1, scale * t2, scale * t3
        o += 4
    while o < rows:
        w = np.uint64(o * cols)
        t0 = _ZERO
        for i in range(np.uint64(cols)):
            t0 += weight[w + i] * x[i]
        y[o] = scale * t0
        o += 1


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _add(y, values, n):
    for i in range(np.uint64(n)):
        y[i] += values[i]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _convolve(weight, has_bias, bias, state, width, rows, y):
    """The convolution's next outputs, through SiLU; its latest inputs y go into the state."""
    before = width - 1
    for r in range(rows):
        at, tap = r * before, r * width
        now = y[r]
        total = weight[tap + before] * now
        for k in range(before):
            total += weight[tap + k] * state[at + k]
        for k in range(before - 1):
            state[at + k] = state[at + k + 1]
        if before:
            state[at + before - 1] = now
        y[r] = total + bias[r] if has_bias else total
    for r in range(np.uint64(rows)):
        y[r] *= sigmoid(y[r])


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _real_states(a, b, c, h, rows, n, u, y):
    for k in range(n):
        at = np.uint64(k * rows)
        for r in range(np.uint64(rows)):
            now = a[at + r] * h[at + r] + b[at + r] * u[r]
            h[at + r] = now
            y[r] += c[at + r] * now


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _complex_states(a, b, c, h, rows, n, u, y):
    for k in range(n):
        at, other = np.uint64(k * rows), np.uint64((n + k) * rows)
        for r in range(np.uint64(rows)):
            real = a[at + r] * h[at + r] - a[other + r] * h[other + r] + b[at + r] * u[r]
            imaginary = a[at + r] * h[other + r] + a[other + r] * h[at + r] + b[other + r] * u[r]
            h[at + r] = real
            h[other + r] = imaginary
            y[r] += c[at + r] * real + c[other + r] * imaginary


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _selective_states(A, products, cols, delta, h, rows, n, u, y):
    """delta: of each channel; B and C are behind the `cols` numbers of the step size in `products`."""
    for k in range(n):
        at, B, C = np.uint64(k * rows), products[cols + k], products[cols + n + k]
        for r in range(np.uint64(rows)):
            now = exp2(LOG2_E * delta[r] * A[at + r]) * h[at + r] + delta[r] * u[r] * B
            h[at + r] = now
            y[r] += C * now


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _copy(to, values, n):
    for i in range(np.uint64(n)):
        to[i] = values[i]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _gate(y, gates, n, silu):
    """y times the sigmoid of the gates, or times silu of them."""
    for i in range(np.uint64(n)):
        y[i] *= sigmoid(gates[i]) * (gates[i] if silu else _ONE)


@inner_njit(nogil=True, error_model="numpy")
def _gelu(y, n):
    for i in range(n):
        y[i] = _HALF * y[i] * (_ONE + np.float32(math.erf(y[i] * _ROOT)))


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _scaled(to, values, scales, n):
    for i in range(np.uint64(n)):
        to[i] = scales[i] * values[i]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _scale(to, values, scale, n):
    for i in range(np.uint64(n)):
        to[i] = scale * values[i]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _inverse_root(x, n, eps):
    squares = _ZERO
    for i in range(np.uint64(n)):
        squares += x[i] * x[i]
    return _ONE / np.float32(math.sqrt(squares / np.float32(n) + eps))


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _softplus(y, n):
    for i in range(np.uint64(n)):
        y[i] = softplus(y[i])


@inner_njit(nogil=True)
def _own(p, field, b, size):
    """A tensor of sequence b."""
    return _array(p[field] + b * p[field + _STRIDES], size)


@inner_njit(nogil=True)
def _phase(p, eps, b, slot, one, two, three):
    """Run a phase for sequence b; one, two, three: working memory."""
    kind, rows, cols, flags, n = p[_KIND], p[_ROWS], p[_COLS], p[_FLAGS], p[_STATES]
    x, out = _own(p, _SOURCE, b, cols + 2 * n), _own(p, _OUT, b, rows)
    residual, copy = _own(p, _RESIDUAL, b, rows), _own(p, _COPY, b, rows)
    scale = _inverse_root(x, cols, eps) if p[_NORMED] else _ONE
    has_halves = kind in (MAMBA, CONV) or flags & GLU or flags & SWIGLU
    for half in range(2 if has_halves else 1):
        y = two if half else one
        if kind == LTI:
            _scale(y, x, scale, rows)
            continue
        _multiply(_array(p[_WEIGHT] + 4 * half * rows * cols, rows * cols), rows, cols, x, scale, y)
        if p[_BIAS]:
            _add(y, _array(p[_BIAS] + 4 * half * rows, rows), rows)
    if kind == OUT:
        if flags & GLU:
            _gate(one, two, rows, False)
        _add(one, residual, rows)
        if p[_WINDOW]:
            _copy(_array(p[_WINDOW] + b * p[_WINDOW + _STRIDES] + 4 * slot * rows, rows), one, rows)
        if p[_HELD]:
            size = p[_HELD_COLS]
            up, held = _array(p[_UP] + 4 * slot * rows * size, rows * size), _own(p, _HELD, b, size)
            _multiply(up, rows, size, held, _ONE, two)
            _add(one, two, rows)
        if p[_COPY]:
            _copy(copy, one, rows)
    elif kind == GATED:
        if flags & SWIGLU:
            _gate(two, one, rows, True)
            one = two
        else:
            _gelu(one, rows)
    elif kind in (MAMBA, CONV):
        width = p[_WIDTH]
        taps, conv_bias = _array(p[_CONV], rows * width), _array(p[_CONV_BIAS], rows)
        past = _own(p, _CONV_STATE, b, rows * (width - 1))
        _convolve(taps, p[_CONV_BIAS] != 0, conv_bias, past, width, rows, one)
        if kind == CONV:
            _copy(copy, two, rows)
            _gate(copy, two, rows, False)
    if kind in (MAMBA, LTI, SCAN):
        size = (2 if flags & COMPLEX else 1) * n * rows
        a, h, D = _array(p[_A], size), _own(p, _STATE, b, size), _array(p[_D], rows)
        if kind == SCAN:
            _softplus(one, rows)
            _scaled(three, residual, D, rows)
            _selective_states(a, x, cols, one, h, rows, n, residual, three)
            _scaled(three, three, copy, rows)
        else:
            B, C = _array(p[_B], size), _array(p[_C], size)
            _scaled(three, one, D, rows)
            if flags & COMPLEX:
                _complex_states(a, B, C, h, rows, n, one, three)
            else:
                _real_states(a, B, C, h, rows, n, one, three)
            if kind == MAMBA:
                _gate(three, two, rows, True)
            else:
                _gelu(three, rows)
        one = three
    _copy(out, one, rows)


@inner_njit(nogil=True)
def _likeliest_first(values, order):
    """Sort order, the indices of values, by falling value, then by index (Shell's sort)."""
    n = len(order)
    for i in range(n):
        order[i] = i
    gap = n // 2
    while gap:
        for i in range(gap, n):
            moved, j = order[i], i
            while j >= gap and (
                values[order[j - gap]] < values[moved]
                or (values[order[j - gap]] == values[moved] and order[j - gap] > moved)
            ):
                order[j] = order[j - gap]
                j -= gap
            order[j] = moved
        gap //= 2


@inner_njit(nogil=True)
def _draw(logits, inverse, top_k, top_p, uniform, shares, order):
    """As `mambaseq.generation.sampling.sample`; uniform below 0 takes the likeliest. -1 for logits that are no finite
    numbers."""
    n = len(logits)
    best = 0
    for i in range(n):
        if not logits[i] <= logits[best]:
            best = i
        if math.isnan(logits[i]):
            return -1
    most = logits[best]
    if math.isinf(most):
        return -1
    if uniform < 0:
        return best
    total = _ZERO
    for i in range(n):
        scaled = np.float32(np.float64(logits[i] - most) * inverse) if logits[i] != most else _ZERO
        shares[i] = exp2(scaled * LOG2_E) if scaled > _LOWEST else _ZERO
    if 0 < top_k < n or top_p < 1:
        _likeliest_first(shares, order)
        if 0 < top_k < n:
            least = shares[order[top_k - 1]]
            for i in range(n):
                if shares[i] < least:
                    shares[i] = _ZERO
        if top_p < 1:
            for i in range(n):
                total += shares[i]
            upto = _ZERO
            for i in range(n):
                share = shares[order[i]] / total
                upto += share
                if upto - share >= top_p:
                    shares[order[i]] = _ZERO
    total = _ZERO
    for i in range(n):
        total += shares[i]
    whole = 0.0
    for i in range(n):
        shares[i] /= total
        whole += np.float64(shares[i])
    goal, upto64 = uniform * whole, 0.0
    last = best
    for i in range(n):
        upto64 += np.float64(shares[i])
        if upto64 > goal:
            return i
        if shares[i] > 0:
            last = i
    return last


@kept_njit(nogil=True, error_model="numpy")
def stretch(
    program,
    eps,
    widest,
    embedding,
    condition,
    has_condition,
    logits_at,
    logits_stride,
    counts,
    pools,
    first,
    last,
    temperature,
    top_k,
    top_p,
    uniforms,
    token,
    tokens,
    failed,
):
    """Sequences `[first, last)`. program `(phases, columns)` int64, eps `(phases,)`; embedding `(vocabulary, d_model)`,
    condition `(batch, d_model)`; counts: places in the pools' windows; uniforms `(batch, steps)` float64, token
    `(batch,)`, tokens `(batch, steps)`; failed `(batch,)`: a logit was no finite number."""
    n_phases, n_pools, n_steps = program.shape[0], pools.shape[0], tokens.shape[1]
    vocabulary, d_model = embedding.shape
    one, two, three = (
        np.empty(widest, dtype=np.float32),
        np.empty(widest, dtype=np.float32),
        np.empty(widest, dtype=np.float32),
    )
    shares, order = np.empty(vocabulary, dtype=np.float32), np.empty(vocabulary, dtype=np.int64)
    count = counts.copy()
    inverse = 1.0 / temperature if temperature > 0 else 0.0
    now = token.copy()
    for step in range(n_steps):
        whole = 0
        while whole < n_pools and count[whole] + 1 == pools[whole]:
            whole += 1
        for k in range(n_phases):
            p = program[k]
            if p[_LEVEL] > whole:
                continue
            slot = count[p[_POOL]] if p[_POOL] >= 0 else 0
            for b in range(first, last):
                if p[_FLAGS] & EMBEDS:
                    x = _array(p[_SOURCE] + b * p[_SOURCE + _STRIDES], d_model)
                    for i in range(d_model):
                        x[i] = embedding[now[b], i] + (condition[b, i] if has_condition else _ZERO)
                _phase(p, eps[k], b, slot, one, two, three)
        for b in range(first, last):
            logits = _array(logits_at + 4 * b * logits_stride, vocabulary)
            uniform = uniforms[b, step] if temperature > 0 else -1.0
            drawn = _draw(logits, inverse, top_k, top_p, uniform, shares, order)
            if drawn < 0:
                failed[b] = 1
                drawn = 0
            tokens[b, step] = drawn
            now[b] = drawn
        for i in range(n_pools):
            if i <= whole:
                count[i] = (count[i] + 1) % pools[i]
