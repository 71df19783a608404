"""Causal linear attention.

Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention", arXiv:2006.16236; rotary positions (Su et al., "RoFormer", arXiv:2104.09864, section 3.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive, check_sizes
from mambaseq.mixers.attention import turned, turns
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.growing import Places
from mambaseq.ops import sequences, ssd
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear
from mambaseq.ops.ssd import packages


@dataclasses.dataclass
class LinearAttentionState(State):
    """length `(batch,)` int64: positions that each sequence has seen. kv `(batch, n_heads, head_dim + 1, head_dim)`,
    fp32: the sum of v (R φ(k))ᵀ, keys turned to their positions, and that of φ(k), not turned, in the last row."""

    length: Tensor
    kv: Tensor


class LinearAttention(Mixer):
    """Attention whose weights are φ(q)·φ(k) over their sum, φ = elu + 1 (equations 7 to 12): a state of fixed size.

        y_m = Σ_{n≤m} (R_m φ(q_m))·(R_n φ(k_n)) v_n / Σ_{n≤m} φ(q_m)·φ(k_n)      (arXiv:2104.09864, equation 19)

    R_m turns the pairs of a head of `(head_dim,)` features by position m; without `rope` it is 1. Turned weights may be
    negative and do not sum to 1, so that y is no mean of the values; the sum below stays free of turns, and positive.
    It is the state-space dual without decay. The state is a sum over all of the history: nothing is forgotten.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; must divide d_model. None for 4, 2 or 1, the most that divide it and with rope leave
            an even head_dim = d_model / n_heads.
        bias: biases of qkv_proj and out_proj.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
        rope: rotary position embedding of φ(q) and φ(k), for an even head_dim. Without it nothing tells the order of
            the past.
        rope_theta: base of its wavelengths, the longest of which is near 2 pi rope_theta positions.
        backend: what sums the values (and without rope the weights); None for the fastest that can
            (see `mambaseq doctor`). Activations of half precision, where kernels take them, are multiplied as
            bfloat16: on a GPU, and by "triton", "fla" and "mamba_ssm".
    """

    companion = "mlp"
    eps = 1e-6  # sums of weights are not divided by below it

    def __init__(
        self,
        d_model: int,
        n_heads: int | None = None,
        bias: bool = False,
        chunk_size: int = 64,
        rope: bool = True,
        rope_theta: float = 10000.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if n_heads is None:
            n_heads = next((n for n in (4, 2) if d_model % (2 * n if rope else n) == 0), 1)
        check_heads("linear_attention", d_model, n_heads, chunk_size)
        check_backend("linear_attention", "ssd", backend)
        check_positive("linear_attention", rope_theta=rope_theta)
        self.d_model, self.n_heads, self.head_dim, self.chunk_size = d_model, n_heads, d_model // n_heads, chunk_size
        if rope and self.head_dim % 2:
            raise ConfigError(
                f"linear_attention: rope turns pairs of features and head_dim is odd, {self.head_dim}; set n_heads or "
                "d_model so that d_model / n_heads is even, or rope: false."
            )
        self.rope, self.rope_theta, self.backend = rope, rope_theta, backend
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
        places = Places.of(x, None, cu_seqlens)
        position, length = places.position, places.new
        if state is not None:
            position, length = position + state.length[places.sequence], length + state.length
        q, k, v = self._project(x)
        if self.rope:
            sums, keys = (None, None) if state is None else state.kv.split([self.head_dim, 1], dim=2)
            y, sums = self._sums(*self._turned(q, k, position), v, sums, cu_seqlens, return_state, self.backend)
            ones = v.new_ones(()).expand(*v.shape[:3], 1)  # (batch, length, heads, 1)
            total, keys = self._sums(q, k, ones, keys, cu_seqlens, return_state, None)
            parts = [sums, keys]
        else:  # the sum of weights is one more column of values
            before, values = None if state is None else state.kv, F.pad(v, (0, 1), value=1.0)
            y, sums = self._sums(q, k, values, before, cu_seqlens, return_state, self.backend)
            parts = [sums]
            y, total = y.split([self.head_dim, 1], dim=-1)
        y = self._output(y, total, x)
        # kv (batch, heads, head_dim + 1, head_dim)
        return (y, LinearAttentionState(length, torch.cat(parts, dim=2))) if return_state else y

    def _check(self, state: LinearAttentionState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        shape = (n, self.n_heads, self.head_dim + 1, self.head_dim)
        check_state("linear_attention", state, LinearAttentionState, x.device, length=(n,), kv=shape)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k) in full precision, and v, all `(..., heads, head_dim)`."""
        # each (..., heads, head_dim)
        q, k, v = apply_linear(self.qkv_proj, x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        q, k = (value.to(working_dtype(value)) for value in (q, k))
        return F.elu(q) + 1, F.elu(k) + 1, v

    def _turned(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = turns(position, self.head_dim, self.rope_theta, q.dtype)
        return turned(q, cos, sin), turned(k, cos, sin)

    def _sums(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """The sums over the past of (q·k) v `(batch, length, heads, values)` in the precision of q, and v kᵀ summed
        over all, made if `return_state`."""
        taken = packages.input_dtype(backend, v.dtype, v.device)
        y, state = ssd(
            v.to(taken),
            q.new_ones(()).expand(v.shape[:3]),  # (batch, length, heads)
            q.new_zeros(self.n_heads),
            k.to(taken),
            q.to(taken),
            initial_state=initial,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=backend,
        )
        return y.to(q.dtype), state

    def _output(self, y: Tensor, total: Tensor, like: Tensor) -> Tensor:
        """y: sums of weighted values `(..., heads, head_dim)`; total: of the weights `(..., heads, 1)`."""
        y = y / total.clamp(min=self.eps)
        return apply_linear(self.out_proj, y.flatten(-2).to(like.dtype))  # from (..., d_model)

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
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LinearAttentionState(length, torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: LinearAttentionState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        q, k, v = self._project(x[:, 0])
        turned_q, turned_k = self._turned(q, k, state.length) if self.rope else (q, k)
        sums, keys = state.kv[:, :, :-1], state.kv[:, :, -1]
        sums.add_(v[..., None] * turned_k[:, :, None])  # (batch, heads, head_dim of v, head_dim of k)
        keys.add_(k)
        state.length.add_(1)
        # (batch, 1, d_model)
        return self._output((sums * turned_q[:, :, None]).sum(-1), (keys * q).sum(-1, keepdim=True), x).unsqueeze(1)


def check_heads(mixer: str, d_model: int, n_heads: int, chunk_size: int) -> None:
    """Raise ConfigError unless the heads divide the width and all are positive."""
    check_sizes(mixer, d_model=d_model, n_heads=n_heads, chunk_size=chunk_size)
    if d_model % n_heads:
        near = [n for n in range(1, d_model + 1) if d_model % n == 0]
        raise ConfigError(
            f"{mixer}: n_heads {n_heads} does not divide d_model {d_model}. "
            f"Set n_heads to one of {', '.join(map(str, near))}, or d_model to a multiple of {n_heads}."
        )
