# mypy: allow-untyped-defs
"""The Triton kernel of one step of the delta rule: it changes states in place and computes in float32."""

import triton
import triton.language as tl


@triton.jit
def update(
    state, q, q_batch, q_head, k, k_batch, k_head, v, v_batch, v_head, g, g_batch, g_head, beta, b_batch, b_head, y,
    heads, heads_of_key, d_value,
    D_KEY: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head's state (batch, heads, d_value, D_KEY). CHANNELS: g has a decay a channel of the key."""
    blocks = tl.cdiv(d_value, ROWS)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    batch, h = line // heads, line % heads
    p = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, KEYS)
    real, known = p < d_value, n < D_KEY
    tile = real[:, None] & known[None, :]
    place = state + (line * d_value + p)[:, None] * D_KEY + n[None, :]
    kept = tl.load(place, mask=tile, other=0.0).to(tl.float32)  # first, as it takes longest
    of_key = h // heads_of_key
    key = tl.load(k + batch * k_batch + of_key * k_head + n, mask=known, other=0.0).to(tl.float32)
    query = tl.load(q + batch * q_batch + of_key * q_head + n, mask=known, other=0.0).to(tl.float32)
    u = tl.load(v + batch * v_batch + h * v_head + p, mask=real, other=0.0).to(tl.float32)
    if g is not None:
        if CHANNELS:
            kept *= tl.exp(tl.load(g + batch * g_batch + h * g_head + n, mask=known, other=0.0).to(tl.float32))[None, :]
        else:
            kept *= tl.exp(tl.load(g + batch * g_batch + h * g_head).to(tl.float32))
    if beta is not None:
        u -= tl.sum(kept * key[None, :], axis=1)
        u *= tl.load(beta + batch * b_batch + h * b_head).to(tl.float32)
    kept = tl.fma(u[:, None], key[None, :], kept)
    tl.debug_barrier()  # all have loaded, whichever threads store
    tl.store(place, kept, mask=tile)
    tl.store(y + line * d_value + p, tl.sum(kept * query[None, :], axis=1), mask=real)
