"""What the layers around a time-invariant system share: their state, GELU, and a gated linear output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.ops import sequences


@dataclasses.dataclass
class LTIState(State):
    """ssm `(batch, …)`: the system's state, fp32 or complex64."""

    ssm: Tensor


class LTILayer(Mixer):
    """A linear system, GELU, and a linear output that is gated by its other half and mixes channels (GLU).

    ssm has `state_shape`, `state_dtype()`; `forward(x, state=, cu_seqlens=, return_state=)` of x `(batch, length,
    d_model)` and the state's tensor `(sequences, *state_shape)`, which gives y and the state, made if it is wanted;
    `step_(x, state)` of x `(batch, d_model)`, which changes the state in place.
    """

    def __init__(self, name: str, d_model: int, ssm: nn.Module) -> None:
        super().__init__()
        self.name, self.d_model = name, d_model
        self.ssm: Any = ssm
        self.out_proj = self._make_output()
        nn.init.zeros_(self.out_proj.bias)

    def _make_output(self) -> nn.Linear:
        return nn.Linear(self.d_model, 2 * self.d_model)

    def _output(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def forward(
        self, x: Tensor, state: LTIState | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        initial = None if state is None else state.ssm
        y, ssm_state = self.ssm(x, state=initial, cu_seqlens=cu_seqlens, return_state=return_state)
        y = self._output(y)
        return (y, LTIState(ssm_state)) if return_state else y

    def _check(self, state: LTIState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = (sequences.count(x, cu_seqlens), *self.ssm.state_shape)
        check_state(self.name, state, LTIState, x.device, ssm=shape)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LTIState:
        """See `Mixer.init_state`."""
        device = self.out_proj.weight.device if device is None else device
        shape = (batch_size, *self.ssm.state_shape)
        return LTIState(torch.zeros(shape, dtype=self.ssm.state_dtype(), device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: LTIState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        return self._output(self.ssm.step_(x[:, 0], state.ssm)).unsqueeze(1)  # (batch, 1, d_model)
