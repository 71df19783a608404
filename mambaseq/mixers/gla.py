"""Gated linear attention.

Yang, Wang, Shen, Panda and Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv:2312.06635, section 4. Parameter names and shapes are those of flash-linear-attention's layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_positive, check_sizes
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.delta import HeadNorm, whole_width
from mambaseq.ops import sequences
from mambaseq.ops.delta_rule import delta_rule_update_
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear
from mambaseq.parallel.recurrences import delta_rule


@dataclasses.dataclass
class GLAState(State):
    """kv `(batch, n_heads, value_dim, key_dim)`, fp32: the decayed sum of v kᵀ."""

    accumulated: ClassVar[tuple[str, ...]] = ("kv",)
    kv: Tensor


class GLA(Mixer):
    """Linear attention whose state decays by a number a channel of the keys, made by a map of low rank; a norm a head
    with an output gate.

        S_t = S_{t-1} diag(sigmoid(g_t)^(1 / normalizer)) + v_t k_tᵀ,    y_t = S_t q_t / sqrt(key_dim)

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads. None for 4, 2 or 1, the most that divide queries and values.
        expand_k: queries have expand_k * d_model channels.
        expand_v: values have expand_v * d_model channels.
        gate_rank: rank of the map to the decays.
        normalizer: the larger, the nearer to 1 decays begin.
        eps: epsilon of the norm.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
        backend: what runs the rule; None for the fastest that can (see `mambaseq doctor`).
    """

    companion = "mlp"
    sums_up = True

    def __init__(
        self,
        d_model: int,
        n_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        normalizer: float = 16.0,
        eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("gla", normalizer=normalizer, expand_k=expand_k, expand_v=expand_v)
        check_not_negative("gla", eps=eps)
        check_backend("gla", "delta_rule", backend)
        check_sizes("gla", d_model=d_model, gate_rank=gate_rank, chunk_size=chunk_size)
        keys, values = (
            whole_width("gla", "d_model", d_model, name, share)
            for name, share in (("expand_k", expand_k), ("expand_v", expand_v))
        )
        if n_heads is None:
            n_heads = next((n for n in (4, 2) if keys % n == 0 and values % n == 0), 1)
        if n_heads < 1 or keys % n_heads or values % n_heads:
            raise ConfigError(
                f"gla: n_heads {n_heads} does not divide the {keys} channels of queries and the {values} of values "
                "(expand_k and expand_v times d_model). Set n_heads to a divisor of both, or leave it out."
            )
        self.d_model, self.n_heads, self.key_dim, self.value_dim = d_model, n_heads, keys // n_heads, values // n_heads
        self.normalizer, self.chunk_size, self.backend = normalizer, chunk_size, backend
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.g_norm_swish_gate = HeadNorm(self.value_dim, eps, "silu")
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: GLAState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        y, kv = delta_rule(
            *self._project(x),
            initial_state=None if state is None else state.kv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self._output(y, x)
        return (y, GLAState(kv)) if return_state else y

    def _check(self, state: GLAState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = (sequences.count(x, cu_seqlens), self.n_heads, self.value_dim, self.key_dim)
        check_state("gla", state, GLAState, x.device, kv=shape)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k `(..., heads, key_dim)`, v `(..., heads, value_dim)`, and log-decays as keys, in full precision."""
        q, k, v = (apply_linear(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        g = self.gk_proj(x)
        wide = working_dtype(q)
        q, k, v, g = (value.unflatten(-1, (self.n_heads, -1)) for value in (q, k, v, g))
        return q.to(wide) * self.key_dim**-0.5, k, v, F.logsigmoid(g.to(wide)) / self.normalizer

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        z = apply_linear(self.g_proj, x).unflatten(-1, y.shape[-2:])
        return apply_linear(self.o_proj, self.g_norm_swish_gate(y, z).flatten(-2))

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GLAState:
        """See `Mixer.init_state`."""
        device = self.o_proj.weight.device if device is None else device
        shape = (batch_size, self.n_heads, self.value_dim, self.key_dim)
        return GLAState(torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: GLAState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        x = x[:, 0]
        return self._output(delta_rule_update_(state.kv, *self._project(x)), x).unsqueeze(1)  # (batch, 1, d_model)

    def scale_residual_(self, factor: float) -> None:
        """See `Mixer.scale_residual_`."""
        with torch.no_grad():
            self.o_proj.weight.mul_(factor)
