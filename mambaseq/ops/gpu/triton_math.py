# mypy: allow-untyped-defs
"""Elementary functions of Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    """log(1 + exp(v)), its relative error small where it is small: log1p by the series of 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series
