# mypy: allow-untyped-defs
"""The Numba kernel of one step of Mamba-3's recurrence, in float32."""

from __future__ import annotations

import math

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.vector_math import FASTMATH

_ZERO, _ONE = np.float32(0), np.float32(1)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _channel(state, at, decay, old, now, last_B, B, at_B, C, d_state):
    """h = decay h + old B_before + now B for the states of one channel; returns h · C."""
    out = _ZERO
    for n in range(np.uint64(d_state)):
        h = decay * state[at + n] + old * last_B[at_B + n] + now * B[at_B + n]
        state[at + n] = h
        out += h * C[at_B + n]
    return out


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _decay(state, at, decay, d_state):
    for n in range(np.uint64(d_state)):
        state[at + n] *= decay


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _add(state, at, old, now, last_B, B, at_B, d_state):
    for n in range(np.uint64(d_state)):
        state[at + n] += old * last_B[at_B + n] + now * B[at_B + n]


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _read(state, at, C, at_C, d_state):
    out = _ZERO
    for n in range(np.uint64(d_state)):
        out += state[at + n] * C[at_C + n]
    return out


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def trapezoidal_update(first, end, state, x, last_x, dt, A, trap, B, C, last_B, rank, head_dim, d_state, y):
    """Rows and heads first to end, counted through; all flat and contiguous."""
    for line in range(first, end):
        decay = np.float32(math.exp(dt[line] * A[line]))
        now, old = trap[line] * dt[line], (_ONE - trap[line]) * dt[line] * decay
        for p in range(head_dim):
            at = np.uint64((line * head_dim + p) * d_state)
            if rank == 1:
                here, at_B = np.uint64(line * head_dim + p), np.uint64(line * d_state)
                y[here] = _channel(state, at, decay, old * last_x[here], now * x[here], last_B, B, at_B, C, d_state)
                continue
            _decay(state, at, decay, d_state)
            for r in range(rank):
                here, at_B = np.uint64((line * rank + r) * head_dim + p), np.uint64((line * rank + r) * d_state)
                _add(state, at, old * last_x[here], now * x[here], last_B, B, at_B, d_state)
            for r in range(rank):
                here, at_B = np.uint64((line * rank + r) * head_dim + p), np.uint64((line * rank + r) * d_state)
                y[here] = _read(state, at, C, at_B, d_state)
