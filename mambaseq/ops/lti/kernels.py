# mypy: allow-untyped-defs
"""Numba kernels of the time-invariant scan: complex arithmetic on real and imaginary parts in float32.

As in the selective scan, channels are worked on in blocks of `WIDTH`, which become vector instructions, and
in chunks of time copied to `local`. States do not meet, so one n after the other goes through a whole chunk,
four steps at a time in registers.

With C' = (factor Re C, -factor Im C), factor 2 for complex and 1 for real systems:

    h_t = Abar h_{t-1} + Bbar x_t;   y_t = sum_n C'_0 Re h_t + C'_1 Im h_t
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import prefetch
from mambaseq.ops.cpu.vector_math import FASTMATH, copy

WIDTH = 64
CHUNK = 32

_W, _W2, _W3, _W4 = np.uint64(WIDTH), np.uint64(2 * WIDTH), np.uint64(3 * WIDTH), np.uint64(4 * WIDTH)
_W5, _W6, _W7 = np.uint64(5 * WIDTH), np.uint64(6 * WIDTH), np.uint64(7 * WIDTH)
_W8, _W9 = np.uint64(8 * WIDTH), np.uint64(9 * WIDTH)
# `local` is (3, CHUNK, WIDTH): x; y, or the gradient of x; the gradient of y.
_OUT, _DY = np.uint64(CHUNK * WIDTH), np.uint64(2 * CHUNK * WIDTH)
_ZERO = np.float32(0)
# LLVM does not vectorise loops over rows whose offsets it sees fall; it does if they are looked up.
_LAST_FIRST = np.arange(CHUNK)[::-1].copy()


class Inputs(NamedTuple):
    """What both kernels read, flat arrays, float32 but for the indices."""

    tasks: np.ndarray  # (tasks, 6) int64: block, its first channel, width, group; first and end sequence
    bounds: np.ndarray  # (sequences + 1,) int64: the rows of each sequence
    reverse: bool
    x: np.ndarray  # channel c of row i at i · x_stride + c
    x_stride: int
    system: np.ndarray  # (blocks, d_state, 6, WIDTH): Re Abar, Im Abar, Re Bbar, Im Bbar, C'_0, C'_1
    initial: np.ndarray  # (sequences, channels, d_state, 2)
    has_initial: bool
    channels: int
    d_state: int


class Gradients(NamedTuple):
    """What the backward kernel writes, flat float32 arrays."""

    x: np.ndarray  # (rows, channels)
    system: np.ndarray  # (tasks, d_state, 6, WIDTH)
    initial: np.ndarray  # (sequences, channels, d_state, 2)


class Scratch(NamedTuple):
    """Working memory of one thread in the backward pass."""

    h: np.ndarray  # (d_state, 2, WIDTH)
    local: np.ndarray  # (3, CHUNK, WIDTH)
    entering: np.ndarray  # (chunks of the longest sequence, d_state, 2, WIDTH): states at their beginnings
    history: np.ndarray  # (CHUNK + 1, 2, WIDTH): one state before and after each step
    dstate: np.ndarray  # (d_state, 8, WIDTH): gradients of the state (2) and of the system (6)


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def forward(first_task, end_task, i, y, final, h, local):
    """y `(rows, channels)`; final `(sequences, channels, d_state, 2)`; h and local as in `Scratch`."""
    for task in range(first_task, end_task):
        block, c0, width, _, s0, s1 = i.tasks[task]
        local[:] = _ZERO
        for s in range(s0, s1):
            h[:] = _ZERO
            if i.has_initial:
                _load_state(i, h, 2, i.initial, s, c0, width)
            length = i.bounds[s + 1] - i.bounds[s]
            for t0 in range(0, length, CHUNK):
                steps = min(CHUNK, length - t0)
                row, go = _first_row(i, s, t0)
                _load(local, np.uint64(0), i.x, i.x_stride, c0, width, row, go, steps)
                prefetch(i.x, i.x_stride, c0, width, row + steps * go, go, CHUNK)
                local[CHUNK * WIDTH : 2 * CHUNK * WIDTH] = _ZERO
                for n in range(i.d_state):
                    _advance(i, local, h, block, n, steps)
                _store(local, y, i.channels, c0, width, row, go, steps)
            _store_state(i, h, 2, final, s, c0, width)


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def backward(first_task, end_task, i, dy, dy_stride, dfinal, gradients, scratch):
    """dy as x in `Inputs`; dfinal `(sequences, channels, d_state, 2)`."""
    h, local, entering, history, dstate = scratch
    size = i.d_state * 2 * WIDTH
    for task in range(first_task, end_task):
        block, c0, width, _, s0, s1 = i.tasks[task]
        local[:] = _ZERO
        dstate[:] = _ZERO
        for s in range(s0, s1):
            h[:] = _ZERO
            if i.has_initial:
                _load_state(i, h, 2, i.initial, s, c0, width)
            length = i.bounds[s + 1] - i.bounds[s]
            n_chunks = (length + CHUNK - 1) // CHUNK
            for k in range(n_chunks):
                copy(entering, k * size, h, 0, size)
                if k + 1 < n_chunks:
                    row, go = _first_row(i, s, k * CHUNK)
                    _load(local, np.uint64(0), i.x, i.x_stride, c0, width, row, go, CHUNK)
                    for n in range(i.d_state):
                        _advance(i, local, h, block, n, CHUNK)

            for n in range(i.d_state):
                dstate[n * 8 * WIDTH : (n * 8 + 2) * WIDTH] = _ZERO
            _load_state(i, dstate, 8, dfinal, s, c0, width)
            for k in range(n_chunks - 1, -1, -1):
                steps = min(CHUNK, length - k * CHUNK)
                row, go = _first_row(i, s, k * CHUNK)
                _load(local, np.uint64(0), i.x, i.x_stride, c0, width, row, go, steps)
                _load(local, _DY, dy, dy_stride, c0, width, row, go, steps)
                if k:
                    prefetch(i.x, i.x_stride, c0, width, row - CHUNK * go, go, CHUNK)
                    prefetch(dy, dy_stride, c0, width, row - CHUNK * go, go, CHUNK)
                local[CHUNK * WIDTH : 2 * CHUNK * WIDTH] = _ZERO
                for n in range(i.d_state):
                    copy(history, 0, entering, k * size + n * 2 * WIDTH, 2 * WIDTH)
                    _advance_keeping(i, local, history, dstate, block, n, steps)
                    _walk_back(i, local, history, dstate, block, n, steps)
                _store(local, gradients.x, i.channels, c0, width, row, go, steps)
            _store_state(i, dstate, 8, gradients.initial, s, c0, width)
        for n in range(i.d_state):
            to, at = (task * i.d_state + n) * 6 * WIDTH, (n * 8 + 2) * WIDTH
            copy(gradients.system, to, dstate, at, 6 * WIDTH)


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _first_row(i, s, t0):
    """The row of step t0 of a sequence, and what to add for the next step."""
    if i.reverse:
        return i.bounds[s + 1] - 1 - t0, -1
    return i.bounds[s] + t0, 1


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load_state(i, planes, n_planes, state, s, c0, width):
    """To the first two of the planes of each n."""
    for c in range(width):
        for n in range(i.d_state):
            at = ((s * i.channels + c0 + c) * i.d_state + n) * 2
            planes[n * n_planes * WIDTH + c] = state[at]
            planes[(n * n_planes + 1) * WIDTH + c] = state[at + 1]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store_state(i, planes, n_planes, state, s, c0, width):
    for c in range(width):
        for n in range(i.d_state):
            at = ((s * i.channels + c0 + c) * i.d_state + n) * 2
            state[at] = planes[n * n_planes * WIDTH + c]
            state[at + 1] = planes[(n * n_planes + 1) * WIDTH + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _load(local, plane, rows, stride, c0, width, row, go, steps):
    for t in range(steps):
        to = np.uint64(t * WIDTH) + plane
        at = np.uint64((row + t * go) * stride + c0)
        for c in range(np.uint64(width)):
            local[to + c] = rows[at + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store(local, rows, stride, c0, width, row, go, steps):
    for t in range(steps):
        at = np.uint64(t * WIDTH) + _OUT
        to = np.uint64((row + t * go) * stride + c0)
        for c in range(np.uint64(width)):
            rows[to + c] = local[at + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _advance(i, local, h, block, n, steps):
    """One state through a chunk."""
    system = i.system
    p = np.uint64((block * i.d_state + n) * 6 * WIDTH)
    j = np.uint64(n * 2 * WIDTH)
    fours = steps // 4 * 4
    for t in range(0, fours, 4):
        at = np.uint64(t * WIDTH)
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            cr, ci = system[p + _W4 + c], system[p + _W5 + c]
            re, im = h[j + c], h[j + _W + c]
            x = local[at + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            local[at + _OUT + c] += cr * re + ci * im
            x = local[at + _W + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            local[at + _W + _OUT + c] += cr * re + ci * im
            x = local[at + _W2 + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            local[at + _W2 + _OUT + c] += cr * re + ci * im
            x = local[at + _W3 + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            local[at + _W3 + _OUT + c] += cr * re + ci * im
            h[j + c], h[j + _W + c] = re, im
    for t in range(fours, steps):
        at = np.uint64(t * WIDTH)
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            re, im, x = h[j + c], h[j + _W + c], local[at + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            local[at + _OUT + c] += system[p + _W4 + c] * re + system[p + _W5 + c] * im
            h[j + c], h[j + _W + c] = re, im


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _advance_keeping(i, local, history, dstate, block, n, steps):
    """One state through a chunk, keeping it; and the gradient of C'."""
    system = i.system
    p = np.uint64((block * i.d_state + n) * 6 * WIDTH)
    g = np.uint64(n * 8 * WIDTH)
    fours = steps // 4 * 4
    for t in range(0, fours, 4):
        at = np.uint64(t * WIDTH)
        k = np.uint64(t * 2 * WIDTH)
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            re, im, x, dy = history[k + c], history[k + _W + c], local[at + c], local[at + _DY + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            history[k + _W2 + c], history[k + _W3 + c] = re, im
            dcr, dci = dy * re, dy * im
            x, dy = local[at + _W + c], local[at + _W + _DY + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            history[k + _W4 + c], history[k + _W5 + c] = re, im
            dcr, dci = dcr + dy * re, dci + dy * im
            x, dy = local[at + _W2 + c], local[at + _W2 + _DY + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            history[k + _W6 + c], history[k + _W7 + c] = re, im
            dcr, dci = dcr + dy * re, dci + dy * im
            x, dy = local[at + _W3 + c], local[at + _W3 + _DY + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            history[k + _W8 + c], history[k + _W9 + c] = re, im
            dstate[g + _W6 + c] += dcr + dy * re
            dstate[g + _W7 + c] += dci + dy * im
    for t in range(fours, steps):
        at = np.uint64(t * WIDTH)
        k = np.uint64(t * 2 * WIDTH)
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            re, im, x, dy = history[k + c], history[k + _W + c], local[at + c], local[at + _DY + c]
            re, im = ar * re - ai * im + br * x, ar * im + ai * re + bi * x
            history[k + _W2 + c], history[k + _W3 + c] = re, im
            dstate[g + _W6 + c] += dy * re
            dstate[g + _W7 + c] += dy * im


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _walk_back(i, local, history, dstate, block, n, steps):
    """The gradient of one state back through a chunk, two steps at a time."""
    system = i.system
    p = np.uint64((block * i.d_state + n) * 6 * WIDTH)
    g = np.uint64(n * 8 * WIDTH)
    for r in range(CHUNK - steps, CHUNK - steps % 2, 2):
        t = _LAST_FIRST[r + 1]
        at = np.uint64(t * WIDTH)
        k = np.uint64(t * 2 * WIDTH)
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            cr, ci = system[p + _W4 + c], system[p + _W5 + c]
            # Step t + 1,
            re, im = history[k + _W2 + c], history[k + _W3 + c]
            x, dy = local[at + _W + c], local[at + _W + _DY + c]
            dre, dim = dstate[g + c] + dy * cr, dstate[g + _W + c] + dy * ci
            local[at + _W + _OUT + c] += dre * br + dim * bi
            dar, dai = dre * re + dim * im, dim * re - dre * im
            dbr, dbi = dre * x, dim * x
            dre, dim = ar * dre + ai * dim, ar * dim - ai * dre
            # then step t.
            re, im, x, dy = history[k + c], history[k + _W + c], local[at + c], local[at + _DY + c]
            dre, dim = dre + dy * cr, dim + dy * ci
            local[at + _OUT + c] += dre * br + dim * bi
            dstate[g + _W2 + c] += dar + (dre * re + dim * im)
            dstate[g + _W3 + c] += dai + (dim * re - dre * im)
            dstate[g + _W4 + c] += dbr + dre * x
            dstate[g + _W5 + c] += dbi + dim * x
            dstate[g + c], dstate[g + _W + c] = ar * dre + ai * dim, ar * dim - ai * dre
    if steps % 2:
        for c in range(_W):
            ar, ai, br, bi = system[p + c], system[p + _W + c], system[p + _W2 + c], system[p + _W3 + c]
            re, im, x, dy = history[c], history[_W + c], local[c], local[_DY + c]
            dre = dstate[g + c] + dy * system[p + _W4 + c]
            dim = dstate[g + _W + c] + dy * system[p + _W5 + c]
            local[_OUT + c] += dre * br + dim * bi
            dstate[g + _W2 + c] += dre * re + dim * im
            dstate[g + _W3 + c] += dim * re - dre * im
            dstate[g + _W4 + c] += dre * x
            dstate[g + _W5 + c] += dim * x
            dstate[g + c], dstate[g + _W + c] = ar * dre + ai * dim, ar * dim - ai * dre
