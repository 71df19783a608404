# mypy: allow-untyped-defs
"""Numba kernels of `mambaseq.ops.linear`."""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"contract", "nsz", "reassoc"}


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy", boundscheck=False)
def fp32(first, end, x, weight, y):
    """y[:, first:end] = x @ weight[first:end].T; x `(rows, in)`, weight `(out, in)`, y `(rows, out)` float32."""
    for o in range(first, end):
        w = weight[o]
        for r in range(x.shape[0]):
            row = x[r]
            total = np.float32(0)
            for i in range(w.shape[0]):
                total += w[i] * row[i]
            y[r, o] = total


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy", boundscheck=False)
def bf16(first, end, x, weight, y):
    """The same with weights as the 16 bits of bfloat16, which are the upper half of a float32's."""
    for o in range(first, end):
        w = weight[o]
        for r in range(x.shape[0]):
            row = x[r]
            total = np.float32(0)
            for i in range(w.shape[0]):
                total += np.int32(np.int32(w[i]) << 16).view(np.float32) * row[i]
            y[r, o] = total
