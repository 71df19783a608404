"""Changes between a resolution of time and a coarser one, causally, with a state.

Goel et al., "It's Raw! Audio Generation with State-Space Models" (SaShiMi), arXiv:2202.09729, section 4.2: a linear map
turns `pool` neighbouring positions into one; on the way up a linear map turns one into `pool` positions, shifted by one
coarse position, so that a window's result is used in the next window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.mixers.base import State, check_state
from mambaseq.ops import sequences


@dataclasses.dataclass
class PoolState(State):
    """Each sequence's place in its window; sequences of a batch may be at different places.

    begun `(batch, pool - 1, d_model)` fp32: the positions of the incomplete window, followed by zeros.
    held `(batch, d_coarse)` fp32: the coarse output that is used in this window; zeros in the first.
    count `(batch,)` int64: how many positions the window has so far.
    """

    begun: Tensor
    held: Tensor
    count: Tensor


@dataclasses.dataclass
class Begun(State):
    """What of a PoolState the way down needs and makes."""

    begun: Tensor
    count: Tensor


@dataclasses.dataclass
class Held(State):
    """What of a PoolState the way up needs and makes."""

    held: Tensor


class Way(NamedTuple):
    """A pooling's way down or up as the owner of its states, which ranks that share sequences hand on like those of a
    mixer."""

    pool: Pool
    init_state: Callable[..., Any]
    position_wise: bool = False
    bounded_state: bool = True

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.pool.parameters()


class Windows(NamedTuple):
    """The places of windows of packed sequences, in tensors only: nothing is read on the host.

    How many windows a sequence completes depends on its place in its window, so the coarse row is as long as could be
    needed; its unused part is one more sequence at the end.

    cu_seqlens: int32, of the coarse row, the filler included. length: of the coarse row. completed `(sequences,)`:
        windows that each completes. sources `(length * pool,)`, kept `(sequences * (pool - 1),)`: rows of [x, begun],
        from which the windows and the new `begun` are made. is_kept `(sequences, pool - 1)`. targets `(positions,)`:
        for each fine position its row in [coarse, held], times pool.
    left: the new count.
    """

    cu_seqlens: Tensor
    length: int
    completed: Tensor
    sources: Tensor
    kept: Tensor
    is_kept: Tensor
    targets: Tensor
    left: Tensor


def windows(cu_seqlens: Tensor, positions: int, count: Tensor, pool: int) -> Windows:
    """cu_seqlens `(sequences + 1,)` of a row of `positions`; count: `PoolState.count` before it."""
    n, device = count.shape[0], count.device
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    total = count + lengths
    completed = total // pool
    length = (positions + n * (pool - 1)) // pool
    begins = F.pad(completed.cumsum(0), (1, 0))
    coarse = F.pad(begins, (0, 1), value=length).to(torch.int32)

    owner = sequences.of_positions(coarse, length)
    filler = owner == n
    owner = owner.clamp(max=n - 1)
    window = torch.arange(length, device=device) - begins[owner]
    place = (window * pool - count[owner])[:, None] + torch.arange(pool, device=device)  # (length, pool)

    def row(place: Tensor, owner: Tensor) -> Tensor:
        """The row of [x, begun] for a place counted from the sequence's first position here; earlier places are in
        begun."""
        before = positions + owner * (pool - 1) + place + count[owner]
        return torch.where(place >= 0, bounds[owner] + place, before)

    sources = torch.where(filler[:, None], 0, row(place, owner[:, None]))  # (length, pool)
    left = total % pool
    slot = torch.arange(pool - 1, device=device)
    is_kept = slot < left[:, None]  # (sequences, pool - 1)
    everyone = torch.arange(n, device=device)[:, None]  # (sequences, 1)
    kept = torch.where(is_kept, row((lengths - left)[:, None] + slot, everyone), 0)  # (sequences, pool - 1)

    fine = sequences.of_positions(cu_seqlens, positions)
    since = count[fine] + torch.arange(positions, device=device) - bounds[fine]
    serves = since // pool - 1
    targets = torch.where(serves >= 0, begins[fine] + serves, length + fine) * pool + since % pool
    return Windows(coarse, length, completed, sources.flatten(), kept.flatten(), is_kept, targets, left)


class Pool(nn.Module):
    """The linear maps between a resolution and the next, without biases, so an empty past gives zeros.

    Args:
        d_model: width of the finer resolution.
        d_coarse: width of the coarser one.
        pool: positions that are joined into one.
    """

    def __init__(self, d_model: int, d_coarse: int, pool: int) -> None:
        super().__init__()
        self.d_model, self.d_coarse, self.pool = d_model, d_coarse, pool
        self.down = nn.Linear(pool * d_model, d_coarse, bias=False)
        self.up = nn.Linear(d_coarse, pool * d_model, bias=False)

    def shorten(self, x: Tensor) -> Tensor:
        """x `(batch, length, d_model)` fp32 to `(batch, length // pool, d_coarse)` fp32."""
        whole = x.shape[1] // self.pool
        return self._apply_linear(
            self.down, x[:, : whole * self.pool].reshape(x.shape[0], whole, self.pool * self.d_model)
        )

    def lengthen(self, y: Tensor, length: int) -> Tensor:
        """y `(batch, length // pool, d_coarse)` fp32 to `(batch, length, d_model)` fp32."""
        fine = self._apply_linear(self.up, y).reshape(y.shape[0], y.shape[1] * self.pool, self.d_model)
        return F.pad(fine, (0, 0, self.pool, 0))[:, :length]

    def shorten_packed(self, x: Tensor, state: Begun, at: Windows) -> Tensor:
        """x `(positions, d_model)` fp32 to `(at.length, d_coarse)` fp32."""
        rows = torch.cat([x, state.begun.flatten(0, 1)])
        # (at.length, d_coarse)
        return self._apply_linear(self.down, rows.index_select(0, at.sources).view(at.length, -1))

    def lengthen_packed(self, y: Tensor, state: Held, at: Windows) -> Tensor:
        """y `(at.length, d_coarse)` fp32 to `(positions, d_model)` fp32."""
        # rows of a fine position, (…, d_model)
        fine = self._apply_linear(self.up, torch.cat([y, state.held])).view(-1, self.d_model)
        return fine.index_select(0, at.targets)

    def next_begun(self, x: Tensor, state: Begun, at: Windows) -> Begun:
        """The state after positions x `(positions, d_model)`."""
        rows = torch.cat([x, state.begun.flatten(0, 1)])
        begun = rows.index_select(0, at.kept).view_as(state.begun)
        # begun (sequences, pool - 1, d_model)
        return Begun(torch.where(at.is_kept[..., None], begun, 0.0), at.left)

    def next_held(self, y: Tensor, state: Held, at: Windows) -> Held:
        """The state after positions whose coarse outputs are y `(at.length, d_coarse)`."""
        last = (at.cu_seqlens[1:-1].long() - 1).clamp(min=0)
        return Held(
            torch.where(at.completed[:, None] > 0, y.index_select(0, last), state.held)
        )  # (sequences, d_coarse)

    def final_state(self, x: Tensor, y: Tensor) -> PoolState:
        """The same for whole sequences, x `(batch, length, d_model)` and y `(batch, length // pool, d_coarse)`."""
        whole = x.shape[1] // self.pool * self.pool
        left = x.shape[1] - whole
        return PoolState(
            F.pad(x[:, whole:], (0, 0, 0, self.pool - 1 - left)),
            y[:, -1] if whole else y.new_zeros(x.shape[0], self.d_coarse),
            torch.full((x.shape[0],), left, device=x.device),
        )

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> PoolState:
        device = self.down.weight.device if device is None else device
        return PoolState(
            torch.zeros(batch_size, self.pool - 1, self.d_model, device=device),
            torch.zeros(batch_size, self.d_coarse, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def init_begun(self, batch_size: int, max_length: int | None = None, *, device: Any = None) -> Begun:
        state = self.init_state(batch_size, device)
        return Begun(state.begun, state.count)

    def init_held(self, batch_size: int, max_length: int | None = None, *, device: Any = None) -> Held:
        return Held(self.init_state(batch_size, device).held)

    def check(self, state: PoolState, n: int, device: torch.device) -> None:
        """Raise ValueError unless the state is one of n sequences, on this device."""
        shapes = {"begun": (n, self.pool - 1, self.d_model), "held": (n, self.d_coarse), "count": (n,)}
        check_state("unet", state, PoolState, device, **shapes)

    def step_(self, x: Tensor, state: PoolState, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x `(batch, 1, d_model)` fp32, and which sequences take a step, `(batch,)` bool (None: all); changes begun and
        count.

        Returns the coarser resolution's contribution to this position `(batch, 1, d_model)`, the window's coarse input
        `(batch, 1, d_coarse)`, both fp32, and whose windows are complete, `(batch,)` bool; the input of the others is
        meaningless.
        """
        everyone = torch.arange(len(x), device=x.device)
        parts = self._apply_linear(self.up, state.held).view(len(x), self.pool, self.d_model)  # (batch, pool, d_model)
        given = parts[everyone, state.count][:, None]  # (batch, 1, d_model)
        # (batch, 1, d_coarse)
        coarse = self._apply_linear(self.down, torch.cat([state.begun, x], 1).flatten(1))[:, None]
        whole = state.count == self.pool - 1
        if active is not None:
            whole = whole & active
        here = torch.arange(self.pool - 1, device=x.device) == state.count[:, None]  # (batch, pool - 1)
        if active is not None:
            here = here & active[:, None]
        begun = torch.where(here[..., None], x, state.begun)  # (batch, pool - 1, d_model)
        state.begun.copy_(torch.where(whole[:, None, None], 0.0, begun))
        steps = torch.ones_like(state.count) if active is None else active.long()
        state.count.copy_((state.count + steps) % self.pool)
        return given, coarse, whole

    @staticmethod
    def _apply_linear(linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x.to(linear.weight.dtype)).float()
