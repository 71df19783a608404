"""Causal linear attention.

Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention", arXiv:2006.16236.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.ops import sequences, ssd
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear


@dataclasses.dataclass
class LinearAttentionState(State):
    """kv `(batch, n_heads, head_dim + 1, head_dim)`, fp32: the sum of v φ(k)ᵀ, and that of φ(k) in the last row."""

    kv: Tensor


class LinearAttention(Mixer):
    """Attention whose weights are φ(q)·φ(k) over their sum, φ = elu + 1 (equations 7 to 12): a state of fixed size.

    It is the state-space dual without decay, and with a column of ones beside the values for the sum of weights.
    The state is a sum over all of the history: nothing is forgotten.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; must divide d_model.
        bias: biases of qkv_proj and out_proj.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
    """

    companion = "mlp"
    eps = 1e-6  # sums of weights are not divided by below it

    def __init__(self, d_model: int, n_heads: int = 4, bias: bool = False, chunk_size: int = 64) -> None:
        super().__init__()
        check_heads("linear_attention", d_model, n_heads, chunk_size)
        self.d_model, self.n_heads, self.head_dim, self.chunk_size = d_model, n_heads, d_model // n_heads, chunk_size
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        for module in (self.qkv_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        state: LinearAttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        q, k, v = self._project(x)
        y, kv = ssd(
            v,
            v.new_ones(()).expand(v.shape[:3]),
            v.new_zeros(self.n_heads),
            k,
            q,
            initial_state=None if state is None else state.kv,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
        )
        y = self._output(y, x)
        return (y, LinearAttentionState(kv)) if return_state else y

    def _check(self, state: LinearAttentionState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = (sequences.count(x, cu_seqlens), self.n_heads, self.head_dim + 1, self.head_dim)
        check_state("linear_attention", state, LinearAttentionState, x.device, kv=shape)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k), and v with a column of ones, `(..., heads, head_dim)`, in full precision."""
        q, k, v = apply_linear(self.qkv_proj, x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        q, k, v = (value.to(working_dtype(value)) for value in (q, k, v))
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)

    def _output(self, y: Tensor, like: Tensor) -> Tensor:
        """y: sums of weighted values, and of weights in the last column."""
        mean = y[..., :-1] / y[..., -1:].clamp(min=self.eps)
        return apply_linear(self.out_proj, mean.flatten(-2).to(like.dtype))

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LinearAttentionState:
        """See `Mixer.init_state`."""
        device = self.out_proj.weight.device if device is None else device
        shape = (batch_size, self.n_heads, self.head_dim + 1, self.head_dim)
        return LinearAttentionState(torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: LinearAttentionState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        q, k, v = self._project(x[:, 0])
        state.kv.add_(v[..., None] * k[:, :, None])
        return self._output((state.kv * q[:, :, None]).sum(-1), x).unsqueeze(1)


def check_heads(mixer: str, d_model: int, n_heads: int, chunk_size: int) -> None:
    """Raise ConfigError unless the heads divide the width and all are positive."""
    if min(d_model, n_heads, chunk_size) < 1:
        raise ConfigError(
            f"{mixer}: d_model, n_heads and chunk_size must be positive, not {d_model}, {n_heads}, {chunk_size}."
        )
    if d_model % n_heads:
        near = [n for n in range(1, d_model + 1) if d_model % n == 0]
        raise ConfigError(
            f"{mixer}: n_heads {n_heads} does not divide d_model {d_model}. "
            f"Set n_heads to one of {', '.join(map(str, near))}, or d_model to a multiple of {n_heads}."
        )
