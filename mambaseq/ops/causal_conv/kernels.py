# mypy: allow-untyped-defs
"""Numba kernels of the causal convolution in float32, vectorised over channels.

Rows are read as they lie in memory, all channels of a time step at once. A sequence is cut into segments of
steps that depend on each other through a few rows at their ends only, which are read or computed twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.vector_math import FASTMATH, sigmoid

_ZERO, _ONE = np.float32(0), np.float32(1)


class Inputs(NamedTuple):
    """Flat arrays, float32 but for the indices; channel c of row i of x lies at `i · x_stride + c`."""

    cuts: np.ndarray  # (tasks + 1,) int64: the segments of each task
    segments: np.ndarray  # (segments, 3) int64: sequence, first and end step
    bounds: np.ndarray  # (sequences + 1,) int64: the rows of each sequence
    reverse: bool
    x: np.ndarray
    x_stride: int
    history: np.ndarray  # (sequences, width - 1, channels): the inputs before the first, oldest first
    weight: np.ndarray  # (width, channels)
    bias: np.ndarray  # (channels,)
    silu: bool
    channels: int
    width: int


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def forward(first_task, end_task, i, y, final, out):
    """y `(rows, channels)`; final `(sequences, width - 1, channels)`; `out` takes one row."""
    n = np.uint64(i.channels)
    for k in range(i.cuts[first_task], i.cuts[end_task]):
        s, begin, end = i.segments[k]
        length = i.bounds[s + 1] - i.bounds[s]
        for p in range(begin, end):
            _convolve(i, s, p, out)
            at = np.uint64(_row(i, s, p) * i.channels)
            if i.silu:
                for c in range(n):
                    y[at + c] = out[c] * sigmoid(out[c])
            else:
                for c in range(n):
                    y[at + c] = out[c]
        if end == length:
            for p in range(length - i.width + 1, length):
                source, at = _source(i, s, p)
                to = np.uint64((s * (i.width - 1) + p - length + i.width - 1) * i.channels)
                for c in range(n):
                    final[to + c] = source[at + c]


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def backward(first_task, end_task, i, dy, dy_stride, dfinal, dx, dhistory, dweight, dbias, recent, out):
    """Gradients; dweight `(tasks, width, channels)` and dbias `(tasks, channels)` are sums of a task.

    `recent` takes `width` rows, the gradients of the latest outputs before the activation; `out` takes one.
    """
    n, width = np.uint64(i.channels), i.width
    for task in range(first_task, end_task):
        dweight[task * width * i.channels : (task + 1) * width * i.channels] = _ZERO
        at_bias = np.uint64(task * i.channels)
        dbias[task * i.channels : (task + 1) * i.channels] = _ZERO
        for k in range(i.cuts[task], i.cuts[task + 1]):
            s, begin, end = i.segments[k]
            length = i.bounds[s + 1] - i.bounds[s]
            recent[:] = _ZERO
            # Output p is the last that input p - (width - 1) contributes to.
            for p in range(begin, end + width - 1):
                at = np.uint64(p % width * i.channels)
                if p < length:
                    at_dy = np.uint64(_row(i, s, p) * dy_stride)
                    if i.silu:
                        _convolve(i, s, p, out)
                        for c in range(n):
                            v = out[c]
                            sig = sigmoid(v)
                            recent[at + c] = dy[at_dy + c] * sig * (_ONE + v * (_ONE - sig))
                    else:
                        for c in range(n):
                            recent[at + c] = dy[at_dy + c]
                    if p < end:
                        for c in range(n):
                            dbias[at_bias + c] += recent[at + c]
                        for j in range(width):
                            source, at_source = _source(i, s, p - width + 1 + j)
                            to = np.uint64((task * width + j) * i.channels)
                            for c in range(n):
                                dweight[to + c] += recent[at + c] * source[at_source + c]
                else:
                    for c in range(n):
                        recent[at + c] = _ZERO
                q = p - width + 1
                if q >= begin or begin == 0:
                    _store_input_gradient(i, s, q, length, recent, dfinal, dx, dhistory)


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _row(i, s, p):
    """The row of step p of sequence s."""
    return i.bounds[s + 1] - 1 - p if i.reverse else i.bounds[s] + p


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _source(i, s, p):
    """Where the input of step p lies, which is history for p < 0."""
    if p >= 0:
        return i.x, np.uint64(_row(i, s, p) * i.x_stride)
    return i.history, np.uint64((s * (i.width - 1) + i.width - 1 + p) * i.channels)


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _convolve(i, s, p, out):
    n = np.uint64(i.channels)
    for c in range(n):
        out[c] = i.bias[c]
    for j in range(i.width):
        source, at = _source(i, s, p - i.width + 1 + j)
        at_weight = np.uint64(j * i.channels)
        for c in range(n):
            out[c] += i.weight[at_weight + c] * source[at + c]


@inner_njit(fastmath=FASTMATH, error_model="numpy")
def _store_input_gradient(i, s, q, length, recent, dfinal, dx, dhistory):
    """Of the input of step q, to which outputs q … q + width - 1 and the final state contribute."""
    n, width = np.uint64(i.channels), i.width
    if q >= 0:
        to_array, to = dx, np.uint64(_row(i, s, q) * i.channels)
    else:
        to_array, to = dhistory, np.uint64((s * (width - 1) + width - 1 + q) * i.channels)
    in_final = q - length + width - 1
    if in_final >= 0:
        at = np.uint64((s * (width - 1) + in_final) * i.channels)
        for c in range(n):
            to_array[to + c] = dfinal[at + c]
    else:
        for c in range(n):
            to_array[to + c] = _ZERO
    for j in range(width):
        if q + j >= 0:
            at = np.uint64((q + j) % width * i.channels)
            at_weight = np.uint64((width - 1 - j) * i.channels)
            for c in range(n):
                to_array[to + c] += i.weight[at_weight + c] * recent[at + c]
