# mypy: allow-untyped-defs
"""Numba kernels of single steps in float32; arrays are flat, x, dt and z have strides between their rows."""

from __future__ import annotations

import numpy as np
from numba import njit

from mambaseq.ops.vector_math import FASTMATH, LOG2_E, exp2m1, sigmoid, softplus

_ZERO = np.float32(0)
# The usual number of states: a loop of this constant length becomes vector instructions without a rest.
_LANES = np.uint64(16)


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
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
            exponent, drive = delta[c] * LOG2_E, delta[c] * x[b * x_stride + c]
            at = np.uint64((b * channels + c) * d_state)
            at_A = np.uint64(c * d_state)
            at_B = np.uint64((b * groups + c // per_group) * d_state)
            out = _ZERO
            for start in range(0, d_state - 15, 16):
                first = np.uint64(start)
                for k in range(first, first + _LANES):
                    h = state[at + k]
                    h = exp2m1(exponent * A[at_A + k]) * h + (h + drive * B[at_B + k])
                    state[at + k] = h
                    out += h * C[at_B + k]
            for k in range(np.uint64(d_state // 16 * 16), np.uint64(d_state)):
                h = state[at + k]
                h = exp2m1(exponent * A[at_A + k]) * h + (h + drive * B[at_B + k])
                state[at + k] = h
                out += h * C[at_B + k]
            y[b * channels + c] = out
        if has_D:
            for c in range(n):
                y[at_y + c] += D[c] * x[at_x + c]
        if z_stride:
            for c in range(n):
                y[at_y + c] *= z[at_z + c] * sigmoid(z[at_z + c])


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def causal_conv_update(state, x, x_stride, weight, bias, has_bias, silu, batch, channels, before, y):
    for b in range(batch):
        for c in range(channels):
            now = x[b * x_stride + c]
            at, at_weight = (b * channels + c) * before, c * (before + 1)
            out = weight[at_weight + before] * now
            if has_bias:
                out += bias[c]
            for k in range(before):
                out += weight[at_weight + k] * state[at + k]
            for k in range(before - 1):
                state[at + k] = state[at + k + 1]
            if before:
                state[at + before - 1] = now
            y[b * channels + c] = out * sigmoid(out) if silu else out
