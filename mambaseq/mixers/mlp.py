"""The position-wise layer of a Transformer, used between mixers along time.

SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 6, as in LLaMA (arXiv:2302.13971).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_sizes, shown
from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.ops.linear import apply_linear


@dataclasses.dataclass
class MLPState(State):
    """Nothing: a position does not look at others."""


class MLP(Mixer):
    """out_proj(silu(gate) * up), or out_proj(gelu(up)), of each position by itself.

    Args:
        d_model: width of the residual stream.
        hidden: inner width. None gives as many weights as a GELU layer of width 4 d_model: 4 d_model for gelu, 8/3
            d_model rounded up to a multiple of 8 for swiglu.
        expand: inner width over d_model, in place of `hidden`, where widths differ (as in a unet).
        activation: swiglu, gelu, or gelu_tanh, its approximation by a tanh (as in GPT-2 and HyenaDNA).
        bias: biases of both linear maps.
    """

    position_wise = True

    def __init__(
        self,
        d_model: int,
        hidden: int | None = None,
        activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu",
        bias: bool = False,
        expand: int | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("swiglu", "gelu", "gelu_tanh"):
            raise ConfigError(f"mlp: activation must be swiglu, gelu or gelu_tanh, not {shown(activation)}.")
        check_sizes("mlp", d_model=d_model, hidden=hidden, expand=expand)
        if expand is not None:
            if hidden is not None:
                raise ConfigError(f"mlp: expand {expand} takes the place of hidden {hidden}. Leave one of them out.")
            hidden = expand * d_model
        self.d_model = d_model
        self.activation: Literal["swiglu", "gelu", "gelu_tanh"] = activation
        if hidden is None:
            hidden = -(-8 * d_model // 24) * 8 if activation == "swiglu" else 4 * d_model
        self.hidden = hidden
        self.in_proj = nn.Linear(d_model, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.out_proj = nn.Linear(hidden, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: MLPState | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            check_state("mlp", state, MLPState, x.device)
        y = self._layer(x)
        return (y, MLPState()) if return_state else y

    def _layer(self, x: Tensor) -> Tensor:
        x = apply_linear(self.in_proj, x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return apply_linear(self.out_proj, F.silu(gate) * up)
        return apply_linear(self.out_proj, F.gelu(x, approximate="none" if self.activation == "gelu" else "tanh"))

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MLPState:
        """See `Mixer.init_state`."""
        return MLPState()

    @torch.no_grad()
    def step_(self, x: Tensor, state: MLPState) -> Tensor:
        """See `Mixer.step_`."""
        check_state("mlp", state, MLPState, x.device)
        return self._layer(x[:, 0]).unsqueeze(1)  # (batch, 1, d_model)

    @torch.no_grad()
    def positions(self, x: Tensor, state: MLPState) -> tuple[Tensor, MLPState]:
        """See `Mixer.positions`."""
        return self._layer(x), MLPState()
