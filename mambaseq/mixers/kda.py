"""Kimi Delta Attention.

Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv:2510.26692, section 3. Parameter names
and shapes are those of flash-linear-attention's layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mambaseq.errors import ConfigError
from mambaseq.mixers.delta import DeltaMixer, HeadNorm, initial_decays
from mambaseq.ops import log_decays
from mambaseq.ops.linear import apply_linear


class KDA(DeltaMixer):
    """Kimi Delta Attention: Gated DeltaNet whose state decays by a number a channel of the keys, made by a map of low
    rank, with a sigmoid gate behind the norm.

        S_t = S_{t-1} diag(exp(g_t)) (1 - beta_t k_t k_tᵀ) + beta_t v_t k_tᵀ
        g_t = -exp(A_log) softplus(f_t + dt_bias)      (or lower_bound sigmoid(exp(A_log) (f_t + dt_bias)))

    Args:
        d_model: width of the residual stream.
        n_heads: heads of queries and keys. None for as many as come to d_model together: two, or more where they would
            have more than 128 channels.
        head_dim: channels of a query or key. None for what the heads divide, at most 128.
        n_value_heads: heads of values, a multiple of n_heads; None for as many.
        expand_v: channels of a value are expand_v * head_dim, which is the rank of the gates, too.
        d_conv: width of the causal convolutions of q, k and v.
        conv_bias: biases in the convolutions.
        lower_bound: log-decays are above it, and below 0; None for no bound.
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
        expand_v: float = 1.0,
        d_conv: int = 4,
        conv_bias: bool = False,
        lower_bound: float | None = None,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        if lower_bound is not None and not -math.inf < lower_bound < 0:
            raise ConfigError(f"kda: lower_bound must be below 0, not {lower_bound:g}; leave it out for none.")
        super().__init__(
            "kda",
            d_model,
            d_model,
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
        self.lower_bound = lower_bound
        decays, values = self.n_value_heads * self.head_dim, self.n_value_heads * self.value_dim
        self.f_proj = nn.Sequential(
            nn.Linear(d_model, self.value_dim, bias=False), nn.Linear(self.value_dim, decays, bias=False)
        )
        gates = nn.Linear(self.value_dim, values)
        nn.init.zeros_(gates.bias)
        self.g_proj = nn.Sequential(nn.Linear(d_model, self.value_dim, bias=False), gates)
        self.A_log, self.dt_bias = initial_decays(self.n_value_heads, 1.0, 16.0, decays)
        if lower_bound is not None:
            nn.init.zeros_(self.A_log)
        self.o_norm = HeadNorm(self.value_dim, eps, "sigmoid")

    def _decays(self, x: Tensor) -> Tensor:
        f = self._by_rank(self.f_proj, x)
        return log_decays(f, self.A_log, self.dt_bias, lower_bound=self.lower_bound)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        z = self._by_rank(self.g_proj, x).unflatten(-1, y.shape[-2:])
        return apply_linear(self.o_proj, self.o_norm(y, z).flatten(-2))

    @staticmethod
    def _by_rank(layers: Iterable[Any], x: Tensor) -> Tensor:
        first, second = layers  # linear maps, or what an adapter puts in their place
        return apply_linear(second, apply_linear(first, x))
