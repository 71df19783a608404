# mypy: allow-untyped-defs
"""The gradients of Mamba-3's recurrence by one kernel, which reads each operand once: every head has B and C of its
own, so nothing is summed over heads, and what pairs of a chunk's steps say of B and C need not be kept for what the
states say. Layouts, weights and rounding are those of the state-space dual (`ops/ssd/triton_kernels.py`).
"""

import triton
import triton.language as tl

from mambaseq.ops.gpu.triton_math import added_dot
from mambaseq.ops.ssd.triton_kernels import _CHANGING, _chunk, _dot, _narrow, _rounded, _row


@triton.jit(do_not_specialize=_CHANGING)
def scan_backward(
    x, x_batch, x_row, x_head, B, B_batch, B_row, B_head, C, C_batch, C_row, C_head, decay, dt, own,
    dy, dy_batch, dy_row, dy_head, entered, left, table, chunks, chunks_of_row, length,
    dx, dx_batch, dx_row, dx_head, dB, dB_batch, dB_row, dB_head, dC, dC_batch, dC_row, dC_head,
    direct, down, inner, outer, flow, heads,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """A program takes one head of a chunk.

    entered: the states before chunks, left: the gradients of those behind them. `direct` and `down` (chunks, heads,
    SIZE) are the gradients of dt and own, `inner` and `outer` add up to that of `decay` in natural logarithms, and
    `flow` (chunks, heads) is what the decay of the whole chunk has beside. Matrices are (earlier step down, later step
    of the gradient across).
    """
    c = tl.program_id(0)
    head = tl.program_id(1)
    k = tl.arange(0, SIZE)
    at = k // RANK
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    batch, first, count = _chunk(table, c, chunks, chunks_of_row, length, SIZE, False)
    inside = (k < count)[:, None] & (n < N)[None, :]
    known = (k < count)[:, None] & (p < P)[None, :]
    which = c.to(tl.int64) * heads + head
    of_state = which * (P * N) + p[:, None] * N + n[None, :]
    real = (p < P)[:, None] & (n < N)[None, :]
    Bs = tl.load(_row(B, B_batch, B_row, batch, first) + head * B_head + k[:, None] * B_row + n[None, :],
                 mask=inside, other=0.0)  # fmt: skip
    Cs = tl.load(_row(C, C_batch, C_row, batch, first) + head * C_head + k[:, None] * C_row + n[None, :],
                 mask=inside, other=0.0)  # fmt: skip
    xs = tl.load(_row(x, x_batch, x_row, batch, first) + head * x_head + k[:, None] * x_row + p[None, :],
                 mask=known, other=0.0)  # fmt: skip
    dys = tl.load(_row(dy, dy_batch, dy_row, batch, first) + head * dy_head + k[:, None] * dy_row + p[None, :],
                  mask=known, other=0.0)  # fmt: skip
    behind = tl.load(left + of_state, mask=real, other=0.0)
    before = tl.load(entered + of_state, mask=real, other=0.0)
    sums_to = tl.load(decay + which * SIZE + k)
    whole = tl.load(decay + which * SIZE + SIZE - 1)
    step = tl.load(dt + which * SIZE + k)
    itself = tl.load(own + which * SIZE + k)
    tl.store(flow + which, tl.exp2(whole) * tl.sum(behind.to(tl.float32) * before.to(tl.float32)))
    behind, behind_power = _narrow(behind.to(tl.float32), xs)
    before, before_power = _narrow(before.to(tl.float32), xs)

    scores = _dot(Bs, tl.trans(Cs))
    products = _dot(xs, tl.trans(dys))
    between = tl.exp2(tl.where(at[:, None] <= at[None, :], sums_to[None, :] - sums_to[:, None], float("-inf")))
    same = at[:, None] == at[None, :]
    weight = tl.where(same, itself[:, None], step[:, None])
    products *= between
    pairs, pairs_power = _narrow(products * weight, Bs)
    matrix, matrix_power = _narrow(scores * between * weight, xs)
    products *= scores
    tl.store(down + which * SIZE + k, tl.sum(tl.where(same, products, 0.0), axis=1))
    # without those of a step with itself, which no decay is part of
    products = tl.where(same, 0.0, products)
    of_pairs = tl.sum(products, axis=1)
    of_decay = tl.sum(products * step[:, None], axis=0)

    to_end = tl.exp2(whole - sums_to)
    du = _dot(Bs, tl.trans(behind)) * (to_end * behind_power)[:, None]
    of_left = tl.sum(du * xs.to(tl.float32), axis=1)
    du *= step[:, None]
    if xs.dtype == tl.float16:
        du += _dot(matrix, dys) * matrix_power
    else:
        du = added_dot(matrix, dys, du)
    to = _row(dx, dx_batch, dx_row, batch, first) + head * dx_head + k[:, None] * dx_row + p[None, :]
    tl.store(to, _rounded(du, dx.dtype.element_ty), mask=known)
    tl.store(direct + which * SIZE + k, of_pairs + of_left)
    of_decay -= step * (of_pairs + of_left)
    tl.store(inner + which * SIZE + k, of_decay + tl.where(k == SIZE - 1, tl.sum(step * of_left), 0.0))

    found = _dot(xs, behind) * (to_end * step * behind_power)[:, None]
    if xs.dtype == tl.float16:
        found += _dot(pairs, Cs) * pairs_power
    else:
        found = added_dot(pairs, Cs, found)
    to = _row(dB, dB_batch, dB_row, batch, first) + head * dB_head + k[:, None] * dB_row + n[None, :]
    tl.store(to, _rounded(found, dB.dtype.element_ty), mask=inside)

    found = _dot(dys, before) * (tl.exp2(sums_to) * before_power)[:, None]
    tl.store(outer + which * SIZE + k, tl.sum(found * Cs.to(tl.float32), axis=1))
    if xs.dtype == tl.float16:
        found += _dot(tl.trans(pairs), Bs) * pairs_power
    else:
        found = added_dot(tl.trans(pairs), Bs, found)
    to = _row(dC, dC_batch, dC_row, batch, first) + head * dC_head + k[:, None] * dC_row + n[None, :]
    tl.store(to, _rounded(found, dC.dtype.element_ty), mask=inside)
