# mypy: allow-untyped-defs
"""Numba kernels of single steps, computed in float32.

Parameters come as float32 or as the 16 bits of bfloat16; a kernel is compiled for each. States are flat; x, dt and z
of the single ops have strides between their rows.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from mambaseq.ops.cpu.intrinsics import fetch_add, load, prefetch_line
from mambaseq.ops.cpu.kept import inner_njit, kept_njit
from mambaseq.ops.cpu.team import STRIDE
from mambaseq.ops.cpu.vector_math import FASTMATH, LOG2_E, decayed, exp2, sigmoid, softplus

_ZERO = np.float32(0)
# The usual number of states: a loop of this constant length becomes vector instructions without a rest.
_LANES = np.uint64(16)
# Bytes of weights that are asked for before they are read: by itself the processor looks ahead too little.
_AHEAD, _LINE = 8192, 64


def widen(value):
    """A parameter as float32; the bits of a bfloat16 are the upper half of a float32's."""
    return value if isinstance(value, np.floating) else np.uint32(np.uint32(value) << 16).view(np.float32)


@overload(widen, inline="always")
def _widen(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.int32(np.int32(value) << 16).view(np.float32)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _dot(weight, x):
    total = _ZERO
    for i in range(weight.shape[0]):
        total += widen(weight[i]) * x[i]
    return total


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _fetch(weight, row, low, high):
    """Start fetching columns low to high of the row that is read some rows after this one."""
    size = weight.itemsize
    at = (row + max(1, _AHEAD // ((high - low) * size))) * weight.shape[1]
    for i in range(low, high, _LINE // size):
        prefetch_line(weight, at + i)


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def linear(counters, size, x, weight, y):
    """y = x @ weight.T, `size` rows of the weight at a time; x `(rows, in)`, weight `(out, in)`, y `(rows, out)`."""
    n_out = weight.shape[0]
    n_blocks = (n_out + size - 1) // size
    block = fetch_add(counters, 0)
    while block < n_blocks:
        for o in range(block * size, min((block + 1) * size, n_out)):
            w = weight[o]
            _fetch(weight, o, 0, x.shape[1])
            for r in range(x.shape[0]):
                y[r, o] = _dot(w, x[r])
        fetch_add(counters, STRIDE)
        block = fetch_add(counters, 0)
    while load(counters, STRIDE) < n_blocks:
        pass


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _conv_channel(state, at, weight, at_weight, now, before):
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
def _update_channel(state, at, exponent, A, at_A, drive, B, C, at_B, at_C, d_state):
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
            y[b * channels + c] = _update_channel(
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
            out = _conv_channel(
                state, (b * channels + c) * before, weight, c * (before + 1), x[b * x_stride + c], before
            )
            if has_bias:
                out += bias[c]
            y[b * channels + c] = out * sigmoid(out) if silu else out


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def sum_of_blocks(partial, y):
    """`(blocks, rows, n)` → y `(rows, n)`, in the order of the blocks whichever thread did them."""
    for r in range(y.shape[0]):
        for o in range(y.shape[1]):
            y[r, o] = partial[0, r, o]
        for block in range(1, partial.shape[0]):
            for o in range(y.shape[1]):
                y[r, o] += partial[block, r, o]


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def mamba_block(
    counters,
    size,
    x,
    in_proj,
    in_bias,
    has_in_bias,
    conv,
    conv_bias,
    has_conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A_log,
    D,
    out_proj,
    conv_state,
    state,
    inner,
    shares,
    out_shares,
    in_order,
):
    """One step of a Mamba block, `size` channels at a time; a channel's way stops once, where x_proj needs them all.

    x `(rows, d_model)`; inner `(rows, 2 d_inner)`; shares `(blocks, rows, dt_rank + 2 d_state)` and out_shares
    `(blocks, rows, d_model)`: what each block of channels adds to x_proj's and out_proj's results. conv, A_log and
    the states are flat. in_order: the rows are positions of one sequence, each of which goes on from the state of the
    one before.
    """
    rows, channels, n_blocks = x.shape[0], inner.shape[1] // 2, shares.shape[0]
    n_projected, dt_rank = x_proj.shape[0], dt_proj.shape[1]
    d_state = (n_projected - dt_rank) // 2
    before = conv.shape[0] // channels - 1

    block = fetch_add(counters, 0)
    while block < n_blocks:
        low, high = block * size, min((block + 1) * size, channels)
        for half in (0, channels):
            for c in range(half + low, half + high):
                w = in_proj[c]
                _fetch(in_proj, c, 0, x.shape[1])
                for r in range(rows):
                    inner[r, c] = _dot(w, x[r]) + (widen(in_bias[c]) if has_in_bias else _ZERO)
        for r in range(rows):
            for c in range(low, high):
                at, at_weight = (r * channels + c) * before, c * (before + 1)
                if in_order and r:
                    for k in range(before):
                        conv_state[at + k] = conv_state[at - channels * before + k]
                out = _conv_channel(conv_state, at, conv, at_weight, inner[r, c], before)
                if has_conv_bias:
                    out += widen(conv_bias[c])
                inner[r, c] = out * sigmoid(out)
            for o in range(n_projected):
                _fetch(x_proj, o, low, high)
                shares[block, r, o] = _dot(x_proj[o, low:high], inner[r, low:high])
        fetch_add(counters, STRIDE)
        block = fetch_add(counters, 0)
    while load(counters, STRIDE) < n_blocks:
        pass

    projected = np.empty((rows, n_projected), dtype=np.float32)
    sum_of_blocks(shares, projected)
    decay, delta = np.empty(d_state, dtype=np.float32), np.empty(size, dtype=np.float32)
    at_B, at_C = np.uint64(dt_rank), np.uint64(dt_rank + d_state)
    block = fetch_add(counters, 2 * STRIDE)
    while block < n_blocks:
        low, high = block * size, min((block + 1) * size, channels)
        for r in range(rows):
            row, dbc = inner[r], projected[r]
            for c in range(low, high):
                _fetch(dt_proj, c, 0, dt_rank)
                delta[c - low] = _dot(dt_proj[c], dbc[:dt_rank]) + widen(dt_bias[c])
            for c in range(high - low):
                delta[c] = softplus(delta[c])
            for c in range(low, high):
                for k in range(d_state):
                    decay[k] = -exp2(widen(A_log[c * d_state + k]) * LOG2_E)
                dt, u = delta[c - low], row[c]
                if in_order and r:
                    for k in range((r * channels + c) * d_state, (r * channels + c + 1) * d_state):
                        state[k] = state[k - channels * d_state]
                at = np.uint64((r * channels + c) * d_state)
                out = _update_channel(
                    state, at, dt * LOG2_E, decay, np.uint64(0), dt * u, dbc, dbc, at_B, at_C, d_state
                )
                gate = row[channels + c]
                row[c] = (out + widen(D[c]) * u) * gate * sigmoid(gate)
        for o in range(out_proj.shape[0]):
            w = out_proj[o, low:high]
            _fetch(out_proj, o, low, high)
            for r in range(rows):
                out_shares[block, r, o] = _dot(w, inner[r, low:high])
        fetch_add(counters, 3 * STRIDE)
        block = fetch_add(counters, 2 * STRIDE)
    while load(counters, 3 * STRIDE) < n_blocks:
        pass
