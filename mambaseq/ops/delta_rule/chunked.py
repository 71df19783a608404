"""The gated delta rule in plain PyTorch, on any device: matrix products inside of chunks, states between them.

Section 3.3 of Yang et al. (arXiv:2412.06464) and section 3 of the Kimi team (arXiv:2510.26692). In a chunk that the
state S enters, what is written at each position is

    U = T (β V) - T (β K↓) Sᵀ,      T = (1 + tril(β K K↓ᵀ, -1))⁻¹      (the WY representation, UT transform)

with rows of keys K↓ that have decayed since the chunk began, and products of keys that have decayed between them. Only
`U` and the state that leaves wait for the chunk before; all else is computed for all chunks at once. What is held is
`length x heads x chunk_size` numbers, and `length / chunk_size` states.

Decays are summed in float64 and exponentiated as differences over spans that begin and end in the chunk, which for
decays never overflow. With a decay a channel, products between the two halves of a chunk meet at its middle, and so on
within the halves: every factor is a decay, at most 1, and nothing is divided by one. Everything else is in the working
precision, under autocast too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.chunks import FORGOTTEN, Chunks, forward_in_time, sums
from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.dtypes import without_autocast, working_dtype
from mambaseq.ops.operators import exported


def run(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of v, and the final state."""
    y, final = _anywhere(arguments)
    return y, final


def _in_full(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    with without_autocast(arguments.v.device.type):
        return _run(arguments)


def _run(given: DeltaArguments) -> tuple[Tensor, Tensor]:
    arguments: DeltaArguments = forward_in_time(given, ("q", "k", "v", "g", "beta"), ("initial_state",))
    q, k, v, g, beta, initial, *_ = arguments
    wide, (_, length, heads, d_value), d_key = working_dtype(v), v.shape, k.shape[3]
    shape = (arguments.n_sequences, heads, d_value, d_key)
    initial = v.new_zeros(shape, dtype=wide) if initial is None else initial.to(wide)
    if shape[0] == 0:
        return v, initial
    chunks = Chunks.of(length, arguments.cu_seqlens, arguments.chunk_size)

    def in_chunks(value: Tensor) -> Tensor:
        return chunks.cut(value).transpose(2, 3)

    # axes: b(atch), c(hunk), h(ead), i and j (positions of a chunk), k (d_key), v (d_value)
    q, k = (in_chunks(value.to(wide)).repeat_interleave(heads // value.shape[2], dim=2) for value in (q, k))
    u = in_chunks(v.to(wide))  # b c h i v
    g = v.new_zeros(v.shape[:3]) if g is None else g
    g = g.double().clamp(min=FORGOTTEN)
    total = sums(in_chunks(g if g.ndim == 4 else g[..., None]))  # b c h i k; one number for all k
    kept = total.to(wide).exp()
    products = _products_of_one if total.shape[-1] == 1 else _products
    to_end = k * (total[..., -1:, :] - total).to(wide).exp()  # b c h i k, keys as they are at the end
    whole = kept[..., -1:, :].unbind(1)  # what a chunk leaves of a state, b h 1 k
    if beta is None:
        scores = products(q, k, total)  # b c h i j
        added = (u.mT @ to_end).unbind(1)
        entering, final = chunks.pass_on(initial, lambda c, state: state * whole[c] + added[c])
    else:
        rate = in_chunks(beta.to(wide))[..., None]
        overlaps, scores = products(torch.stack([k, q]), k, total).unbind(0)
        right = rate * torch.cat([u, kept * k], dim=-1)
        solved = torch.linalg.solve_triangular(rate * overlaps, right, upper=False, unitriangular=True)
        # what would be written if nothing entered, and what the state that enters takes off it
        new, erased = (value.unbind(1) for value in solved.split([d_value, d_key], dim=-1))
        keys, written = to_end.unbind(1), []

        def step(c: int, state: Tensor) -> Tensor:
            written.append(new[c] - erased[c] @ state.mT)
            return state * whole[c] + written[c].mT @ keys[c]

        entering, final = chunks.pass_on(initial, step)
        u = torch.stack(written, dim=1)
    y = chunks.join((scores @ u + (kept * q) @ entering.mT).transpose(2, 3))
    if given.reverse:
        y, final = y.flip(1), final if given.cu_seqlens is None else final.flip(0)
    return y.to(v.dtype), final


def _products_of_one(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """As `_products`, with a decay that all channels share, total `(..., n, 1)`."""
    n = total.shape[-2]
    exponent = (total - total.mT).to(left.dtype)  # (..., i, j)
    hidden = torch.ones(n, n, dtype=torch.bool, device=total.device).triu(1)
    return (left @ right.mT) * exponent.masked_fill(hidden, -torch.inf).exp()


def _products(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """The products of rows i of left and j <= i of right, each channel decayed by what comes after j up to i; else 0.

    left, right, total `(..., n, d_key)`, n a power of two, sums of log-decays in float64.
    """
    n = total.shape[-2]
    if n == 1:
        return (left * right).sum(-1, keepdim=True)
    left, right, total = (value.unflatten(-2, (2, n // 2)) for value in (left, right, total))  # (..., 2, n / 2, d_key)
    early, late = _products(left, right, total).unbind(-3)
    middle = total[..., 0, -1:, :]
    new = left[..., 1, :, :] * (total[..., 1, :, :] - middle).to(left.dtype).exp()
    old = right[..., 0, :, :] * (middle - total[..., 0, :, :]).to(left.dtype).exp()
    low = new @ old.mT
    return torch.cat([F.pad(early, (0, n // 2)), torch.cat([low, late], dim=-1)], dim=-2)


def _fake(a: DeltaArguments) -> tuple[Tensor, Tensor]:
    final = a.v.new_empty((a.n_sequences, *a.v.shape[2:], a.k.shape[3]), dtype=working_dtype(a.v))
    return a.v.new_empty(a.v.shape), final


_anywhere = exported(
    "delta_rule_torch",
    DeltaArguments,
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, bool reverse, "
    "bool wants_final_state, int chunk_size",
    _in_full,
    _fake,
)
