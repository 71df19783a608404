"""Retention.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", arXiv:2307.08621, section 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_positive
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.linear_attention import check_heads
from mambaseq.ops import sequences, ssd
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear
from mambaseq.ops.ssd import packages


@dataclasses.dataclass
class RetentionState(State):
    """kv `(batch, n_heads, v_dim, head_dim)`, fp32: the decayed sum of v kᵀ, each key turned by its distance to the
    last position. It is as if seen from there, so that no count of positions is kept."""

    kv: Tensor


class Retention(Mixer):
    """Multi-scale retention (equation 8): linear attention whose head h decays by 1 - 2^(-5-h) a step, and whose
    queries and keys are turned by their positions; GroupNorm over the heads, a swish gate, out_proj.

    It is the state-space dual with a constant decay. Nothing depends on a position but by a distance, so keys are
    turned by positions of the call at hand, and the state by the length of what was seen. The paper's scalings for
    half precision, which its norm undoes, are left out: states are fp32.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; must divide d_model. Of an odd head_dim = d_model / n_heads the last stays unturned.
        expand_v: values, and the gate, are of expand_v * d_model.
        rotary_base: the pairs of a head turn by rotary_base^(-i / pairs) a position, i = 0 ... pairs - 1.
        eps: epsilon of the norm.
        bias: biases of in_proj and out_proj.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
        backend: what runs the state-space dual; None for the fastest that can (see `mambaseq doctor`). Activations of
            half precision, where kernels take them, are multiplied as bfloat16: on a GPU, and by "triton", "fla" and
            "mamba_ssm".
    """

    companion = "mlp"

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        expand_v: int = 2,
        rotary_base: float = 10000.0,
        eps: float = 1e-5,
        bias: bool = False,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_heads("retention", d_model, n_heads, chunk_size)
        check_backend("retention", "ssd", backend)
        check_positive("retention", expand_v=expand_v, rotary_base=rotary_base)
        check_not_negative("retention", eps=eps)
        if expand_v * d_model == n_heads:
            raise ConfigError(
                f"retention: {n_heads} heads have one value each, of which the norm leaves nothing. "
                "Set n_heads to less or expand_v to more."
            )
        self.d_model, self.n_heads, self.head_dim, self.chunk_size = d_model, n_heads, d_model // n_heads, chunk_size
        self.d_inner, self.v_dim = expand_v * d_model, expand_v * d_model // n_heads
        self.rotary_base, self.backend = rotary_base, backend
        self.in_proj = nn.Linear(d_model, 2 * d_model + 2 * self.d_inner, bias=bias)
        self.norm = nn.GroupNorm(n_heads, self.d_inner, eps=eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        state: RetentionState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        q, k, v, gate = self._project(x)
        # positions count from 1 along the row, packed or not; states are seen from before a sequence and from its end
        length = x.shape[1]
        if cu_seqlens is not None:
            sequences.check(cu_seqlens, *x.shape[:2])
        bounds = length * torch.arange(2, device=x.device) if cu_seqlens is None else cu_seqlens
        bounds = bounds[:, None, None]  # (bounds, 1, 1)
        turns = self._turns(torch.arange(1, length + 1, device=x.device)[:, None])  # (length, 1, head_dim // 2) each
        wide, taken = v.dtype, packages.input_dtype(self.backend, gate.dtype, x.device)
        y, kv = ssd(
            v.to(taken),
            v.new_ones(()).expand(v.shape[:3]),  # (batch, length, heads)
            torch.log1p(-self._forgotten(x.device)).to(wide),
            _turn(k, turns).to(taken),
            _turn(q, turns).to(taken),
            initial_state=None if state is None else _turn(state.kv, self._turns(bounds[:-1])),
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self._output(y.to(wide), gate, x)
        return (y, RetentionState(_turn(kv, self._turns(-bounds[1:])))) if return_state else y

    def _check(self, state: RetentionState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = (sequences.count(x, cu_seqlens), self.n_heads, self.v_dim, self.head_dim)
        check_state("retention", state, RetentionState, x.device, kv=shape)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k `(..., heads, head_dim)` and v `(..., heads, v_dim)` in full precision; the gate `(..., d_inner)`."""
        sizes = [self.d_model, self.d_model, self.d_inner, self.d_inner]
        q, k, v, gate = apply_linear(self.in_proj, x).split(sizes, dim=-1)
        q, k, v = (value.to(working_dtype(value)).unflatten(-1, (self.n_heads, -1)) for value in (q, k, v))
        return q, k * self.head_dim**-0.5, v, gate

    def _output(self, y: Tensor, gate: Tensor, like: Tensor) -> Tensor:
        """y `(..., heads, v_dim)`: the norm of each head at each position, gate and last projection."""
        norm, wide = self.norm, y.dtype
        rows = y.reshape(-1, self.d_inner)  # (rows, d_inner)
        rows = F.group_norm(rows, self.n_heads, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
        gated = F.silu(gate.to(wide)) * rows.view(gate.shape)  # (..., d_inner)
        return apply_linear(self.out_proj, gated.to(like.dtype))

    def _forgotten(self, device: torch.device) -> Tensor:
        """1 - gamma of each head, `(heads,)` float64."""
        return 2.0 ** (-5 - torch.arange(self.n_heads, device=device, dtype=torch.float64))

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin by which each pair of a head is turned there, `(*positions.shape, head_dim // 2)`, in float64:
        positions may be large."""
        pairs = self.head_dim // 2
        exponents = torch.arange(pairs, device=positions.device, dtype=torch.float64) / max(1, pairs)
        turned = positions.double()[..., None] * self.rotary_base**-exponents  # (*positions.shape, head_dim // 2)
        return torch.cos(turned), torch.sin(turned)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RetentionState:
        """See `Mixer.init_state`."""
        device = self.out_proj.weight.device if device is None else device
        shape = (batch_size, self.n_heads, self.v_dim, self.head_dim)
        return RetentionState(torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: RetentionState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        q, k, v, gate = self._project(x[:, 0])
        back = self._turns(torch.full((1,), -1, device=x.device))
        gamma = (1 - self._forgotten(x.device)).to(state.kv.dtype)
        # (batch, heads, v_dim, head_dim)
        state.kv.copy_(_turn(state.kv, back).mul_(gamma[:, None, None]).add_(v[..., None] * k[:, :, None]))
        return self._output((state.kv * q[:, :, None]).sum(-1), gate, x).unsqueeze(1)  # (batch, 1, d_model)


def _turn(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, pairs + i) of the last axis, by cos and sin that broadcast to them."""
    cos, sin = (value.to(x.dtype) for value in turns)
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
