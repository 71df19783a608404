"""The state-space dual in plain PyTorch, on any device: matrix products inside of chunks, states between them.

Section 6 of Dao & Gu 2024 (arXiv:2405.21060). Of a chunk, the outputs that its own inputs cause are
`(C Bᵀ ∘ decay) (dt x)`, its inputs give a state, and a scan over the chunks' states (again by matrix products, of
64 chunks at a time) gives what enters each. What is held is `length x heads x chunk_size` numbers and
`length / chunk_size` states.

Decays are summed in float64 and exponentiated as differences inside of a chunk, so neither strong decay nor a long
sequence costs digits. Everything else is in the working precision, under autocast too (matrix products of float32
on a GPU as `torch.set_float32_matmul_precision` says).

Packed sequences are padded to whole chunks; how many chunks there might be follows from the shapes alone, so that
nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.chunks import padded
from mambaseq.ops.dtypes import without_autocast, working_dtype
from mambaseq.ops.operators import exported
from mambaseq.ops.ssd.arguments import SsdArguments

# chunks whose states are passed on by one matrix product
_WIDTH = 64
# chunks are of a multiple of it, which matrix products like; many short packed sequences need no shorter ones
_STEP = 16


class _Layout(NamedTuple):
    """Which chunks belong to which sequence, of one row: one sequence a row unless packed."""

    place: Tensor | None  # (length,) where a position goes in the padded row; None where padding follows the row
    of_chunk: Tensor | None  # (chunks,) the sequence of each; None where there is one
    begin: Tensor  # (sequences,) the first chunk
    last: Tensor  # (sequences,) the last chunk; 0 for an empty sequence
    filled: Tensor | None  # (sequences, 1) bool, False for an empty sequence; None where none is


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state."""
    y, final = _anywhere(arguments)
    return y, final


def _in_full(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    with without_autocast(arguments.x.device.type):
        return _run(arguments)


def _run(given: SsdArguments) -> tuple[Tensor, Tensor]:
    arguments = _forward_in_time(given)
    x, dt, A, B, C, D, dt_bias, dt_softplus, initial, *_ = arguments
    wide, (batch, length, heads, head_dim), (groups, d_state) = working_dtype(x), x.shape, B.shape[2:]
    size, n_chunks, layout = _layout(arguments)

    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)

    def in_chunks(value: Tensor) -> Tensor:
        """`(batch, length, ...)` to `(batch, chunks, size, ...)`, zeros where nothing is."""
        if layout.place is not None:
            value = value.new_zeros(batch, n_chunks * size, *value.shape[2:]).index_copy(1, layout.place, value)
        return padded(value, 1, n_chunks * size).unflatten(1, (n_chunks, size))

    # axes: b(atch), c(hunk), g(roup), r (head of the group), q, k (positions of a chunk), n (d_state), p (head_dim)
    u = in_chunks(dt[..., None] * x.to(wide)).unflatten(3, (groups, -1))  # b c q g r p
    B_in, C_in = (in_chunks(M.to(wide)).transpose(2, 3) for M in (B, C))  # b c g q n
    log_decay = in_chunks(dt * A.to(wide)).double().unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # b c g r q
    sums = _sums(log_decay)  # b c g r q
    decay = _segment_decay(sums, wide)  # b c g r q k
    scores = (C_in @ B_in.mT).unsqueeze(3) * decay  # b c g r q k
    y = (scores @ u.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)  # b c q g r p

    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3)  # b c q g r
    states = B_in.mT @ (u * to_end[..., None]).transpose(2, 3).flatten(4)  # b c g n rp
    states = states.unflatten(4, (-1, head_dim)).permute(0, 2, 4, 1, 3, 5).flatten(4)  # b g r c np
    if initial is not None:
        # b sequences g r p n
        initial = initial.to(wide).reshape(batch, len(layout.begin), groups, heads // groups, head_dim, d_state)
        initial = initial.permute(0, 2, 3, 1, 5, 4).flatten(4)  # b g r sequences np
    entering, final = _pass_on(sums[..., -1].permute(0, 2, 3, 1), states, initial, layout)  # decays b g r c

    entering = entering.unflatten(4, (d_state, -1)).permute(0, 3, 1, 4, 2, 5).flatten(4)  # b c g n rp
    from_start = sums.to(wide).exp().transpose(3, 4)  # b c g q r
    y_entered = (C_in @ entering).unflatten(4, (-1, head_dim)) * from_start[..., None]  # b c g q r p
    y = (y + y_entered.transpose(2, 3)).flatten(3, 4).flatten(1, 2)  # b, length and padding, heads, head_dim
    y = y[:, :length] if layout.place is None else y.index_select(1, layout.place)
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)  # (b, length, heads, head_dim)

    final = final.unflatten(4, (d_state, -1)).permute(0, 3, 1, 2, 5, 4)  # b sequences g r p n
    final = final.reshape(arguments.n_sequences, heads, head_dim, d_state)
    if given.reverse:
        y, final = y.flip(1), final if given.cu_seqlens is None else final.flip(0)
    return y.to(x.dtype), final.contiguous()


