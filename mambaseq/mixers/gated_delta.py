"""Gated DeltaNet.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464, section 3.4;
negative eigenvalues: Grazzi et al., arXiv:2411.12537. Parameter names and shapes are those of flash-linear-attention's
layer, in which models of this kind are published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.mixers.delta import DeltaMixer, HeadNorm, initial_decays
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear


class GatedDelta(DeltaMixer):
    """Gated DeltaNet: queries, keys and values by linear maps and short convolutions, a matrix from keys to values that
    decays by one number a head and corrects what it says of each key (`delta_rule`), a norm a head with an output gate.

        S_t = exp(g_t) S_{t-1} (1 - beta_t k_t k_tᵀ) + beta_t v_t k_tᵀ,    g_t = -exp(A_log) softplus(a_t + dt_bias)

    Args:
        d_model: width of the residual stream.
        n_heads: heads of queries and keys. None for as many as come to 3/4 of d_model together, as published: two, or
            more where they would have more than 128 channels.
        head_dim: channels of a query or key. None for what the heads divide, at most 128.
        n_value_heads: heads of values, a multiple of n_heads; None for as many.
        expand_v: channels of a value are expand_v * head_dim.
        d_conv: width of the causal convolutions of q, k and v.
        conv_bias: biases in the convolutions.
        gate: the state decays; without it this is DeltaNet (arXiv:2406.06484).
        output_gate: gate what is normed.
        negative_eigenvalues: beta between 0 and 2 instead of 1: a step can turn a value round, which tracking states
            (parity, permutations) needs.
        eps: epsilon of the norm.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
        backend: what runs the rule; None for the fastest that can (see `mambaseq doctor`).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_value_heads: int | None = None,
        expand_v: float = 2.0,
        d_conv: int = 4,
        conv_bias: bool = False,
        gate: bool = True,
        output_gate: bool = True,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            "gated_delta",
            d_model,
            3 * d_model // 4,
            n_heads,
            head_dim,
            n_value_heads,
            expand_v,
            d_conv,
            conv_bias,
            negative_eigenvalues,
            eps,
            chunk_size,
            backend,
        )
        self.gate, self.output_gate = gate, output_gate
        if gate:
            self.a_proj = nn.Linear(d_model, self.n_value_heads, bias=False)
            self.A_log, self.dt_bias = initial_decays(self.n_value_heads, 0.0, 16.0, self.n_value_heads)
        if output_gate:
            self.g_proj = nn.Linear(d_model, self.n_value_heads * self.value_dim, bias=False)
        self.o_norm = HeadNorm(self.value_dim, eps, "silu" if output_gate else None)

    def _decays(self, x: Tensor) -> Tensor | None:
        if not self.gate:
            return None
        a = apply_linear(self.a_proj, x)
        wide = working_dtype(a)
        return -torch.exp(self.A_log.to(wide)) * F.softplus(a.to(wide) + self.dt_bias.to(wide))

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        z = apply_linear(self.g_proj, x).unflatten(-1, y.shape[-2:]) if self.output_gate else None
        return apply_linear(self.o_proj, self.o_norm(y, z).flatten(-2))
