# mypy: allow-untyped-defs
"""Numba kernel of a step of Mamba-1 layers, one after the other, by all threads: between its parts threads wait for
each other, and nothing goes back to Python, which would take as long as a small part does.

Computed in float32; parameters are float32 or the 16 bits of bfloat16. Their addresses come in a table, a row a layer.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import fetch_add, pointer
from mambaseq.ops.cpu.team import STRIDE, wait
from mambaseq.ops.cpu.vector_math import FASTMATH, LOG2_E, exp2, sigmoid, softplus
from mambaseq.ops.decoding.kernels import arrange, conv_channel, multiply, update_channel, widen

# Columns of the table: sizes; addresses of parameters (0: there is none), in the order of `block.Layer`, and of states.
_D_MODEL, _D_INNER, _D_STATE, _DT_RANK, _BEFORE, _NORM, _IN_PROJ, _IN_BIAS, _CONV, _CONV_BIAS = range(10)
_X_PROJ, _DT_PROJ, _DT_BIAS, _A_LOG, _D, _OUT_PROJ, _OUT_BIAS, _CONV_STATE, _STATE, COLUMNS = range(10, 20)

# what a thread takes at a time: channels, rows of x_proj, rows of out_proj
CHANNELS, PROJECTED, OUTPUTS = 64, 8, 32
# parts of a layer, and counters of each: what was begun, and what is done
PARTS = 4
COUNTERS = 2 * PARTS * STRIDE
_ZERO, _ONE = np.float32(0), np.float32(1)


@inner_njit(nogil=True)
def _parameter(address, size, like):
    return carray(pointer(address), (size,), dtype=like.dtype)


@inner_njit(nogil=True)
def _numbers(address, size):
    return carray(pointer(address), (size,), dtype=np.float32)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _normed(stream, r, n, weight, has_weight, eps, to):
    """to = the RMSNorm of a row; the row itself without a weight."""
    scale = _ONE
    if has_weight:
        squares = _ZERO
        for i in range(np.uint64(n)):
            squares += stream[r, i] * stream[r, i]
        scale = _ONE / np.float32(math.sqrt(squares / np.float32(n) + eps))
    for i in range(np.uint64(n)):
        to[i] = stream[r, i] * scale * (widen(weight[i]) if has_weight else _ONE)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _add(bias, first, last, y):
    for r in range(y.shape[0]):
        for o in range(first, last):
            y[r, o] += widen(bias[o])


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _gates(inner, r, low, high):
    for c in range(np.uint64(low), np.uint64(high)):
        inner[r, c] *= sigmoid(inner[r, c])


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _decays(A_log, low, high, d_state, decay):
    at = np.uint64(low * d_state)
    for k in range(np.uint64((high - low) * d_state)):
        decay[k] = -exp2(widen(A_log[at + k]) * LOG2_E)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _steps(delta, n, bias, low):
    for c in range(np.uint64(n)):
        delta[c] = softplus(delta[c] + widen(bias[np.uint64(low) + c]))


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def mamba_layers(counters, table, eps, like, stream, out, adds, in_order, inner, projected):
    """A step of each layer of the table.

    counters `(layers * COUNTERS,)` zeros; table `(layers, columns)` int64; eps `(layers,)` of the norms; like: an array
    of the parameters' kind; stream and out `(rows, d_model)`, what goes in and what comes out, or, if `adds`, is added
    to out, which is the stream then; inner `(rows, 2 d_inner)` and projected `(rows, dt_rank + 2 d_state)` working
    memory that threads share. in_order: the rows are positions of one sequence, each of which goes on from the state of
    the one before.
    """
    rows = stream.shape[0]
    widest = max(stream.shape[1], inner.shape[1] // 2, projected.shape[1])
    plain, x = np.empty(widest, dtype=np.float32), np.empty(rows * widest, dtype=np.float32)
    deltas = np.empty((rows, CHANNELS), dtype=np.float32)
    decay = np.empty(CHANNELS * (projected.shape[1] // 2), dtype=np.float32)
    for number in range(table.shape[0]):
        p = table[number]
        d_model, channels, d_state, dt_rank, before = p[_D_MODEL], p[_D_INNER], p[_D_STATE], p[_DT_RANK], p[_BEFORE]
        n_projected = dt_rank + 2 * d_state
        at = number * COUNTERS
        n_blocks = (channels + CHANNELS - 1) // CHANNELS

        # the norm, in_proj and the convolution
        weight, bias = (
            _parameter(p[_IN_PROJ], 2 * channels * d_model, like),
            _parameter(p[_IN_BIAS], 2 * channels, like),
        )
        conv, conv_bias = (
            _parameter(p[_CONV], channels * (before + 1), like),
            _parameter(p[_CONV_BIAS], channels, like),
        )
        conv_state = _numbers(p[_CONV_STATE], rows * channels * before)
        block = fetch_add(counters, at)
        if block < n_blocks:
            for r in range(rows):
                _normed(stream, r, d_model, _parameter(p[_NORM], d_model, like), p[_NORM] != 0, eps[number], plain)
                arrange(x, r * d_model, plain, d_model, like)
        while block < n_blocks:
            low, high = block * CHANNELS, min((block + 1) * CHANNELS, channels)
            for half in (0, channels):
                multiply(weight, half + low, half + high, d_model, x, inner, 0, False)
                if p[_IN_BIAS]:
                    _add(bias, half + low, half + high, inner)
            for r in range(rows):
                for c in range(low, high):
                    here = (r * channels + c) * before
                    if in_order and r:
                        for k in range(before):
                            conv_state[here + k] = conv_state[here - channels * before + k]
                    made = conv_channel(conv_state, here, conv, c * (before + 1), inner[r, c], before)
                    inner[r, c] = made + widen(conv_bias[c]) if p[_CONV_BIAS] else made
                _gates(inner, r, low, high)
                _gates(inner, r, channels + low, channels + high)
            fetch_add(counters, at + STRIDE)
            block = fetch_add(counters, at)
        wait(counters, at + STRIDE, n_blocks)
        at += 2 * STRIDE

        # x_proj
        n_parts = (n_projected + PROJECTED - 1) // PROJECTED
        weight = _parameter(p[_X_PROJ], n_projected * channels, like)
        block = fetch_add(counters, at)
        if block < n_parts:
            for r in range(rows):
                arrange(x, r * channels, inner[r], channels, like)
        while block < n_parts:
            last = min((block + 1) * PROJECTED, n_projected)
            multiply(weight, block * PROJECTED, last, channels, x, projected, 0, False)
            fetch_add(counters, at + STRIDE)
            block = fetch_add(counters, at)
        wait(counters, at + STRIDE, n_parts)
        at += 2 * STRIDE

        # dt_proj, the states and the gates
        weight, bias = _parameter(p[_DT_PROJ], channels * dt_rank, like), _parameter(p[_DT_BIAS], channels, like)
        A_log, D = _parameter(p[_A_LOG], channels * d_state, like), _parameter(p[_D], channels, like)
        state = _numbers(p[_STATE], rows * channels * d_state)
        B, C = np.uint64(dt_rank), np.uint64(dt_rank + d_state)
        block = fetch_add(counters, at)
        if block < n_blocks:
            for r in range(rows):
                arrange(x, r * dt_rank, projected[r], dt_rank, like)
        while block < n_blocks:
            low, high = block * CHANNELS, min((block + 1) * CHANNELS, channels)
            _decays(A_log, low, high, d_state, decay)
            multiply(weight, low, high, dt_rank, x, deltas, low, False)
            for r in range(rows):
                row, made, delta = inner[r], projected[r], deltas[r]
                _steps(delta, high - low, bias, low)
                for c in range(low, high):
                    here, u, dt = (r * channels + c) * d_state, row[c], delta[c - low]
                    if in_order and r:
                        for k in range(here, here + d_state):
                            state[k] = state[k - channels * d_state]
                    y = update_channel(
                        state,
                        np.uint64(here),
                        dt * LOG2_E,
                        decay,
                        np.uint64((c - low) * d_state),
                        dt * u,
                        made,
                        made,
                        B,
                        C,
                        d_state,
                    )
                    row[c] = (y + widen(D[c]) * u) * row[channels + c]
            fetch_add(counters, at + STRIDE)
            block = fetch_add(counters, at)
        wait(counters, at + STRIDE, n_blocks)
        at += 2 * STRIDE

        # out_proj
        n_parts = (d_model + OUTPUTS - 1) // OUTPUTS
        weight, bias = _parameter(p[_OUT_PROJ], d_model * channels, like), _parameter(p[_OUT_BIAS], d_model, like)
        block = fetch_add(counters, at)
        if block < n_parts:
            for r in range(rows):
                arrange(x, r * channels, inner[r], channels, like)
        while block < n_parts:
            first, last = block * OUTPUTS, min((block + 1) * OUTPUTS, d_model)
            multiply(weight, first, last, channels, x, out, 0, adds)
            if p[_OUT_BIAS]:
                _add(bias, first, last, out)
            fetch_add(counters, at + STRIDE)
            block = fetch_add(counters, at)
        wait(counters, at + STRIDE, n_parts)
