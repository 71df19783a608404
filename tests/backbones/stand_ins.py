"""Small mixers for tests of what is around them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mambaseq.mixers.base import Mixer, State, check_state


@dataclasses.dataclass
class NoState(State):
    """seen `(batch, 0)`: only how many sequences there are."""

    seen: Tensor


class TinyMLP(Mixer):
    """Position by position.

    Args:
        d_model: width.
        factor: hidden width over d_model.
    """

    position_wise = True

    def __init__(self, d_model: int, factor: int = 2) -> None:
        super().__init__()
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, factor * d_model)
        self.out_proj = nn.Linear(factor * d_model, d_model)

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        y = self.out_proj(self.in_proj(x).relu())
        return (y, self.init_state(len(x) if cu_seqlens is None else len(cu_seqlens) - 1)) if return_state else y

    def init_state(self, batch_size: int, max_length: Any = None, dtype: Any = None, device: Any = None) -> NoState:
        return NoState(torch.zeros(batch_size, 0))


@dataclasses.dataclass
class Seen(State):
    """rows `(batch, capacity, d_model)`: all inputs, the newest last; count `(batch,)` int64: how many of them."""

    rows: Tensor
    count: Tensor


class Attends(Mixer):
    """The mean of all inputs up to a position: a state that grows, and a companion."""

    bounded_state = False
    companion = "mlp"

    def __init__(self, d_model: int, n_heads: int = 1) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: Seen | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        if cu_seqlens is None:
            cuts = torch.arange(len(x) + 1) * x.shape[1]
        else:
            cuts = cu_seqlens.long()
        n, flat = len(cuts) - 1, x.flatten(0, 1)
        state = self.init_state(n) if state is None else state
        check_state("attends", state, Seen, x.device, count=(n,))
        ys, kept = [], []
        for i in range(n):
            old = state.rows[i, len(state.rows[i]) - int(state.count[i]) :]
            rows = torch.cat([old, flat[int(cuts[i]) : int(cuts[i + 1])]])
            ys.append((rows.cumsum(0) / torch.arange(1, len(rows) + 1)[:, None])[len(old) :])
            kept.append(rows)
        y = self.out_proj(torch.cat(ys).view_as(x))
        longest = max(len(rows) for rows in kept)
        new = Seen(
            torch.stack([torch.cat([rows.new_zeros(longest - len(rows), self.d_model), rows]) for rows in kept]),
            torch.tensor([len(rows) for rows in kept]),
        )
        return (y, new) if return_state else y

    def init_state(self, batch_size: int, max_length: Any = None, dtype: Any = None, device: Any = None) -> Seen:
        return Seen(torch.zeros(batch_size, 0, self.d_model), torch.zeros(batch_size, dtype=torch.long))

    def step_(self, x: Tensor, state: Seen) -> Tensor:
        y, new = self.forward(x, state=state, return_state=True)
        state.rows, state.count = new.rows, new.count
        return y