def _pass_on(log_decay: Tensor, states: Tensor, initial: Tensor | None, layout: _Layout) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, and the final ones.

    log_decay: of a whole chunk `(b, g, r, chunks)`. states: what each chunk's inputs give `(b, g, r, chunks, np)`.
    initial: `(b, g, r, sequences, np)`; the final states have its shape.
    """
    if initial is not None:
        if layout.filled is not None:
            begun = torch.where(layout.filled, initial, 0)
        else:
            begun = initial
        kept = log_decay.index_select(3, layout.begin).to(states.dtype).exp()
        if layout.filled is not None:  # an empty sequence's first chunk is another's
            kept = torch.where(layout.filled[:, 0], kept, 0)
        states = states.index_add(3, layout.begin, kept[..., None] * begun)
    after = _apart(log_decay, states, layout)
    entering = F.pad(after, (0, 0, 1, 0))[..., :-1, :]
    if layout.of_chunk is not None:
        goes_on = layout.of_chunk == F.pad(layout.of_chunk, (1, 0), value=-1)[:-1]
        entering = torch.where(goes_on[:, None], entering, 0)
    if initial is not None:
        entering = entering.index_add(3, layout.begin, begun)
    final = after.index_select(3, layout.last)
    if layout.filled is not None:
        final = torch.where(layout.filled, final, 0 if initial is None else initial)
    return entering, final


def _apart(log_decay: Tensor, v: Tensor, layout: _Layout) -> Tensor:
    """`_scan` where no sequence takes NaN or infinity from another."""
    if layout.of_chunk is None:
        return _scan(log_decay, v, None)
    peak = torch.linalg.vector_norm(v.detach(), torch.inf, dim=-1)  # in one pass
    bad = ~(peak.isfinite() & log_decay.isfinite())  # (b, g, r, chunks)
    spoilt = sequences.spoilt(bad, layout.begin.index_select(0, layout.of_chunk), 3)
    if spoilt is None:
        return _scan(log_decay, v, layout.of_chunk)
    after = _scan(log_decay.masked_fill(bad, 0), v.masked_fill(bad[..., None], 0), layout.of_chunk)
    return after.masked_fill(spoilt[..., None], torch.nan)


def _scan(log_decay: Tensor, v: Tensor, sequence: Tensor | None) -> Tensor:
    """h_k = exp(log_decay_k) h_{k-1} + v_k, from zero where a sequence begins.

    log_decay `(..., n)`, float64. v `(..., n, features)`. sequence `(n,)`, the number of each one's, rising.
    """
    n = v.shape[-2]
    if n <= _WIDTH:
        return _segment_decay(_sums(log_decay, sequence), v.dtype, sequence) @ v
    # `_WIDTH` at a time as if nothing came before, then what does come before each of those, by the same scan
    padding = -n % _WIDTH
    log_decay = padded(log_decay, -1, n + padding).unflatten(-1, (-1, _WIDTH))  # (..., pieces, _WIDTH)
    v = padded(v, -2, n + padding).unflatten(-2, (-1, _WIDTH))  # (..., pieces, _WIDTH, features)
    if sequence is not None:
        sequence = torch.cat([sequence, sequence[-1:].expand(padding)]).unflatten(0, (-1, _WIDTH))  # (pieces, _WIDTH)
    sums = _sums(log_decay, sequence)
    own = _segment_decay(sums, v.dtype, sequence) @ v
    last = None if sequence is None else sequence[:, -1]
    before = F.pad(_scan(sums[..., -1], own[..., -1, :], last), (0, 0, 1, 0))[..., :-1, :]
    reaching = sums.to(v.dtype).exp()
    if sequence is not None and last is not None:
        reaching = torch.where(sequence == F.pad(last, (1, 0), value=-1)[:-1, None], reaching, 0)
    h = own + reaching[..., None] * before[..., None, :]  # (..., pieces, _WIDTH, features)
    return h.flatten(-3, -2)[..., :n, :]  # (..., n, features)


def _sums(log_decay: Tensor, sequence: Tensor | None = None) -> Tensor:
    """Those up to each one of the last axis, float64; of each sequence by itself, so that their bits do not depend on
    others. (`cumsum` on a GPU is refused where results must repeat.)

    sequence: `(n,)`, or `(..., n)` with as many axes as there are before the last one of `log_decay`.
    """
    n = log_decay.shape[-1]
    before = torch.ones(n, n, dtype=log_decay.dtype, device=log_decay.device).triu()
    if sequence is None:
        return log_decay @ before
    before = before * (sequence[..., :, None] == sequence[..., None, :])  # (..., n, n)
    return (log_decay[..., None, :] @ before)[..., 0, :]


def _segment_decay(sums: Tensor, dtype: torch.dtype, sequence: Tensor | None = None) -> Tensor:
    """exp of the sum of log-decays over k + 1 ... q at `(..., q, k)`; 0 where k > q or the two sequences differ.

    sums `(..., n)`, float64: their difference is exact to what `dtype` holds. sequence `(..., n)`.
    """
    n = sums.shape[-1]
    exponent = (sums[..., :, None] - sums[..., None, :]).to(dtype)  # (..., q, k)
    hidden = torch.ones(n, n, dtype=torch.bool, device=sums.device).triu(1)
    if sequence is not None:
        hidden = hidden | (sequence[..., :, None] != sequence[..., None, :])  # (..., q, k)
    return exponent.masked_fill(hidden, -torch.inf).exp()


def _layout(arguments: SsdArguments) -> tuple[int, int, _Layout]:
    """Positions a chunk, how many chunks, and where everything is."""
    length, cu_seqlens, device = arguments.x.shape[1], arguments.cu_seqlens, arguments.x.device
    if cu_seqlens is None:
        size = min(arguments.chunk_size, max(1, length))
        n_chunks = max(1, -(-length // size))
        size = min(size, _whole(-(-length // n_chunks)))  # no more padding than it takes
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return size, n_chunks, _Layout(None, None, zero, zero + (n_chunks - 1), None)
    size = min(arguments.chunk_size, _whole(-(-length // max(1, arguments.n_sequences))))
    # those left over go on with the last sequence, where they change nothing
    chunks = sequences.in_chunks(cu_seqlens, length, size)
    return size, chunks.n, _Layout(chunks.place, chunks.owner, chunks.begin, chunks.last, (chunks.counts > 0)[:, None])


def _whole(steps: int) -> int:
    return max(_STEP, -(-steps // _STEP) * _STEP)


def _forward_in_time(arguments: SsdArguments) -> SsdArguments:
    """The same with time running forward."""
    if not arguments.reverse:
        return arguments
    arguments = arguments._replace(**{name: getattr(arguments, name).flip(1) for name in ("x", "dt", "B", "C")})
    if arguments.cu_seqlens is None:
        return arguments
    state = arguments.initial_state
    return arguments._replace(
        cu_seqlens=sequences.flipped(arguments.cu_seqlens), initial_state=None if state is None else state.flip(0)
    )


def _fake(a: SsdArguments) -> tuple[Tensor, Tensor]:
    final = a.x.new_empty((a.n_sequences, *a.x.shape[2:], a.B.shape[3]), dtype=working_dtype(a.x))
    return a.x.new_empty(a.x.shape), final


_anywhere = exported(
    "ssd_torch",
    SsdArguments,
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool reverse, bool wants_final_state, int chunk_size",
    _in_full,
    _fake,
)
