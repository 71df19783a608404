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

Packed sequences are padded to whole chunks; how many chunks there might be follows from the shapes alone, so that
nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.dtypes import without_autocast, working_dtype

# chunks are of at least so many positions: many short packed sequences need no shorter ones
_FEWEST = 16


class _Layout(NamedTuple):
    """Chunks of one row: of one sequence a row unless packed."""

    size: int
    n: int
    place: Tensor | None = None  # (length,) where a position goes in the padded row; None where padding follows the row
    begins: Tensor | None = None  # (n, 1, 1, 1) bool: the first chunk of a sequence
    owner: Tensor | None = None  # (n,) the sequence of each
    last: Tensor | None = None  # (sequences,) the last chunk of each
    filled: Tensor | None = None  # (sequences, 1, 1, 1) bool, False for an empty sequence


def run(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of v, and the final state."""
    with without_autocast(arguments.v.device.type):
        return _run(arguments)


def _run(given: DeltaArguments) -> tuple[Tensor, Tensor]:
    arguments = _forward_in_time(given)
    q, k, v, g, beta, initial, *_ = arguments
    wide, (batch, length, heads, d_value), d_key = working_dtype(v), v.shape, k.shape[3]
    layout = _layout(arguments)

    def in_chunks(value: Tensor) -> Tensor:
        """`(batch, length, heads, ...)` to `(batch, chunks, heads, size, ...)`, zeros where nothing is."""
        padded = layout.n * layout.size
        if layout.place is not None:
            value = value.new_zeros(batch, padded, *value.shape[2:]).index_copy(1, layout.place, value)
        elif padded != length:
            value = F.pad(value, (0, 0) * (value.ndim - 2) + (0, padded - length))
        return value.unflatten(1, (layout.n, layout.size)).transpose(2, 3)

    # axes: b(atch), c(hunk), h(ead), i and j (positions of a chunk), k (d_key), v (d_value)
    q, k = (in_chunks(value.to(wide)).repeat_interleave(heads // value.shape[2], dim=2) for value in (q, k))
    u = in_chunks(v.to(wide))  # b c h i v
    g = v.new_zeros(v.shape[:3]) if g is None else g
    sums = _sums(in_chunks(g.double() if g.ndim == 4 else g.double()[..., None]))  # b c h i k; one number for all k
    kept = sums.to(wide).exp()
    products = _products_of_one if sums.shape[-1] == 1 else _products
    erased = None
    if beta is None:
        scores = products(q, k, sums)  # b c h i j
    else:
        rate = in_chunks(beta.to(wide))[..., None]
        overlaps, scores = products(torch.stack([k, q]), k, sums).unbind(0)
        right = rate * torch.cat([u, kept * k], dim=-1)
        solved = torch.linalg.solve_triangular(rate * overlaps, right, upper=False, unitriangular=True)
        u, erased = solved.split([d_value, d_key], dim=-1)
    to_end = k * (sums[..., -1:, :] - sums).to(wide).exp()  # b c h i k
    u, entering, final = _pass_on(u, erased, to_end, kept[..., -1:, :], initial, layout, arguments)
    y = scores @ u + (kept * q) @ entering.mT  # b c h i v
    y = y.transpose(2, 3).flatten(1, 2)
    y = y[:, :length] if layout.place is None else y.index_select(1, layout.place)
    if given.reverse:
        y, final = y.flip(1), final if given.cu_seqlens is None else final.flip(0)
    return y.to(v.dtype), final


def _pass_on(
    u: Tensor,
    erased: Tensor | None,
    to_end: Tensor,
    kept: Tensor,
    initial: Tensor | None,
    layout: _Layout,
    arguments: DeltaArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is written `(b, c, h, i, v)`, the states that enter the chunks `(b, c, h, v, k)`, and the final ones.

    u: what would be written if nothing entered. erased: what the state that enters takes off it, `(b, c, h, i, k)`.
    to_end: keys as they are at the chunk's end. kept: what a whole chunk leaves of a state, `(b, c, h, 1, k or 1)`.
    """
    shape = (arguments.n_sequences, u.shape[2], u.shape[4], to_end.shape[4])
    initial = u.new_zeros(shape) if initial is None else initial.to(u.dtype)
    if shape[0] == 0:
        return u, u.new_zeros(*u.shape[:3], *shape[2:]), initial
    state = initial if layout.owner is None else torch.zeros_like(initial[:1])
    written, entering, leaving = [], [], []
    takes = [None] * layout.n if erased is None else erased.unbind(1)
    for c, (new, take, key, keep) in enumerate(zip(u.unbind(1), takes, to_end.unbind(1), kept.unbind(1), strict=True)):
        if layout.owner is not None and layout.begins is not None:
            state = torch.where(layout.begins[c], initial.index_select(0, layout.owner[c : c + 1]), state)
        entering.append(state)
        if take is not None:
            new = new - take @ state.mT
        state = state * keep + new.mT @ key
        written.append(new)
        leaving.append(state)
    final = state
    if layout.last is not None and layout.filled is not None:
        final = torch.where(layout.filled, torch.cat(leaving).index_select(0, layout.last), initial)
    return torch.stack(written, dim=1), torch.stack(entering, dim=1), final


def _products_of_one(left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
    """As `_products`, with a decay that all channels share, sums `(..., n, 1)`."""
    n = sums.shape[-2]
    exponent = (sums - sums.mT).to(left.dtype)  # (..., i, j)
    hidden = torch.ones(n, n, dtype=torch.bool, device=sums.device).triu(1)
    return (left @ right.mT) * exponent.masked_fill(hidden, -torch.inf).exp()


def _products(left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
    """The products of rows i of left and j <= i of right, each channel decayed by what comes after j up to i; else 0.

    left, right, sums `(..., n, d_key)`, n a power of two, sums of log-decays in float64.
    """
    n = sums.shape[-2]
    if n == 1:
        return (left * right).sum(-1, keepdim=True)
    left, right, sums = (value.unflatten(-2, (2, n // 2)) for value in (left, right, sums))  # (..., 2, n / 2, d_key)
    early, late = _products(left, right, sums).unbind(-3)
    middle = sums[..., 0, -1:, :]
    new = left[..., 1, :, :] * (sums[..., 1, :, :] - middle).to(left.dtype).exp()
    old = right[..., 0, :, :] * (middle - sums[..., 0, :, :]).to(left.dtype).exp()
    low = new @ old.mT
    return torch.cat([F.pad(early, (0, n // 2)), torch.cat([low, late], dim=-1)], dim=-2)


def _sums(log_decay: Tensor) -> Tensor:
    """Those up to each one of the last axis but one. (`cumsum` on a GPU is refused where results must repeat.)"""
    n = log_decay.shape[-2]
    return torch.ones(n, n, dtype=log_decay.dtype, device=log_decay.device).tril() @ log_decay


def _layout(arguments: DeltaArguments) -> _Layout:
    """Positions a chunk, a power of two, how many chunks, and where everything is."""
    length, cu_seqlens = arguments.v.shape[1], arguments.cu_seqlens
    longest = length if cu_seqlens is None else -(-length // max(1, arguments.n_sequences))
    size = 1 << (min(arguments.chunk_size, max(_FEWEST, longest)).bit_length() - 1)
    if cu_seqlens is None:
        return _Layout(size, max(1, -(-length // size)))
    # those left over go on with the last sequence, where they change nothing
    chunks = sequences.in_chunks(cu_seqlens, length, size)
    number = torch.arange(chunks.n, device=cu_seqlens.device)
    begins = number == chunks.begin.index_select(0, chunks.owner)
    filled = chunks.counts > 0
    return _Layout(
        size,
        chunks.n,
        chunks.place,
        begins[:, None, None, None],
        chunks.owner,
        chunks.last,
        filled[:, None, None, None],
    )


def _forward_in_time(arguments: DeltaArguments) -> DeltaArguments:
    """The same with time running forward."""
    if not arguments.reverse:
        return arguments
    names = ("q", "k", "v", "g", "beta")
    flipped: dict[str, Any] = {
        name: value.flip(1) for name, value in zip(names, arguments[:5], strict=True) if value is not None
    }
    arguments = arguments._replace(**flipped)
    if arguments.cu_seqlens is None:
        return arguments
    state = arguments.initial_state
    return arguments._replace(
        cu_seqlens=sequences.flipped(arguments.cu_seqlens), initial_state=None if state is None else state.flip(0)
    )
