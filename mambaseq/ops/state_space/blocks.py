"""The scan of dense linear systems over blocks of time, in PyTorch: any device, real or complex, autograd's gradients.

Time is cut into blocks of T steps, none of which belongs to two sequences. With H_j the state after block j,

    y of block j = (C A^(t-s) B) x of block j + (C A^(t+1)) H_{j-1}
    H_j          = A^T H_{j-1} + sum_s A^(T-1-s) B x_s

so that all of y is two products of matrices, and states are made once a block, by a scan whose depth is logarithmic
in the number of blocks. The tables of powers are made by doubling in float64: a system that is slow beside its step
has A near 1, and what rounding does to A grows with the power.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.chunks import padded
from mambaseq.ops.dtypes import without_autocast
from mambaseq.ops.operators import exported
from mambaseq.ops.state_space.arguments import StateSpaceArguments

# Steps of a block at the most: a step costs T + 2 d_state multiplications, a block d_state numbers of memory.
_LONGEST = 64


class _Tables(NamedTuple):
    """Of one block, for row vectors; n and k are states, s and t steps, m outputs."""

    within: Tensor  # (systems, s, t · m): C A^(t-s) B
    carried: Tensor  # (systems, n, t · m): C A^(t+1)
    summed: Tensor  # (systems, s, n): A^(T-1-s) B
    powers: list[Tensor]  # (systems, k, n) float64: A, A^2, A^4, ... A^T, transposed


class _Layout(NamedTuple):
    """Where sequences lie among the blocks."""

    steps: int  # T
    blocks: int
    place: Tensor | None  # (length,) the place of each packed position among all blocks' steps
    first: Tensor  # (blocks, 1) bool: a sequence begins here
    sequence: Tensor  # (blocks,) which
    last: Tensor  # (sequences,) the block that a sequence ends in
    rest: Tensor  # (sequences, 1) how many steps of it are the sequence's; 0 of an empty sequence


def run(arguments: StateSpaceArguments) -> tuple[Tensor, Tensor]:
    """y and the final state, in the working precision."""
    y, final = _anywhere(arguments)
    return y, final


def _in_full(arguments: StateSpaceArguments) -> tuple[Tensor, Tensor]:
    # Autocast would round states and powers to half precision in the matrix products.
    with without_autocast(arguments.x.device.type):
        return _run(arguments)


def _run(arguments: StateSpaceArguments) -> tuple[Tensor, Tensor]:
    x, A, B, C, initial, cu_seqlens, wants_final_state = arguments
    batch, length, channels = x.shape
    systems, outputs, d_state = C.shape
    x = x.to(arguments.dtype)
    if initial is not None:
        # a row for every sequence of each channel
        # (systems, channels of each, sequences, d_state)
        initial = initial.to(x.dtype).permute(1, 0, 2).unflatten(0, (systems, channels // systems))
    if batch == 0 or length == 0:
        empty = x[..., None].expand(-1, -1, -1, outputs)  # (batch, length, channels, outputs)
        if initial is None:
            initial = x.new_zeros(systems, channels // systems, arguments.n_sequences, d_state)
        return empty, _of_sequences(initial.clone())
    layout = _layout(arguments)
    tables = _tables(A, B, C, layout.steps, x.dtype)

    signal = _split(x, layout)  # (blocks, steps, channels)
    rows = signal.permute(2, 0, 1).reshape(systems, -1, layout.steps)  # (systems, channels of each * blocks, steps)
    # (systems, channels of each, blocks, d_state)
    sums = (rows @ tables.summed).unflatten(1, (channels // systems, layout.blocks))
    over_block = tables.powers[-1]
    if initial is not None:
        entering = _apply(initial, over_block)[:, :, layout.sequence]
        sums = sums + torch.where(layout.first, entering, 0)
    several = layout.blocks > arguments.n_sequences or cu_seqlens is not None
    after = _scan(sums, ~layout.first, over_block) if several else sums
    before = F.pad(after[:, :, :-1], (0, 0, 1, 0))
    before = torch.where(layout.first, 0 if initial is None else initial[:, :, layout.sequence], before)
    # (systems, channels of each * blocks, steps * outputs)
    y = torch.baddbmm(before.flatten(1, 2) @ tables.carried, rows, tables.within)
    y = y.view(channels, layout.blocks, layout.steps, outputs).permute(1, 2, 0, 3)  # (blocks, steps, channels, outputs)
    y = _join(y, layout, batch, length)
    if not wants_final_state:
        return y, y.new_empty(0)
    return y, _of_sequences(_final(signal, before, initial, tables, layout))


def _of_sequences(state: Tensor) -> Tensor:
    """`(systems, channels of each, sequences, d_state)` → `(sequences, channels, d_state)`."""
    return state.flatten(0, 1).transpose(0, 1).contiguous()


def _apply(state: Tensor, power: Tensor) -> Tensor:
    """A power of A to states `(systems, channels of each, any, d_state)`."""
    return (state.flatten(1, 2) @ power.to(state.dtype)).view(state.shape)


def _tables(A: Tensor, B: Tensor, C: Tensor, steps: int, dtype: torch.dtype) -> _Tables:
    double = torch.complex128 if dtype.is_complex else torch.float64
    # (systems, n, n), (systems, 1, n), (systems, n, m)
    A, B, C = A.to(double).mT, B.to(double)[:, None], C.to(double).mT
    powers = [A]
    impulse = B  # (systems, l, n): A^l B
    readout = A @ C  # (systems, n, l · m): C A^(l+1)
    while impulse.shape[1] < steps:
        impulse = torch.cat([impulse, impulse @ powers[-1]], 1)  # (systems, 2 l, n)
        readout = torch.cat([readout, powers[-1] @ readout], 2)  # (systems, n, 2 l · m)
        powers.append(powers[-1] @ powers[-1])
    kernel = (impulse @ C).to(dtype)
    # all its shifts: window t holds the kernel's values at t - (T - 1), ..., t, those before 0 being 0
    shifts = F.pad(kernel, (0, 0, steps - 1, 0)).unfold(1, steps, 1)  # (systems, t, m, s from the last)
    within = shifts.flip(-1).permute(0, 3, 1, 2).flatten(2)  # (systems, s, t · m)
    return _Tables(within, readout.to(dtype), impulse.flip(1).to(dtype), powers)


def _layout(arguments: StateSpaceArguments) -> _Layout:
    batch, length, _ = arguments.x.shape
    device, count = arguments.x.device, arguments.n_sequences
    # a packed sequence takes at least one block, however short: blocks are not to be longer than sequences
    typical = -(-length // max(1, count)) if arguments.cu_seqlens is not None else length
    steps = 1
    while steps < min(typical, _LONGEST):
        steps *= 2
    if arguments.cu_seqlens is None:
        per_row = -(-length // steps)
        numbers = torch.arange(batch * per_row, device=device)
        first = (numbers % per_row == 0)[:, None]  # (blocks, 1)
        rest = torch.full((batch, 1), length - (per_row - 1) * steps, device=device)
        return _Layout(steps, batch * per_row, None, first, numbers // per_row, numbers[per_row - 1 :: per_row], rest)
    # blocks that are left over go on from the last sequence, where nobody reads them
    blocks = sequences.in_chunks(arguments.cu_seqlens, length, steps)
    first = (torch.arange(blocks.n, device=device) == blocks.begin[blocks.owner])[:, None]  # (blocks, 1)
    rest = arguments.cu_seqlens.diff().long() - (blocks.counts - 1).clamp(min=0) * steps
    return _Layout(steps, blocks.n, blocks.place, first, blocks.owner, blocks.last, rest[:, None])


def _split(x: Tensor, layout: _Layout) -> Tensor:
    """`(batch, length, channels)` → `(blocks, steps, channels)`, zeros after each sequence."""
    batch, _, channels = x.shape
    shape = (layout.blocks, layout.steps, channels)
    if layout.place is None:
        return padded(x, 1, layout.blocks * layout.steps // batch).reshape(shape)
    room = x.new_zeros(layout.blocks * layout.steps, channels)
    return room.index_copy(0, layout.place, x[0]).view(shape)


def _join(y: Tensor, layout: _Layout, batch: int, length: int) -> Tensor:
    """`(blocks, steps, …)` → `(batch, length, …)`."""
    if layout.place is None:
        return y.reshape(batch, -1, *y.shape[2:])[:, :length]
    return y.flatten(0, 1).index_select(0, layout.place)[None]


def _scan(h: Tensor, keep: Tensor, power: Tensor) -> Tensor:
    """h_j ← h_j + (A^T h_{j-1} where keep_j), `(systems, channels of each, blocks, d_state)`, keep `(blocks, 1)`.

    Pairs of blocks are made one, scanned by the same, and taken apart: twice a loop's work, logarithmic in depth.
    """
    blocks = h.shape[2]
    if blocks == 1:
        return h
    if blocks % 2:
        h, keep = F.pad(h, (0, 0, 0, 1)), F.pad(keep, (0, 0, 0, 1))
    left, right = h[:, :, 0::2], h[:, :, 1::2]
    keep_left, keep_right = keep[0::2], keep[1::2]
    pairs = right + torch.where(keep_right, _apply(left, power), 0)
    odd = _scan(pairs, keep_left & keep_right, power @ power)
    before = F.pad(odd[:, :, :-1], (0, 0, 1, 0))
    even = left + torch.where(keep_left, _apply(before, power), 0)
    return torch.stack([even, odd], 3).flatten(2, 3)[:, :, :blocks]  # (systems, channels of each, blocks, d_state)


def _final(signal: Tensor, before: Tensor, initial: Tensor | None, tables: _Tables, layout: _Layout) -> Tensor:
    """The states after each sequence's last step, from those before its last block."""
    steps = layout.steps
    state = before[:, :, layout.last]
    for bit, power in enumerate(tables.powers):
        taken = (layout.rest >> bit) & 1 == 1
        state = torch.where(taken, _apply(state, power), state)
    # the last block's steps, moved to its end
    moved = torch.arange(steps, device=signal.device) - (steps - layout.rest)
    tail = signal.flatten(0, 1)[(layout.last[:, None] * steps + moved).clamp(min=0)]
    tail = torch.where((moved >= 0)[..., None], tail, 0)  # (sequences, steps, channels)
    rows = tail.permute(2, 0, 1).reshape(state.shape[0], -1, steps)  # (systems, channels of each * sequences, steps)
    state = state + (rows @ tables.summed).view(state.shape)  # (systems, channels of each, sequences, d_state)
    return torch.where(layout.rest > 0, state, 0 if initial is None else initial)


def _fake(a: StateSpaceArguments) -> tuple[Tensor, Tensor]:
    _, outputs, d_state = a.C.shape
    final = (a.n_sequences, a.x.shape[2], d_state) if a.wants_final_state else (0,)
    return a.x.new_empty((*a.x.shape, outputs), dtype=a.dtype), a.x.new_empty(final, dtype=a.dtype)


_anywhere = exported(
    "state_space_scan_torch",
    StateSpaceArguments,
    "Tensor x, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? cu_seqlens, bool wants_final_state",
    _in_full,
    _fake,
)
