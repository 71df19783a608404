# mypy: allow-untyped-defs
"""The Triton kernel of the Transformer's decode step that ours has no use for."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["position"])
def turn_and_keep(
    qkv,
    cos,
    sin,
    q,
    cache,
    position,
    of_values,
    of_batch,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One head of one row of qkv `(batch, HEADS + 2 SHARED heads)`: queries are turned into q, keys into the cache, and
    values are copied there. cos, sin: of the position. of_values, of_batch: strides of the cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, PADDED)
    real = i < HALF
    from_ = qkv + (row * (HEADS + 2 * SHARED) + head) * 2 * HALF + i
    a = tl.load(from_, mask=real, other=0.0).to(tl.float32)
    b = tl.load(from_ + HALF, mask=real, other=0.0).to(tl.float32)
    if head < HEADS + SHARED:
        c, s = tl.load(cos + i, mask=real, other=0.0), tl.load(sin + i, mask=real, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if head < HEADS:
        to = q + (row * HEADS + head) * 2 * HALF + i
    else:
        shared = (head - HEADS) % SHARED
        value = (head - HEADS) // SHARED
        to = cache + value * of_values + row * of_batch + (position * SHARED + shared).to(tl.int64) * 2 * HALF + i
    tl.store(to, a, mask=real)
    tl.store(to + HALF, b, mask=real)
