# mypy: allow-untyped-defs
"""Numba kernels of the selective scan in float32 with real A.

Channels are worked on in blocks of `WIDTH`: the innermost loops run over a block and become vector
instructions. A block without so many channels is filled up with zeros. The rows of `CHUNK` steps are first
copied into `local`, so that their cache misses overlap, and the recurrence then runs on it with the block's
states in the first-level cache. The backward pass keeps decays as exp(delta A) - 1, which loses nothing where they
are close to 1.

For each step of a chunk, `local` holds a few rows of `WIDTH`, here called slots. Slots of one array lie at
constant distances, which spares LLVM most of its checks whether arrays overlap; so does keeping the states of
four indices n beside each other in `history` and `dstate`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import prefetch
from mambaseq.ops.cpu.vector_math import FASTMATH, LN_2, LOG2_E, copy, decayed, exp2m1, sigmoid, softplus

WIDTH = 64
CHUNK = 32

# Numba takes unsigned indices as they are; signed ones may be negative, which hinders vectorisation.
_W, _W2, _W3 = np.uint64(WIDTH), np.uint64(2 * WIDTH), np.uint64(3 * WIDTH)
_W4, _W5, _W6, _W7 = np.uint64(4 * WIDTH), np.uint64(5 * WIDTH), np.uint64(6 * WIDTH), np.uint64(7 * WIDTH)
_ZERO, _ONE = np.float32(0), np.float32(1)

# Slots of both kernels: the step size delta, delta · x, and the output; those of the backward kernel: the
# gradients of the output before the gate, of delta · x, and of the exponent delta · A2.
SLOTS_FORWARD, SLOTS_BACKWARD = 3, 6
_OUT, _DOUT, _DINPUT, _DEXPONENT = _W2, _W3, _W4, _W5


class Inputs(NamedTuple):
    """What both kernels read: flat arrays, float32 but for the indices.

    Channel c of row i of x, dt, z lies at `i · stride + c`; there is no z if its stride is 0. B and C are
    filled up with zeros to `n_states`, the next multiple of 4.
    """

    tasks: np.ndarray  # (tasks, 6) int64: block, its first channel, width, group; first and end sequence
    bounds: np.ndarray  # (sequences + 1,) int64: the rows of each sequence
    reverse: bool
    x: np.ndarray
    x_stride: int
    dt: np.ndarray
    dt_stride: int
    z: np.ndarray
    z_stride: int
    B: np.ndarray  # (rows, groups, n_states)
    C: np.ndarray  # (rows, groups, n_states)
    groups: int
    n_states: int
    A2: np.ndarray  # (blocks, n_states, WIDTH): A · log2(e)
    D: np.ndarray  # (blocks, WIDTH)
    bias: np.ndarray  # (blocks, WIDTH)
    use_softplus: bool
    initial: np.ndarray  # (sequences, channels, d_state)
    has_initial: bool
    channels: int
    d_state: int


class Gradients(NamedTuple):
    """What the backward kernel writes, flat float32 arrays."""

    x: np.ndarray  # (rows, channels)
    dt: np.ndarray  # (rows, channels)
    z: np.ndarray  # (rows, channels)
    B: np.ndarray  # (blocks, rows, n_states)
    C: np.ndarray  # (blocks, rows, n_states)
    A: np.ndarray  # (tasks, n_states, WIDTH)
    D: np.ndarray  # (tasks, WIDTH)
    bias: np.ndarray  # (tasks, WIDTH)
    initial: np.ndarray  # (sequences, channels, d_state)


class Scratch(NamedTuple):
    """Working memory of one thread in the backward pass; n4 counts groups of four states."""

    h: np.ndarray  # (n_states, WIDTH)
    local: np.ndarray  # (CHUNK, SLOTS_BACKWARD, WIDTH)
    entering: np.ndarray  # (chunks of the longest sequence, n_states, WIDTH): states at their beginnings
    history: np.ndarray  # (CHUNK, n4, 8, WIDTH): four states before a step, their decays minus 1
    dstate: np.ndarray  # (n4, 8, WIDTH): gradients of four states, of A


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def forward(first_task, end_task, i, y, final, h, local):
    """y `(rows, channels)`; final `(sequences, channels, d_state)`."""
    for task in range(first_task, end_task):
        block, c0, width, group, s0, s1 = i.tasks[task]
        local[:] = _ZERO
        for s in range(s0, s1):
            _load_state(i, h, s, c0, width)
            length = i.bounds[s + 1] - i.bounds[s]
            for t0 in range(0, length, CHUNK):
                steps = min(CHUNK, length - t0)
                row, go = _first_row(i, s, t0)
                _load(i, local, SLOTS_FORWARD, block, c0, width, row, go, steps)
                _prefetch(i, c0, width, row + steps * go, go, CHUNK)
                prefetch(y, i.channels, c0, width, row + steps * go, go, CHUNK)
                _advance(i, local, SLOTS_FORWARD, h, block, group, row, go, steps)
                _store(i, local, y, block, c0, width, row, go, steps)
            for c in range(width):
                at = (s * i.channels + c0 + c) * i.d_state
                for n in range(i.d_state):
                    final[at + n] = h[n * WIDTH + c]


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def backward(first_task, end_task, i, dy, dy_stride, dfinal, gradients, scratch):
    """dy as x in `Inputs`; dfinal `(sequences, channels, d_state)`."""
    h, local, entering, history, dstate = scratch
    size = i.n_states * WIDTH
    for task in range(first_task, end_task):
        block, c0, width, group, s0, s1 = i.tasks[task]
        local[:] = _ZERO
        dstate[:] = _ZERO
        gradients.D[task * WIDTH : (task + 1) * WIDTH] = _ZERO
        gradients.bias[task * WIDTH : (task + 1) * WIDTH] = _ZERO
        for s in range(s0, s1):
            _load_state(i, h, s, c0, width)
            length = i.bounds[s + 1] - i.bounds[s]
            n_chunks = (length + CHUNK - 1) // CHUNK
            for k in range(n_chunks):
                copy(entering, k * size, h, 0, size)
                if k + 1 < n_chunks:
                    row, go = _first_row(i, s, k * CHUNK)
                    _load(i, local, SLOTS_BACKWARD, block, c0, width, row, go, CHUNK)
                    _prefetch(i, c0, width, row + CHUNK * go, go, CHUNK)
                    _advance(i, local, SLOTS_BACKWARD, h, block, group, row, go, CHUNK)

            _load_dstate(i, dstate, dfinal, s, c0, width)
            for k in range(n_chunks - 1, -1, -1):
                steps = min(CHUNK, length - k * CHUNK)
                row, go = _first_row(i, s, k * CHUNK)
                copy(h, 0, entering, k * size, size)
                _load(i, local, SLOTS_BACKWARD, block, c0, width, row, go, steps)
                _load_dout(i, local, dy, dy_stride, c0, width, row, go, steps)
                if k:
                    _prefetch(i, c0, width, row - CHUNK * go, go, CHUNK)
                    prefetch(dy, dy_stride, c0, width, row - CHUNK * go, go, CHUNK)
                _advance_keeping(i, local, h, history, gradients.C, block, group, row, go, steps)
                _walk_back(i, local, dstate, history, gradients.B, block, group, row, go, steps)
                _store_gradients(i, local, dy, dy_stride, gradients, task, block, c0, width, row, go, steps)
            _store_dstate(i, dstate, gradients.initial, s, c0, width)
        for n in range(i.n_states):
            for c in range(WIDTH):
                gradients.A[(task * i.n_states + n) * WIDTH + c] = dstate[(n // 4 * 8 + 4 + n % 4) * WIDTH + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _first_row(i, s, t0):
    """The row of step t0 of a sequence, and what to add for the next step."""
    if i.reverse:
        return i.bounds[s + 1] - 1 - t0, -1
    return i.bounds[s] + t0, 1


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load_state(i, h, s, c0, width):
    h[:] = _ZERO
    if i.has_initial:
        for c in range(width):
            at = (s * i.channels + c0 + c) * i.d_state
            for n in range(i.d_state):
                h[n * WIDTH + c] = i.initial[at + n]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load(i, local, slots, block, c0, width, row, go, steps):
    """Step sizes and inputs; clears the output."""
    at_bias = np.uint64(block * WIDTH)
    for t in range(steps):
        at = np.uint64(t * slots * WIDTH)
        at_x = np.uint64((row + t * go) * i.x_stride + c0)
        at_dt = np.uint64((row + t * go) * i.dt_stride + c0)
        for c in range(np.uint64(width)):
            local[at + c] = i.dt[at_dt + c] + i.bias[at_bias + c]
        if i.use_softplus:
            for c in range(np.uint64(width)):
                local[at + c] = softplus(local[at + c])
        for c in range(np.uint64(width)):
            local[at + _W + c] = local[at + c] * i.x[at_x + c]
        for c in range(_W):
            local[at + _OUT + c] = _ZERO


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _prefetch(i, c0, width, row, go, steps):
    """The rows that come next: they lie pages apart, which the processor does not foresee."""
    prefetch(i.x, i.x_stride, c0, width, row, go, steps)
    prefetch(i.dt, i.dt_stride, c0, width, row, go, steps)
    if i.z_stride:
        prefetch(i.z, i.z_stride, c0, width, row, go, steps)


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _advance(i, local, slots, h, block, group, row, go, steps):
    """The recurrence over a chunk."""
    A2, B, C = i.A2, i.B, i.C
    for t in range(steps):
        at = np.uint64(t * slots * WIDTH)
        at_B = ((row + t * go) * i.groups + group) * i.n_states
        for n in range(0, i.n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            j = np.uint64(n * WIDTH)
            a = np.uint64((block * i.n_states + n) * WIDTH)
            for c in range(_W):
                delta, u = local[at + c], local[at + _W + c]
                h0, h1, h2, h3 = h[j + c], h[j + _W + c], h[j + _W2 + c], h[j + _W3 + c]
                h0 = decayed(h0, delta * A2[a + c], u * B0)
                h1 = decayed(h1, delta * A2[a + _W + c], u * B1)
                h2 = decayed(h2, delta * A2[a + _W2 + c], u * B2)
                h3 = decayed(h3, delta * A2[a + _W3 + c], u * B3)
                h[j + c], h[j + _W + c], h[j + _W2 + c], h[j + _W3 + c] = h0, h1, h2, h3
                local[at + _OUT + c] += (h0 * C0 + h1 * C1) + (h2 * C2 + h3 * C3)


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store(i, local, y, block, c0, width, row, go, steps):
    at_D = np.uint64(block * WIDTH)
    for t in range(steps):
        at = np.uint64(t * SLOTS_FORWARD * WIDTH) + _OUT
        at_x = np.uint64((row + t * go) * i.x_stride + c0)
        at_z = np.uint64((row + t * go) * i.z_stride + c0)
        at_y = np.uint64((row + t * go) * i.channels + c0)
        if i.z_stride:
            for c in range(np.uint64(width)):
                gate = i.z[at_z + c]
                y[at_y + c] = (local[at + c] + i.D[at_D + c] * i.x[at_x + c]) * gate * sigmoid(gate)
        else:
            for c in range(np.uint64(width)):
                y[at_y + c] = local[at + c] + i.D[at_D + c] * i.x[at_x + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load_dstate(i, dstate, dfinal, s, c0, width):
    for n in range(0, i.n_states, 4):
        dstate[n * 2 * WIDTH : (n * 2 + 4) * WIDTH] = _ZERO
    for c in range(width):
        at = (s * i.channels + c0 + c) * i.d_state
        for n in range(i.d_state):
            dstate[(n // 4 * 8 + n % 4) * WIDTH + c] = dfinal[at + n]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store_dstate(i, dstate, dinitial, s, c0, width):
    for c in range(width):
        at = (s * i.channels + c0 + c) * i.d_state
        for n in range(i.d_state):
            dinitial[at + n] = dstate[(n // 4 * 8 + n % 4) * WIDTH + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load_dout(i, local, dy, dy_stride, c0, width, row, go, steps):
    """The gradient of the output before the gate; clears the other gradients."""
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_z = np.uint64((row + t * go) * i.z_stride + c0)
        at_dy = np.uint64((row + t * go) * dy_stride + c0)
        if i.z_stride:
            for c in range(np.uint64(width)):
                gate = i.z[at_z + c]
                local[at + _DOUT + c] = dy[at_dy + c] * gate * sigmoid(gate)
        else:
            for c in range(np.uint64(width)):
                local[at + _DOUT + c] = dy[at_dy + c]
        for c in range(_W):
            local[at + _DINPUT + c] = _ZERO
            local[at + _DEXPONENT + c] = _ZERO


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _advance_keeping(i, local, h, history, dC, block, group, row, go, steps):
    """The recurrence over a chunk, keeping states and decays; and the gradient of C."""
    A2, B, C = i.A2, i.B, i.C
    rows = i.bounds[-1]
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_B = ((row + t * go) * i.groups + group) * i.n_states
        at_dC = (block * rows + row + t * go) * i.n_states
        for n in range(0, i.n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            j = np.uint64(n * WIDTH)
            a = np.uint64((block * i.n_states + n) * WIDTH)
            k = np.uint64((t * i.n_states + n) * 2 * WIDTH)
            dC0 = dC1 = dC2 = dC3 = _ZERO
            for c in range(_W):
                delta, u, dout = local[at + c], local[at + _W + c], local[at + _DOUT + c]
                h0, h1, h2, h3 = h[j + c], h[j + _W + c], h[j + _W2 + c], h[j + _W3 + c]
                e0 = exp2m1(delta * A2[a + c])
                e1 = exp2m1(delta * A2[a + _W + c])
                e2 = exp2m1(delta * A2[a + _W2 + c])
                e3 = exp2m1(delta * A2[a + _W3 + c])
                history[k + c], history[k + _W + c] = h0, h1
                history[k + _W2 + c], history[k + _W3 + c] = h2, h3
                history[k + _W4 + c], history[k + _W5 + c] = e0, e1
                history[k + _W6 + c], history[k + _W7 + c] = e2, e3
                h0 = decayed(h0, delta * A2[a + c], u * B0)
                h1 = decayed(h1, delta * A2[a + _W + c], u * B1)
                h2 = decayed(h2, delta * A2[a + _W2 + c], u * B2)
                h3 = decayed(h3, delta * A2[a + _W3 + c], u * B3)
                h[j + c], h[j + _W + c], h[j + _W2 + c], h[j + _W3 + c] = h0, h1, h2, h3
                local[at + _OUT + c] += (h0 * C0 + h1 * C1) + (h2 * C2 + h3 * C3)
                dC0 += h0 * dout
                dC1 += h1 * dout
                dC2 += h2 * dout
                dC3 += h3 * dout
            dC[at_dC + n], dC[at_dC + n + 1], dC[at_dC + n + 2], dC[at_dC + n + 3] = dC0, dC1, dC2, dC3


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _walk_back(i, local, dstate, history, dB, block, group, row, go, steps):
    """The recurrence of the gradients over a chunk."""
    A2, B, C = i.A2, i.B, i.C
    rows = i.bounds[-1]
    for t in range(steps - 1, -1, -1):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_B = ((row + t * go) * i.groups + group) * i.n_states
        at_dB = (block * rows + row + t * go) * i.n_states
        for n in range(0, i.n_states, 4):
            B0, B1, B2, B3 = B[at_B + n], B[at_B + n + 1], B[at_B + n + 2], B[at_B + n + 3]
            C0, C1, C2, C3 = C[at_B + n], C[at_B + n + 1], C[at_B + n + 2], C[at_B + n + 3]
            j = np.uint64(n * 2 * WIDTH)
            a = np.uint64((block * i.n_states + n) * WIDTH)
            k = np.uint64((t * i.n_states + n) * 2 * WIDTH)
            dB0 = dB1 = dB2 = dB3 = _ZERO
            for c in range(_W):
                delta, u, dout = local[at + c], local[at + _W + c], local[at + _DOUT + c]
                # Of the states after the step,
                g0 = dstate[j + c] + dout * C0
                g1 = dstate[j + _W + c] + dout * C1
                g2 = dstate[j + _W2 + c] + dout * C2
                g3 = dstate[j + _W3 + c] + dout * C3
                local[at + _DINPUT + c] += (g0 * B0 + g1 * B1) + (g2 * B2 + g3 * B3)
                dB0 += g0 * u
                dB1 += g1 * u
                dB2 += g2 * u
                dB3 += g3 * u
                # before the step,
                g0 += g0 * history[k + _W4 + c]
                g1 += g1 * history[k + _W5 + c]
                g2 += g2 * history[k + _W6 + c]
                g3 += g3 * history[k + _W7 + c]
                dstate[j + c], dstate[j + _W + c], dstate[j + _W2 + c], dstate[j + _W3 + c] = g0, g1, g2, g3
                # and of the exponents delta · A.
                g0 *= history[k + c]
                g1 *= history[k + _W + c]
                g2 *= history[k + _W2 + c]
                g3 *= history[k + _W3 + c]
                local[at + _DEXPONENT + c] += (g0 * A2[a + c] + g1 * A2[a + _W + c]) + (
                    g2 * A2[a + _W2 + c] + g3 * A2[a + _W3 + c]
                )
                dstate[j + _W4 + c] += g0 * delta
                dstate[j + _W5 + c] += g1 * delta
                dstate[j + _W6 + c] += g2 * delta
                dstate[j + _W7 + c] += g3 * delta
            dB[at_dB + n], dB[at_dB + n + 1], dB[at_dB + n + 2], dB[at_dB + n + 3] = dB0, dB1, dB2, dB3


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store_gradients(i, local, dy, dy_stride, gradients, task, block, c0, width, row, go, steps):
    at_D = np.uint64(block * WIDTH)
    at_sum = np.uint64(task * WIDTH)
    for t in range(steps):
        at = np.uint64(t * SLOTS_BACKWARD * WIDTH)
        at_x = np.uint64((row + t * go) * i.x_stride + c0)
        at_z = np.uint64((row + t * go) * i.z_stride + c0)
        at_dy = np.uint64((row + t * go) * dy_stride + c0)
        to = np.uint64((row + t * go) * i.channels + c0)
        if i.z_stride:
            for c in range(np.uint64(width)):
                gate = i.z[at_z + c]
                open_ = sigmoid(gate)
                out = local[at + _OUT + c] + i.D[at_D + c] * i.x[at_x + c]
                gradients.z[to + c] = dy[at_dy + c] * out * open_ * (_ONE + gate * (_ONE - open_))
        for c in range(np.uint64(width)):
            dout = local[at + _DOUT + c]
            gradients.x[to + c] = local[at + _DINPUT + c] * local[at + c] + dout * i.D[at_D + c]
            gradients.D[at_sum + c] += dout * i.x[at_x + c]
        for c in range(np.uint64(width)):
            ddelta = local[at + _DEXPONENT + c] * LN_2 + local[at + _DINPUT + c] * i.x[at_x + c]
            if i.use_softplus:
                # Its derivative is 1 - exp(-delta).
                ddelta *= -exp2m1(-LOG2_E * local[at + c])
            gradients.dt[to + c] = ddelta
            gradients.bias[at_sum + c] += ddelta
