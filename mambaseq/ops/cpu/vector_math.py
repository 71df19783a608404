# mypy: allow-untyped-defs
"""Elementary functions in float32 that LLVM inlines and vectorises, for Numba kernels.

Without Intel's SVML, Numba calls the C library for `np.exp`, and the loop is not vectorised. These are polynomials
after a range reduction, which rounds by adding a large constant and scales by writing the exponent's bits. Relative
errors are below 3e-7; NaN stays NaN. Numba's cache looks at a kernel's own file only: after a change here, delete the
kernels' `__pycache__` folders.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# What a kernel may reorder or contract. NaN and infinity keep their meaning.
FASTMATH = {"contract", "nsz", "reassoc", "arcp"}
# The range reduction subtracts what it has just added, which must not be reassociated away.
_EXACT_ORDER = {"contract", "nsz"}

LOG2_E = np.float32(1 / math.log(2))
LN_2 = np.float32(math.log(2))
_ONE, _TWO = np.float32(1), np.float32(2)
_ZERO = np.float32(0)
# Adding 1.5 · 2^23 rounds to an integer; 127 more and the low bits are a float's biased exponent.
_ROUND = np.float32(1.5 * 2**23 + 127)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
# (2^f - 1) / f for |f| <= 1/2, minimax (Cephes, exp2f).
_P0, _P1, _P2 = (
    np.float32(6.931472028550421e-1),
    np.float32(2.402264791363012e-1),
    np.float32(5.550332471162809e-2),
)
_P3, _P4, _P5 = (
    np.float32(9.618437357674640e-3),
    np.float32(1.339887440266574e-3),
    np.float32(1.535336188319500e-4),
)
# artanh(s) / s in s^2, Taylor.
_L1, _L2, _L3 = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7)
_L4, _L5, _L6 = np.float32(1 / 9), np.float32(1 / 11), np.float32(1 / 13)


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def _exp2_parts(t):
    """A power of 2 next to 2^t, and what is missing to 2^t; t is held to [-126, 127]."""
    t = _LOWEST if t < _LOWEST else t
    t = _HIGHEST if t > _HIGHEST else t
    rounded = t + _ROUND
    scale = np.int32(np.float32(rounded).view(np.int32) << 23).view(np.float32)
    f = t - (rounded - _ROUND)
    p = ((((_P5 * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _P0
    return scale, scale * (p * f)


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def exp2m1(t):
    """2^t - 1, with full relative accuracy near 0."""
    scale, rest = _exp2_parts(t)
    return rest + (scale - _ONE)


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def exp2(t):
    """2^t, with full relative accuracy where it is small."""
    scale, rest = _exp2_parts(t)
    return rest + scale


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def decayed(h, t, drive):
    """2^t h + drive: loses nothing of the decay where it is close to 1, and nothing of `drive` where it is strong."""
    scale, rest = _exp2_parts(t)
    return rest * h + (scale * h + drive)


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def softplus(v):
    """log(1 + e^v), with full relative accuracy for large negative v."""
    positive = v if v > _ZERO else _ZERO
    w = exp2((v if v < _ZERO else -v) * LOG2_E)
    s = w / (_TWO + w)
    q = s * s
    p = (((((_L6 * q + _L5) * q + _L4) * q + _L3) * q + _L2) * q + _L1) * q + _ONE
    return positive + _TWO * s * p


@njit(fastmath=_EXACT_ORDER, error_model="numpy")
def sigmoid(v):
    """1 / (1 + e^-v)."""
    return _ONE / (_TWO + exp2m1(-v * LOG2_E))


@njit(fastmath=FASTMATH, error_model="numpy")
def copy(to, at_to, source, at_source, size):
    """Of elements; a slice assigned to a slice takes seconds more to compile, for the sake of its error message."""
    for k in range(size):
        to[np.uint64(at_to + k)] = source[np.uint64(at_source + k)]
