"""The linear recurrence h_t = a_t h_{t-1} + b_t for all t in a logarithmic number of steps.

Brent and Kung's tree (1982) of (a2, b2) ∘ (a1, b1) = (a1 a2, a2 b1 + b2): twice the work of a loop. It multiplies
decays and never divides by them, so neither fast nor slow decay loses digits.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def tree(length: int) -> Iterator[tuple[slice, slice, int, bool]]:
    """The steps of a scan: (positions that change, those `stride` before them that they take up, stride, whether the
    change is on the way up, where spans still grow)."""
    stride = 1
    while stride < length:
        yield slice(2 * stride - 1, None, 2 * stride), slice(stride - 1, length - stride, 2 * stride), stride, True
        stride *= 2
    while stride > 1:
        stride //= 2
        to, by = slice(3 * stride - 1, None, 2 * stride), slice(2 * stride - 1, length - stride, 2 * stride)
        yield to, by, stride, False


def linear_scan_(decay: Tensor, h: Tensor) -> Tensor:
    """h_t ← decay_t h_{t-1} + h_t along axis 1 of `(batch, length, ...)`, in place, which it returns; `decay`, which
    broadcasts to h, is overwritten."""
    for to, by, _, up in tree(h.shape[1]):
        h[:, to] += decay[:, to] * h[:, by]
        if up:
            decay[:, to] *= decay[:, by]
    return h
