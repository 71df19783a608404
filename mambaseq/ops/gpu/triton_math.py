# mypy: allow-untyped-defs
"""Elementary functions of Triton kernels."""

import os

import torch
import triton
import triton.language as tl

# its matrix products know no bfloat16
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_PTX = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")
_SIGMOID = tl.constexpr(
    "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;"
)  # by 2^(-v log2(e))


@triton.jit
def added_dot(a, b, total):
    """total + a b, without rounding of fp32 inputs."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) of float32, within 4e-7 of it; 0 where it is below 2^-126. For kernels that are bound by
    instructions: four, of which `tl.sigmoid`, which also makes numbers below that, takes twelve."""
    if _PTX:
        return tl.inline_asm_elementwise(_SIGMOID, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sigmoid(v)


@triton.jit
def softplus(v):
    """log(1 + exp(v)), its relative error small where it is small: log1p by the series of 2 artanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def minus_one(v):
    """exp(v) - 1, its relative error small where it is small."""
    series = v * (1 + v / 2 * (1 + v / 3 * (1 + v / 4 * (1 + v / 5 * (1 + v / 6 * (1 + v / 7 * (1 + v / 8)))))))
    return tl.where(tl.abs(v) < 0.5, series, tl.exp(v) - 1)


@triton.jit
def tanh(v):
    """tanh(v), its relative error small everywhere: a minimax polynomial (7e-9), where exp would lose digits."""
    a = tl.abs(v)
    q = a * a
    p = -0.333332598 + q * (0.133308306 + q * (-0.0536880232 + q * (0.0204694159 - 0.0055151605 * q)))
    size = tl.where(a < 0.65, a + a * (q * p), 1 - 2 / (tl.exp(2 * a) + 1))
    return tl.where(v < 0, -size, size)
