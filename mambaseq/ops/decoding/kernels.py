# mypy: allow-untyped-defs
"""Numba kernels of single steps, computed in float32.

Parameters come as float32 or as the 16 bits of bfloat16; a kernel is compiled for each. States are flat; x, dt and z
of the single ops have strides between their rows.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import fetch_add, load_pair, prefetch_line
from mambaseq.ops.cpu.team import STRIDE, wait
from mambaseq.ops.cpu.vector_math import FASTMATH, LOG2_E, decayed, sigmoid, softplus

_ZERO = np.float32(0)
# The usual number of states: a loop of this constant length becomes vector instructions without a rest.
_LANES = np.uint64(16)
# Bytes of weights that are asked for before they are read: by itself the processor looks ahead too little.
_AHEAD, _LINE = 8192, 64
_UP, _UPPER = np.uint32(16), np.uint32(0xFFFF0000)


def widen(value):
    """A parameter as float32; the bits of a bfloat16 are the upper half of a float32's."""
    return value if isinstance(value, np.floating) else np.uint32(np.uint32(value) << 16).view(np.float32)


@overload(widen, inline="always")
def _widen(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.int32(np.int32(value) << 16).view(np.float32)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _dots_of_floats(weight, at, other, n, x, at_x):
    first, second, x_first = np.uint64(at), np.uint64(other), np.uint64(at_x)
    one, two = _ZERO, _ZERO
    for i in range(np.uint64(n)):
        one += weight[first + i] * x[x_first + i]
        two += weight[second + i] * x[x_first + i]
    return one, two


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _dots_of_halves(weight, at, other, n, x, at_x):
    """Two numbers are read as one, whose halves are float32's upper ones, so that none has to change its place; without
    the last of an odd number of them."""
    first, second = np.uint64(at), np.uint64(other)
    half = np.uint64(n) >> np.uint64(1)
    even = np.uint64(at_x)
    odd = even + np.uint64(n) - half
    one, one_odd, two, two_odd = _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(half):
        pair, others = load_pair(weight, first + np.uint64(2) * i), load_pair(weight, second + np.uint64(2) * i)
        one += np.uint32(pair << _UP).view(np.float32) * x[even + i]
        one_odd += np.uint32(pair & _UPPER).view(np.float32) * x[odd + i]
        two += np.uint32(others << _UP).view(np.float32) * x[even + i]
        two_odd += np.uint32(others & _UPPER).view(np.float32) * x[odd + i]
    return one + one_odd, two + two_odd


def _dots(weight, at, other, n, x, at_x):
    """`n` numbers of a flat weight from `at` on, and from `other` on, times those of an `arrange`d vector: two rows at
    once, whose loop costs what one's does."""


@overload(_dots, inline="always")
def _typed_dots(weight, at, other, n, x, at_x):
    if isinstance(weight.dtype, types.Float):
        return lambda weight, at, other, n, x, at_x: _dots_of_floats(weight, at, other, n, x, at_x)
    return lambda weight, at, other, n, x, at_x: _dots_of_halves(weight, at, other, n, x, at_x)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def arrange(to, at, source, n, like):
    """A vector of `n` numbers as products with weights of the kind of `like` read it: in its order, or first those of
    even and then those of odd places."""
    if like.itemsize == 4:
        for i in range(n):
            to[at + i] = source[i]
    else:
        half = (n + 1) // 2
        for i in range(half):
            to[at + i] = source[2 * i]
        for i in range(n // 2):
            to[at + half + i] = source[2 * i + 1]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def multiply(weight, first, last, n, x, y, shift, adds):
    """y[r, o - shift] = weight[o] · x[r], or added to it, of rows o of a flat weight `(..., n)`; x flat, `arrange`d.

    Each row of y is computed as if it were alone.
    """
    size = weight.itemsize
    ahead = max(1, _AHEAD // (n * size)) * n
    has_last = size == 2 and n % 2 == 1
    for o in range(first, last, 2):
        at, both = o * n, o + 1 < last
        other = at + n if both else at
        for i in range(at + ahead, at + ahead + 2 * n, _LINE // size):
            prefetch_line(weight, i)
        for r in range(y.shape[0]):
            one, two = _dots(weight, at, other, n, x, r * n)
            if has_last:
                one += widen(weight[at + n - 1]) * x[r * n + n // 2]
                two += widen(weight[other + n - 1]) * x[r * n + n // 2]
            y[r, o - shift] = y[r, o - shift] + one if adds else one
            if both:
                y[r, o + 1 - shift] = y[r, o + 1 - shift] + two if adds else two


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def linear(counters, size, x, weight, y):
    """y = x @ weight.T, `size` rows of the weight at a time; x `(rows, in)`, weight of `(out, in)` flat, y `(rows,
    out)`."""
    rows, n = x.shape
    n_out = y.shape[1]
    n_blocks = (n_out + size - 1) // size
    arranged = np.empty(rows * n, dtype=np.float32)
    block = fetch_add(counters, 0)
    if block < n_blocks:
        for r in range(rows):
            arrange(arranged, r * n, x[r], n, weight)
    while block < n_blocks:
        multiply(weight, block * size, min((block + 1) * size, n_out), n, arranged, y, 0, False)
        fetch_add(counters, STRIDE)
        block = fetch_add(counters, 0)
    wait(counters, STRIDE, n_blocks)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def conv_channel(state, at, weight, at_weight, now, before):
    """The convolution's output of one channel; shifts its latest input into the state."""
    out = widen(weight[at_weight + before]) * now
    for k in range(before):
        out += widen(weight[at_weight + k]) * state[at + k]
    for k in range(before - 1):
        state[at + k] = state[at + k + 1]
    if before:
        state[at + before - 1] = now
    return out


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def update_channel(state, at, exponent, A, at_A, drive, B, C, at_B, at_C, d_state):
    """h = 2^(exponent A) h + drive B for the states of one channel; returns h · C."""
    out = _ZERO
    for start in range(0, d_state - 15, 16):
        first = np.uint64(start)
        for k in range(first, first + _LANES):
            h = decayed(state[at + k], exponent * A[at_A + k], drive * B[at_B + k])
            state[at + k] = h
            out += h * C[at_C + k]
    for k in range(np.uint64(d_state // 16 * 16), np.uint64(d_state)):
        h = decayed(state[at + k], exponent * A[at_A + k], drive * B[at_B + k])
        state[at + k] = h
        out += h * C[at_C + k]
    return out


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def selective_state_update(
    state,
    x,
    x_stride,
    dt,
    dt_stride,
    A,
    B,
    C,
    groups,
    D,
    has_D,
    z,
    z_stride,
    dt_bias,
    has_bias,
    use_softplus,
    batch,
    channels,
    d_state,
    y,
    delta,
):
    """`delta` takes one row."""
    per_group = channels // groups
    n = np.uint64(channels)
    for b in range(batch):
        at_x, at_dt, at_z = np.uint64(b * x_stride), np.uint64(b * dt_stride), np.uint64(b * z_stride)
        at_y = np.uint64(b * channels)
        for c in range(n):
            delta[c] = dt[at_dt + c] + dt_bias[c] if has_bias else dt[at_dt + c]
        if use_softplus:
            for c in range(n):
                delta[c] = softplus(delta[c])
        for c in range(channels):
            at = np.uint64((b * channels + c) * d_state)
            at_B = np.uint64((b * groups + c // per_group) * d_state)
            drive = delta[c] * x[b * x_stride + c]
            y[b * channels + c] = update_channel(
                state, at, delta[c] * LOG2_E, A, np.uint64(c * d_state), drive, B, C, at_B, at_B, d_state
            )
        if has_D:
            for c in range(n):
                y[at_y + c] += D[c] * x[at_x + c]
        if z_stride:
            for c in range(n):
                y[at_y + c] *= z[at_z + c] * sigmoid(z[at_z + c])


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def causal_conv_update(state, x, x_stride, weight, bias, has_bias, silu, batch, channels, before, y):
    for b in range(batch):
        for c in range(channels):
            out = conv_channel(
                state, (b * channels + c) * before, weight, c * (before + 1), x[b * x_stride + c], before
            )
            if has_bias:
                out += bias[c]
            y[b * channels + c] = out * sigmoid(out) if silu else out
