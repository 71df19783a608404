# mypy: allow-untyped-defs
"""The Numba kernel of one step of the gated delta rule, computed in float32.

A row of the state is read twice, the second time from the processor's nearest cache: what it says of the key and of the
query, which are decayed instead of it; then it is decayed and written to. Of the new row the query's product is that of
the decayed one and of the key with the query.
"""

from __future__ import annotations

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.vector_math import FASTMATH

_ZERO = np.float32(0)


@inner_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def _products(state, at, key, query, width):
    """Of `width` elements of the state, those of the key and of the query."""
    of_key, of_query = _ZERO, _ZERO
    for n in range(width):
        of_key += state[at + n] * key[n]
        of_query += state[at + n] * query[n]
    return of_key, of_query


@kept_njit(nogil=True, fastmath=FASTMATH, error_model="numpy")
def delta_update(state, q, k, v, decay, decays, beta, has_beta, batch, heads, d_value, d_key, key_heads, y, scratch):
    """Everything flat; `decays` factors a head, 0 for none. scratch takes three times d_key."""
    shared, width = heads // key_heads, np.uint64(d_key)
    key, query, factor = scratch[:d_key], scratch[d_key : 2 * d_key], scratch[2 * d_key : 3 * d_key]
    for line in range(batch * heads):
        at_key = np.uint64((line // heads * key_heads + line % heads // shared) * d_key)
        both = _ZERO
        for n in range(width):
            both += k[at_key + n] * q[at_key + n]
        if decays == d_key:
            at_decay = np.uint64(line * d_key)
            for n in range(width):
                factor[n] = decay[at_decay + n]
        else:
            one = decay[line] if decays else np.float32(1)
            for n in range(width):
                factor[n] = one
        for n in range(width):
            key[n] = factor[n] * k[at_key + n]
            query[n] = factor[n] * q[at_key + n]
        for p in range(line * d_value, (line + 1) * d_value):
            at = np.uint64(p * d_key)
            of_key, of_query = _products(state, at, key, query, width)
            new = beta[line] * (v[p] - of_key) if has_beta else v[p]
            y[p] = of_query + new * both
            for n in range(width):
                state[at + n] = factor[n] * state[at + n] + new * k[at_key + n]
