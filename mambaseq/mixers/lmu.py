"""Legendre memory units (LMU) in their parallel form.

Voelker, Kajic and Eliasmith, "Legendre Memory Units: Continuous-Time Representation in Recurrent Neural Networks",
NeurIPS 2019; Chilkuri and Eliasmith, "Parallelizing Legendre Memory Unit Training", arXiv:2102.11417.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive, check_sizes, shown
from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.mixers.hippo import constant, keep_constant, transition
from mambaseq.ops import sequences, state_space_scan
from mambaseq.ops.dtypes import without_autocast, working_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


@dataclasses.dataclass
class LMUState(State):
    """memory `(batch, d_memory, d_state)` fp32: Legendre coefficients of each signal's window."""

    memory: Tensor


class LMU(Mixer):
    """Legendre memory unit: signals made of the input, each remembered over a sliding window, and a layer that reads.

        u = W_u x + b_u
        m' = A m + B u, zero-order hold          (a Padé approximant of a delay of theta)
        o = f(W_m m + W_x x + b),  y = W_o o

    A and B are fixed. m is in the orthonormal basis, where the paper's is (-1)^i sqrt(2 i + 1) m_i: the same layer with
    columns of W_m rescaled. The last map is the framework's, which adds to a residual stream.

    Args:
        d_model: width of the residual stream.
        d_state: order of the memory: Legendre polynomials a signal.
        d_memory: number of signals u.
        theta: length of the window in positions; d_state / theta is about the highest frequency that is kept.
        d_hidden: width of o; None for d_model.
        activation: f: gelu, relu or tanh.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        d_memory: int = 8,
        theta: float = 256.0,
        d_hidden: int | None = None,
        activation: Literal["gelu", "relu", "tanh"] = "gelu",
    ) -> None:
        super().__init__()
        d_hidden = d_model if d_hidden is None else d_hidden
        check_sizes("lmu", d_model=d_model, d_state=d_state, d_memory=d_memory, d_hidden=d_hidden)
        check_positive("lmu", theta=theta)
        if activation not in _ACTIVATIONS:
            raise ConfigError(f"lmu: activation is one of {', '.join(_ACTIVATIONS)}, not {shown(activation)}.")
        self.d_model, self.d_state, self.d_memory, self.activation = d_model, d_state, d_memory, activation
        A, B = transition("legt", d_state)
        # the exponential of [[A, B], [0, 0]] has that of A and the zero-order hold of B in its upper rows
        both = torch.zeros(d_state + 1, d_state + 1, dtype=A.dtype)
        both[:-1] = torch.cat([A, B[:, None]], 1) / theta  # (d_state, d_state + 1)
        held = torch.linalg.matrix_exp(both)[:-1]
        keep_constant(self, Abar_less_one=held[:, :-1] - torch.eye(d_state, dtype=A.dtype), Bbar=held[:, -1])
        self.in_proj = nn.Linear(d_model, d_memory)
        self.memory_proj = nn.Linear(d_memory * d_state, d_hidden, bias=False)
        self.x_proj = nn.Linear(d_model, d_hidden)
        self.out_proj = nn.Linear(d_hidden, d_model)
        nn.init.zeros_(self.out_proj.bias)
        # a window of a signal of variance 1 has coefficients whose squares add up to 1
        nn.init.normal_(self.memory_proj.weight, std=d_memory**-0.5)

    def forward(
        self, x: Tensor, state: LMUState | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        u = self.in_proj(x)
        change = constant(self, "Abar_less_one")
        memory, final = state_space_scan(
            u.to(working_dtype(u)),
            (torch.eye(self.d_state, dtype=change.dtype, device=change.device) + change)[None],  # (1, d_state, d_state)
            constant(self, "Bbar")[None],  # (1, d_state)
            initial_state=None if state is None else state.memory,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        y = self._output(memory, x)
        return (y, LMUState(final)) if return_state else y

    def _check(self, state: LMUState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = (sequences.count(x, cu_seqlens), self.d_memory, self.d_state)
        check_state("lmu", state, LMUState, x.device, memory=shape)

    def _output(self, memory: Tensor, x: Tensor) -> Tensor:
        """memory `(…, d_memory, d_state)` and x `(…, d_model)` to y."""
        read = self.memory_proj(memory.flatten(-2).to(x.dtype))  # (…, d_hidden)
        return self.out_proj(_ACTIVATIONS[self.activation](read + self.x_proj(x)))

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LMUState:
        """See `Mixer.init_state`."""
        device = self.out_proj.weight.device if device is None else device
        return LMUState(torch.zeros(batch_size, self.d_memory, self.d_state, device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: LMUState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        x, dtype = x[:, 0], state.memory.dtype
        u = self.in_proj(x).to(dtype)[..., None]  # (batch, d_memory, 1)
        change, B = (constant(self, name).to(dtype) for name in ("Abar_less_one", "Bbar"))
        with without_autocast(x.device.type):
            # (Abar - 1) m, for m's digits where Abar is near 1
            state.memory.add_(state.memory @ change.mT + u * B)
        return self._output(state.memory, x).unsqueeze(1)  # (batch, 1, d_model)
