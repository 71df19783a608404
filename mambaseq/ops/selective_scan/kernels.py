# mypy: allow-untyped-defs
"""Numba kernels of the selective scan: float32, real A.

Channels are worked on in blocks of `WIDTH`, the innermost loop, which LLVM turns into vector instructions; blocks that are
wider than their channels are filled with zeros. The rows of `CHUNK` time steps are first copied into a small array
(their cache misses overlap), then the recurrence runs on it with the states of the block in the first-level cache.

Memory, flat float32 arrays all of them:

- rows of x, dt, z, y and their gradients: channel `c` of row `i` at `i · stride + c`;
- B, C: `(rows, groups, n_states)`, n_states padded to a multiple of 4 with zeros;
- A2 = A · log2(e): `(blocks, n_states, WIDTH)`; D, bias: `(blocks, WIDTH)`;
- states: `(sequences, channels, d_state)`;
- `local`: for each step of a chunk a handful of rows ("slots") of WIDTH. Slots of one array lie at constant
  distances, which spares LLVM most checks whether arrays overlap.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mambaseq.ops.vector_math import FASTMATH, LN_2, LOG2_E, exp2m1, sigmoid, softplus

WIDTH = 64
CHUNK = 32

_W = np.uint64(WIDTH)
_W2, _W3, _W4, _W5 = np.uint64(2 * WIDTH), np.uint64(3 * WIDTH), np.uint64(4 * WIDTH), np.uint64(5 * WIDTH)
_W6, _W7 = np.uint64(6 * WIDTH), np.uint64(7 * WIDTH)
_ZERO, _ONE = np.float32(0), np.float32(1)

# Slots: step size, step size · x, output, gradient of the output before the gate, of step size · x, of A2's exponent.
SLOTS_FORWARD = 3
SLOTS_BACKWARD = 6
_OUT, _DOUT, _DINPUT, _DEXPONENT = _W2, _W3, _W4, _W5


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def forward(
    first_task,
    end_task,
    tasks,
    bounds,
    reverse,
    x,
    x_stride,
    dt,
    dt_stride,
    z,
    z_stride,
    B,
    C,
    groups,
    n_states,
    A2,
    D,
    bias,
    use_softplus,
    initial,
    has_initial,
    channels,
    d_state,
    y,
    final,
    h,
    local,
):
    """Tasks are rows (block, first channel, width, group, first sequence, end sequence)."""
    for task in range(first_task, end_task):
        block, c0, width, group, s0, s1 = tasks[task]
        local[:] = _ZERO
        for s in range(s0, s1):
            _load_state(h, initial, has_initial, s, channels, d_state, c0, width, n_states)
            length = bounds[s + 1] - bounds[s]
            for t0 in range(0, length, CHUNK):
                steps = min(CHUNK, length - t0)
                row, go = _first_row(bounds, s, t0, reverse)
                _load(
                    local,
                    SLOTS_FORWARD,
                    x,
                    x_stride,
                    dt,
                    dt_stride,
                    bias,
                    block,
                    use_softplus,
                    row,
                    go,
                    steps,
                    c0,
                    width,
                )
                _advance(
                    local, h, A2, block * n_states * WIDTH, B, C, row, go, steps, groups, group, n_states
                )
                _store(local, x, x_stride, z, z_stride, D, block, y, channels, row, go, steps, c0, width)
            _store_state(h, final, s, channels, d_state, c0, width)


@njit(fastmath=FASTMATH, error_model="numpy")
def _first_row(bounds, s, t0, reverse):
    """The row of step t0 of a sequence, and what to add for the next step."""
    if reverse:
        return bounds[s + 1] - 1 - t0, -1
    return bounds[s] + t0, 1


@njit(fastmath=FASTMATH, error_model="numpy")
def _load_state(h, state, present, s, channels, d_state, c0, width, n_states):
    h[: n_states * WIDTH] = _ZERO
    if present:
        for c in range(width):
            at = (s * channels + c0 + c) * d_state
            for n in range(d_state):
                h[n * WIDTH + c] = state[at + n]


@njit(fastmath=FASTMATH, error_model="numpy")
def _store_state(h, state, s, channels, d_state, c0, width):
    for c in range(width):
        at = (s * channels + c0 + c) * d_state
        for n in range(d_state):
            state[at + n] = h[n * WIDTH + c]


@njit(fastmath=FASTMATH, error_model="numpy")
def _load(local, slots, x, x_stride, dt, dt_stride, bias, block, use_softplus, row, go, steps, c0, width):
    for t in range(steps):
        at = np.uint64(t * slots * WIDTH)
        at_x = np.uint64((row + t * go) * x_stride + c0)
        at_dt = np.uint64((row + t * go) * dt_stride + c0)
        at_bias = np.uint64(block * WIDTH)
        if use_softplus:
            for c in range(np.uint64(width)):
                delta = softplus(dt[at_dt + c] + bias[at_bias + c])
                local[at + c] = delta
                local[at + _W + c] = delta * x[at_x + c]
        else:
            for c in range(np.uint64(width)):
                delta = dt[at_dt + c] + bias[at_bias + c]
                local[at + c] = delta
                local[at + _W + c] = delta * x[at_x + c]
        for c in range(_W):
            local[at + _OUT + c] = _ZERO


@njit(fastmath=FASTMATH, error_model="numpy")
def _advance(local, h, A2, at_A, B, C, row, go, steps, groups, group, n_states):
    for t in range(steps):
        at = np.uint64(t * SLOTS_FORWARD * WIDTH)
        at_B = ((row + t * go) * groups + group) * n_states
        for n in range(0, n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            i = np.uint64(n * WIDTH)
            a = np.uint64(at_A + n * WIDTH)
            for c in range(_W):
                delta, u = local[at + c], local[at + _W + c]
                h0, h1, h2, h3 = h[i + c], h[i + _W + c], h[i + _W2 + c], h[i + _W3 + c]
                h0 = exp2m1(delta * A2[a + c]) * h0 + (h0 + u * B0)
                h1 = exp2m1(delta * A2[a + _W + c]) * h1 + (h1 + u * B1)
                h2 = exp2m1(delta * A2[a + _W2 + c]) * h2 + (h2 + u * B2)
                h3 = exp2m1(delta * A2[a + _W3 + c]) * h3 + (h3 + u * B3)
                h[i + c], h[i + _W + c], h[i + _W2 + c], h[i + _W3 + c] = h0, h1, h2, h3
                local[at + _OUT + c] += (h0 * C0 + h1 * C1) + (h2 * C2 + h3 * C3)


@njit(fastmath=FASTMATH, error_model="numpy")
def _store(local, x, x_stride, z, z_stride, D, block, y, channels, row, go, steps, c0, width):
    for t in range(steps):
        at = np.uint64(t * SLOTS_FORWARD * WIDTH) + _OUT
        at_x = np.uint64((row + t * go) * x_stride + c0)
        at_z = np.uint64((row + t * go) * z_stride + c0)
        at_y = np.uint64((row + t * go) * channels + c0)
        at_D = np.uint64(block * WIDTH)
        if z_stride:
            for c in range(np.uint64(width)):
                gate = z[at_z + c]
                y[at_y + c] = (local[at + c] + D[at_D + c] * x[at_x + c]) * gate * sigmoid(gate)
        else:
            for c in range(np.uint64(width)):
                y[at_y + c] = local[at + c] + D[at_D + c] * x[at_x + c]


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def backward(
    first_task,
    end_task,
    tasks,
    bounds,
    reverse,
    x,
    x_stride,
    dt,
    dt_stride,
    z,
    z_stride,
    B,
    C,
    groups,
    n_states,
    A2,
    D,
    bias,
    use_softplus,
    initial,
    has_initial,
    channels,
    d_state,
    dy,
    dy_stride,
    dfinal,
    dx,
    ddt,
    dz,
    dB,
    dC,
    dA,
    dD,
    dbias,
    dinitial,
    h,
    local,
    entering,
    history,
    dstate,
):
    """Gradients; dA, dD and dbias are sums of a task, dB and dC of a block of channels.

    `entering` takes the states at the beginnings of the chunks of one sequence; `history`, for each step of a
    chunk and four states at a time, the state before the step and its decay minus 1; `dstate`, also four
    states at a time, the gradients of the state and of A2 (but for the factor ln 2).
    """
    rows = bounds[-1]
    for task in range(first_task, end_task):
        block, c0, width, group, s0, s1 = tasks[task]
        at_A = block * n_states * WIDTH
        local[:] = _ZERO
        dstate[:] = _ZERO
        dD[task * WIDTH : (task + 1) * WIDTH] = _ZERO
        dbias[task * WIDTH : (task + 1) * WIDTH] = _ZERO
        for s in range(s0, s1):
            _load_state(h, initial, has_initial, s, channels, d_state, c0, width, n_states)
            length = bounds[s + 1] - bounds[s]
            n_chunks = (length + CHUNK - 1) // CHUNK
            size = n_states * WIDTH
            for k in range(n_chunks):
                entering[k * size : (k + 1) * size] = h[:size]
                if k + 1 < n_chunks:
                    row, go = _first_row(bounds, s, k * CHUNK, reverse)
                    _load(
                        local,
                        SLOTS_BACKWARD,
                        x,
                        x_stride,
                        dt,
                        dt_stride,
                        bias,
                        block,
                        use_softplus,
                        row,
                        go,
                        CHUNK,
                        c0,
                        width,
                    )
                    _advance_only(local, h, A2, at_A, B, row, go, CHUNK, groups, group, n_states)

            _load_dstate(dstate, dfinal, s, channels, d_state, c0, width, n_states)
            for k in range(n_chunks - 1, -1, -1):
                steps = min(CHUNK, length - k * CHUNK)
                row, go = _first_row(bounds, s, k * CHUNK, reverse)
                h[:size] = entering[k * size : (k + 1) * size]
                _load(
                    local,
                    SLOTS_BACKWARD,
                    x,
                    x_stride,
                    dt,
                    dt_stride,
                    bias,
                    block,
                    use_softplus,
                    row,
                    go,
                    steps,
                    c0,
                    width,
                )
                _load_dout(local, z, z_stride, dy, dy_stride, row, go, steps, c0, width)
                _recompute(
                    local,
                    h,
                    history,
                    A2,
                    at_A,
                    B,
                    C,
                    dC,
                    block * rows,
                    row,
                    go,
                    steps,
                    groups,
                    group,
                    n_states,
                )
                _walk_back(
                    local,
                    dstate,
                    history,
                    A2,
                    at_A,
                    B,
                    C,
                    dB,
                    block * rows,
                    row,
                    go,
                    steps,
                    groups,
                    group,
                    n_states,
                )
                _store_gradients(
                    local,
                    x,
                    x_stride,
                    z,
                    z_stride,
                    dy,
                    dy_stride,
                    D,
                    block,
                    use_softplus,
                    dx,
                    ddt,
                    dz,
                    dD,
                    dbias,
                    task,
                    channels,
                    row,
                    go,
                    steps,
                    c0,
                    width,
                )
            _store_dstate(dstate, dinitial, s, channels, d_state, c0, width)
        _store_dA(dstate, dA, task, n_states)


@njit(fastmath=FASTMATH, error_model="numpy")
def _advance_only(local, h, A2, at_A, B, row, go, steps, groups, group, n_states):
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_B = ((row + t * go) * groups + group) * n_states
        for n in range(0, n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            i = np.uint64(n * WIDTH)
            a = np.uint64(at_A + n * WIDTH)
            for c in range(_W):
                delta, u = local[at + c], local[at + _W + c]
                h0, h1, h2, h3 = h[i + c], h[i + _W + c], h[i + _W2 + c], h[i + _W3 + c]
                h[i + c] = exp2m1(delta * A2[a + c]) * h0 + (h0 + u * B0)
                h[i + _W + c] = exp2m1(delta * A2[a + _W + c]) * h1 + (h1 + u * B1)
                h[i + _W2 + c] = exp2m1(delta * A2[a + _W2 + c]) * h2 + (h2 + u * B2)
                h[i + _W3 + c] = exp2m1(delta * A2[a + _W3 + c]) * h3 + (h3 + u * B3)


@njit(fastmath=FASTMATH, error_model="numpy")
def _load_dstate(dstate, dfinal, s, channels, d_state, c0, width, n_states):
    for n in range(0, n_states, 4):
        dstate[n * 2 * WIDTH : n * 2 * WIDTH + 4 * WIDTH] = _ZERO
    for c in range(width):
        at = (s * channels + c0 + c) * d_state
        for n in range(d_state):
            dstate[(n // 4 * 8 + n % 4) * WIDTH + c] = dfinal[at + n]


@njit(fastmath=FASTMATH, error_model="numpy")
def _store_dstate(dstate, dinitial, s, channels, d_state, c0, width):
    for c in range(width):
        at = (s * channels + c0 + c) * d_state
        for n in range(d_state):
            dinitial[at + n] = dstate[(n // 4 * 8 + n % 4) * WIDTH + c]


@njit(fastmath=FASTMATH, error_model="numpy")
def _store_dA(dstate, dA, task, n_states):
    for n in range(n_states):
        for c in range(WIDTH):
            dA[(task * n_states + n) * WIDTH + c] = dstate[(n // 4 * 8 + 4 + n % 4) * WIDTH + c]


@njit(fastmath=FASTMATH, error_model="numpy")
def _load_dout(local, z, z_stride, dy, dy_stride, row, go, steps, c0, width):
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_z = np.uint64((row + t * go) * z_stride + c0)
        at_dy = np.uint64((row + t * go) * dy_stride + c0)
        if z_stride:
            for c in range(np.uint64(width)):
                gate = z[at_z + c]
                local[at + _DOUT + c] = dy[at_dy + c] * gate * sigmoid(gate)
        else:
            for c in range(np.uint64(width)):
                local[at + _DOUT + c] = dy[at_dy + c]
        for c in range(_W):
            local[at + _DINPUT + c] = _ZERO
            local[at + _DEXPONENT + c] = _ZERO


@njit(fastmath=FASTMATH, error_model="numpy")
def _recompute(local, h, history, A2, at_A, B, C, dC, row_dC, row, go, steps, groups, group, n_states):
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_B = ((row + t * go) * groups + group) * n_states
        at_dC = (row_dC + row + t * go) * n_states
        for n in range(0, n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            i = np.uint64(n * WIDTH)
            a = np.uint64(at_A + n * WIDTH)
            j = np.uint64((t * n_states + n) * 2 * WIDTH)
            dC0 = dC1 = dC2 = dC3 = _ZERO
            for c in range(_W):
                delta, u, dout = local[at + c], local[at + _W + c], local[at + _DOUT + c]
                h0, h1, h2, h3 = h[i + c], h[i + _W + c], h[i + _W2 + c], h[i + _W3 + c]
                e0 = exp2m1(delta * A2[a + c])
                e1 = exp2m1(delta * A2[a + _W + c])
                e2 = exp2m1(delta * A2[a + _W2 + c])
                e3 = exp2m1(delta * A2[a + _W3 + c])
                history[j + c], history[j + _W + c] = h0, h1
                history[j + _W2 + c], history[j + _W3 + c] = h2, h3
                history[j + _W4 + c], history[j + _W5 + c] = e0, e1
                history[j + _W6 + c], history[j + _W7 + c] = e2, e3
                h0 = e0 * h0 + (h0 + u * B0)
                h1 = e1 * h1 + (h1 + u * B1)
                h2 = e2 * h2 + (h2 + u * B2)
                h3 = e3 * h3 + (h3 + u * B3)
                h[i + c], h[i + _W + c], h[i + _W2 + c], h[i + _W3 + c] = h0, h1, h2, h3
                local[at + _OUT + c] += (h0 * C0 + h1 * C1) + (h2 * C2 + h3 * C3)
                dC0 += h0 * dout
                dC1 += h1 * dout
                dC2 += h2 * dout
                dC3 += h3 * dout
            dC[at_dC + n], dC[at_dC + n + 1], dC[at_dC + n + 2], dC[at_dC + n + 3] = dC0, dC1, dC2, dC3


@njit(fastmath=FASTMATH, error_model="numpy")
def _walk_back(local, dstate, history, A2, at_A, B, C, dB, row_dB, row, go, steps, groups, group, n_states):
    for t in range(steps - 1, -1, -1):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_B = ((row + t * go) * groups + group) * n_states
        at_dB = (row_dB + row + t * go) * n_states
        for n in range(0, n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            i = np.uint64(n * 2 * WIDTH)
            a = np.uint64(at_A + n * WIDTH)
            j = np.uint64((t * n_states + n) * 2 * WIDTH)
            dB0 = dB1 = dB2 = dB3 = _ZERO
            for c in range(_W):
                delta, u, dout = local[at + c], local[at + _W + c], local[at + _DOUT + c]
                g0 = dstate[i + c] + dout * C0
                g1 = dstate[i + _W + c] + dout * C1
                g2 = dstate[i + _W2 + c] + dout * C2
                g3 = dstate[i + _W3 + c] + dout * C3
                local[at + _DINPUT + c] += (g0 * B0 + g1 * B1) + (g2 * B2 + g3 * B3)
                dB0 += g0 * u
                dB1 += g1 * u
                dB2 += g2 * u
                dB3 += g3 * u
                # Of the state before the step, then of the exponent delta · A2.
                g0 += g0 * history[j + _W4 + c]
                g1 += g1 * history[j + _W5 + c]
                g2 += g2 * history[j + _W6 + c]
                g3 += g3 * history[j + _W7 + c]
                dstate[i + c], dstate[i + _W + c], dstate[i + _W2 + c], dstate[i + _W3 + c] = g0, g1, g2, g3
                g0 *= history[j + c]
                g1 *= history[j + _W + c]
                g2 *= history[j + _W2 + c]
                g3 *= history[j + _W3 + c]
                local[at + _DEXPONENT + c] += (g0 * A2[a + c] + g1 * A2[a + _W + c]) + (
                    g2 * A2[a + _W2 + c] + g3 * A2[a + _W3 + c]
                )
                dstate[i + _W4 + c] += g0 * delta
                dstate[i + _W5 + c] += g1 * delta
                dstate[i + _W6 + c] += g2 * delta
                dstate[i + _W7 + c] += g3 * delta
            dB[at_dB + n], dB[at_dB + n + 1], dB[at_dB + n + 2], dB[at_dB + n + 3] = dB0, dB1, dB2, dB3


@njit(fastmath=FASTMATH, error_model="numpy")
def _store_gradients(
    local,
    x,
    x_stride,
    z,
    z_stride,
    dy,
    dy_stride,
    D,
    block,
    use_softplus,
    dx,
    ddt,
    dz,
    dD,
    dbias,
    task,
    channels,
    row,
    go,
    steps,
    c0,
    width,
):
    at_D = np.uint64(block * WIDTH)
    at_sum = np.uint64(task * WIDTH)
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_x = np.uint64((row + t * go) * x_stride + c0)
        at_z = np.uint64((row + t * go) * z_stride + c0)
        at_dy = np.uint64((row + t * go) * dy_stride + c0)
        to = np.uint64((row + t * go) * channels + c0)
        if z_stride:
            for c in range(np.uint64(width)):
                gate = z[at_z + c]
                s = sigmoid(gate)
                out = local[at + _OUT + c] + D[at_D + c] * x[at_x + c]
                dz[to + c] = dy[at_dy + c] * out * s * (_ONE + gate * (_ONE - s))
        for c in range(np.uint64(width)):
            dout = local[at + _DOUT + c]
            dx[to + c] = local[at + _DINPUT + c] * local[at + c] + dout * D[at_D + c]
            dD[at_sum + c] += dout * x[at_x + c]
        if use_softplus:
            for c in range(np.uint64(width)):
                d = local[at + _DEXPONENT + c] * LN_2 + local[at + _DINPUT + c] * x[at_x + c]
                # The derivative of softplus is 1 - exp(-delta).
                d *= -exp2m1(-LOG2_E * local[at + c])
                ddt[to + c] = d
                dbias[at_sum + c] += d
        else:
            for c in range(np.uint64(width)):
                d = local[at + _DEXPONENT + c] * LN_2 + local[at + _DINPUT + c] * x[at_x + c]
                ddt[to + c] = d
                dbias[at_sum + c] += d
