"""Mamba-3's recurrence in plain PyTorch, on any device: matrix products inside of chunks, states between them.

What a position writes enters with its own step and once more with the next position's, before that one's decay. So
later positions see it with one weight, the sum of both, and itself with the first alone: it is the state-space dual
(Dao and Gu, arXiv:2405.21060, section 6) with a diagonal of its own. What the last position of a sequence writes has
no second part yet; whoever goes on brings it, by `initial_x` and `initial_B`.

Decays are summed in float64 and exponentiated as differences inside of a chunk. Everything else is in the working
precision, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops.chunks import FORGOTTEN, Chunks, forward_in_time, sums
from mambaseq.ops.dtypes import without_autocast, working_dtype
from mambaseq.ops.operators import exported
from mambaseq.ops.trapezoid.arguments import TrapezoidArguments

OVER_TIME = ("x", "dt", "A", "trap", "B", "C")
OF_SEQUENCES = ("initial_state", "initial_x", "initial_B")


def run(arguments: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the final state."""
    y, final = _anywhere(arguments)
    return y, final


def _in_full(arguments: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    with without_autocast(arguments.x.device.type):
        return _run(arguments)


def _run(given: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    arguments: TrapezoidArguments = forward_in_time(given, OVER_TIME, OF_SEQUENCES)
    x, dt, A, trap, B, C, initial, *_ = arguments
    wide, (_, length, heads, rank, head_dim), d_state = working_dtype(x), x.shape, B.shape[4]
    shape = (arguments.n_sequences, heads, head_dim, d_state)
    initial = x.new_zeros(shape, dtype=wide) if initial is None else initial.to(wide)
    if shape[0] == 0:
        return x, initial
    chunks = Chunks.of(length, arguments.cu_seqlens, arguments.chunk_size)

    def in_chunks(value: Tensor) -> Tensor:
        return chunks.cut(value).transpose(2, 3)

    dt, trap = dt.to(wide), trap.to(wide)
    old = (1 - trap) * dt
    later, entered = of_the_next(arguments, old), first_entered(arguments, initial, old)
    # axes: b(atch), c(hunk), h(ead), i and j (positions of a chunk), r (rank), p (head_dim), n (d_state)
    at_once, later = in_chunks(trap * dt), in_chunks(later)  # b c h j
    log_decay = in_chunks(dt.double() * A.double()).clamp(min=FORGOTTEN)
    total = sums(log_decay[..., None])  # b c h i 1
    exponent = (total - total.mT).to(wide)  # b c h i j
    hidden = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=x.device).triu(1)
    weight = exponent.masked_fill(hidden, -torch.inf).exp() * (at_once + later)[..., None, :]
    weight = torch.where(torch.eye(chunks.size, dtype=torch.bool, device=x.device), at_once[..., None, :], weight)
    # ranks of a position stand side by side: b c h ir n and b c h ir p
    B, C, u = (in_chunks(value.to(wide)).flatten(3, 4) for value in (B, C, x))
    scores = (C @ B.mT).unflatten(4, (-1, rank)).unflatten(3, (-1, rank))  # b c h i r j r
    scores = (scores * weight[..., :, None, :, None]).flatten(5, 6).flatten(3, 4)  # b c h ir jr
    to_end = (total[..., -1:, :] - total).to(wide).exp() * (at_once + later)[..., None]  # b c h j 1
    added = ((u * to_end.repeat_interleave(rank, dim=3)).mT @ B).unbind(1)  # b h p n
    kept = total.to(wide).exp()
    whole = kept[..., -1:, :].unbind(1)  # b h 1 1
    entering, final = chunks.pass_on(entered, lambda c, state: state * whole[c] + added[c])
    y = scores @ u + kept.repeat_interleave(rank, dim=3) * (C @ entering.mT)  # b c h ir p
    y = chunks.join(y.unflatten(3, (-1, rank)).transpose(2, 3))
    if chunks.filled is not None:  # what entered has its second part, which nothing has called for in an empty sequence
        final = torch.where(chunks.filled, final, initial)
    elif length == 0:
        final = initial.clone()
    if given.reverse:
        y, final = y.flip(1), final if given.cu_seqlens is None else final.flip(0)
    return y.to(x.dtype), final


def of_the_next(arguments: TrapezoidArguments, old: Tensor) -> Tensor:
    """How much of what a position writes the next one adds `(batch, length, heads)`, 0 at the end of a sequence.

    old: how much each adds of what the one before it has written.
    """
    length, bounds = old.shape[1], arguments.cu_seqlens
    later = torch.cat([old[:, 1:], torch.zeros_like(old[:, :1])], dim=1)
    if bounds is None:
        return later
    begins = torch.zeros(length + 1, dtype=torch.bool, device=old.device).index_fill(0, bounds.long(), True)
    return later.masked_fill(begins[1:, None], 0)


def first_entered(arguments: TrapezoidArguments, initial: Tensor, old: Tensor) -> Tensor:
    """Initial states to which the first position of each sequence has added what was written before; old: as above."""
    length, bounds = old.shape[1], arguments.cu_seqlens
    if arguments.initial_x is None or arguments.initial_B is None or length == 0:
        return initial
    if bounds is None:
        first = old[:, 0]  # (sequences, heads)
    else:
        first = old[0].index_select(0, bounds[:-1].long().clamp(max=length - 1))
    before = arguments.initial_x.to(old.dtype).mT @ arguments.initial_B.to(old.dtype)
    return initial + first[..., None, None] * before


def _fake(a: TrapezoidArguments) -> tuple[Tensor, Tensor]:
    final = a.x.new_empty((a.n_sequences, a.x.shape[2], a.x.shape[4], a.B.shape[4]), dtype=working_dtype(a.x))
    return a.x.new_empty(a.x.shape), final


_anywhere = exported(
    "trapezoidal_scan_torch",
    TrapezoidArguments,
    "Tensor x, Tensor dt, Tensor A, Tensor trap, Tensor B, Tensor C, Tensor? initial_state, Tensor? initial_x, "
    "Tensor? initial_B, Tensor? cu_seqlens, bool reverse, bool wants_final_state, int chunk_size",
    _in_full,
    _fake,
)
