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


@triton.jit
def cos_sin(v):
    """Cosine and sine of float32 of few turns, within 1.5e-7: by polynomials (of Cephes) of what is left of v without
    quarters of a turn, some 25 instructions for both."""
    shifted = v * 0.6366197723675814 + 12582912.0  # 1.5 * 2^23: its last bits count quarters
    quarter = shifted.to(tl.int32, bitcast=True)
    count = shifted - 12582912.0
    # pi / 2 in three parts, the first two times a count exact
    x = tl.fma(count, -1.5703125, v)
    x = tl.fma(count, -4.837512969970703e-4, x)
    x = tl.fma(count, -7.54978995489188e-8, x)
    z = x * x
    s = x + x * (z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4)))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quarter & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    return cos, tl.where((quarter & 2) == 2, -sin, sin)
