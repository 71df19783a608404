"""What mixers share that keep a matrix from keys to values: heads, short convolutions, the state and one step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_sizes
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.initialisation import initial_dt_bias
from mambaseq.ops import causal_conv, delta_rule, gated_rms_norm, sequences, unit_norm
from mambaseq.ops.decoding.step import causal_conv_update_
from mambaseq.ops.delta_rule import delta_rule_update_
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear

# dt of an initial decay exp(-A dt), as published
_DT = (1e-3, 0.1, 1e-4)


@dataclasses.dataclass
class DeltaState(State):
    """conv `(batch, channels of q, k and v, d_conv - 1)`: the last inputs of the convolutions, oldest first.
    kv `(batch, n_value_heads, value_dim, head_dim)`. Both fp32."""

    accumulated: ClassVar[tuple[str, ...]] = ("kv",)
    conv: Tensor
    kv: Tensor


class HeadNorm(nn.Module):
    """The norm of each head, then its gate: both in full precision, one weight for all heads."""

    def __init__(self, value_dim: int, eps: float, gate: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps, self.gate = eps, gate

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        """y and its gate z, `(..., heads, value_dim)`, to the same."""
        if z is not None:
            assert self.gate is not None
            return gated_rms_norm(y, z, self.weight, eps=self.eps, norm_before_gate=True, gate=self.gate)
        wide = working_dtype(y)
        return F.rms_norm(y.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(y.dtype)


class DeltaMixer(Mixer):
    """q, k and v by linear maps and short convolutions; queries and keys of length 1; a matrix from keys to values
    that `delta_rule` keeps; norm a head, gate and last projection. What decays, and by what, is a subclass's.

    name: the mixer's, for messages. keys: channels of all heads of keys together, where nothing else is said. The other
    arguments are those of `GatedDelta`.
    """

    def __init__(
        self,
        name: str,
        d_model: int,
        keys: int,
        n_heads: int | None,
        head_dim: int | None,
        n_value_heads: int | None,
        expand_v: float,
        d_conv: int,
        conv_bias: bool,
        negative_eigenvalues: bool,
        eps: float,
        chunk_size: int,
        backend: str | None,
    ) -> None:
        super().__init__()
        check_sizes(name, d_model=d_model)
        n_heads, head_dim = _heads(keys, n_heads, head_dim)
        n_value_heads = n_heads if n_value_heads is None else n_value_heads
        check_sizes(name, n_heads=n_heads, head_dim=head_dim, n_value_heads=n_value_heads, d_conv=d_conv)
        check_sizes(name, chunk_size=chunk_size)
        if n_value_heads % n_heads:
            raise ConfigError(
                f"{name}: n_value_heads {n_value_heads} is no multiple of n_heads {n_heads}, and each head of keys "
                f"serves as many heads of values. Set n_value_heads to one, such as {n_heads}, or leave it out."
            )
        value_dim = whole_width(name, "head_dim", head_dim, "expand_v", expand_v)
        check_not_negative(name, eps=eps)
        check_backend(name, "delta_rule", backend)
        self.name, self.d_model, self.d_conv = name, d_model, d_conv
        self.n_heads, self.head_dim, self.n_value_heads, self.value_dim = n_heads, head_dim, n_value_heads, value_dim
        self.negative_eigenvalues, self.chunk_size, self.backend = negative_eigenvalues, chunk_size, backend
        keys, values = n_heads * head_dim, n_value_heads * value_dim
        self.widths = [keys, keys, values]
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.b_proj = nn.Linear(d_model, n_value_heads, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias) for width in self.widths
        )
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def _decays(self, x: Tensor) -> Tensor | None:
        """Log-decays of x `(..., d_model)` in full precision, `(..., value heads)` or `(..., value heads, head_dim)`,
        or None for none."""
        raise NotImplementedError

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """y `(..., value heads, value_dim)` and the layer's input to its output `(..., d_model)`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: DeltaState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        qkv, conv = causal_conv(
            self._project(x),
            *self._filters(),
            activation="silu",
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        y, kv = delta_rule(
            *self._heads(qkv),
            self._decays(x),
            self._rates(x),
            initial_state=None if state is None else state.kv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self._output(y, x)
        return (y, DeltaState(conv, kv)) if return_state else y

    def _check(self, state: DeltaState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        conv, kv = ((n, *shape) for shape in self._shapes())
        check_state(self.name, state, DeltaState, x.device, conv=conv, kv=kv)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (sum(self.widths), self.d_conv - 1), (self.n_value_heads, self.value_dim, self.head_dim)

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat([apply_linear(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)

    def _filters(self) -> tuple[Tensor, Tensor | None]:
        """Of q, k and v, one below the other."""
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        biases = [conv.bias for conv in convs if conv.bias is not None]
        weight = torch.cat([conv.weight.squeeze(1) for conv in convs])  # (channels, d_conv)
        return weight, torch.cat(biases) if biases else None

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k `(..., heads, head_dim)`, v `(..., value heads, value_dim)`, all in the dtype of qkv."""
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = unit_norm(q, self.head_dim, scale=self.head_dim**-0.5), unit_norm(k, self.head_dim)
        q, k = (value.unflatten(-1, (self.n_heads, self.head_dim)) for value in (q, k))
        return q, k, v.unflatten(-1, (self.n_value_heads, self.value_dim))

    def _rates(self, x: Tensor) -> Tensor:
        """beta `(..., value heads)` in full precision."""
        rate = apply_linear(self.b_proj, x)
        rate = torch.sigmoid(rate.to(working_dtype(rate)))
        return 2 * rate if self.negative_eigenvalues else rate

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DeltaState:
        """See `Mixer.init_state`."""
        device = self.o_proj.weight.device if device is None else device
        conv, kv = self._shapes()
        return DeltaState(
            torch.zeros(batch_size, *conv, dtype=dtype or torch.float32, device=device),
            torch.zeros(batch_size, *kv, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: DeltaState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        x = x[:, 0]
        weight, bias = self._filters()
        qkv = causal_conv_update_(state.conv, self._project(x), weight, bias, activation="silu")
        y = delta_rule_update_(state.kv, *self._heads(qkv), self._decays(x), self._rates(x))
        return self._output(y, x).unsqueeze(1)  # (batch, 1, d_model)

    def scale_residual_(self, factor: float) -> None:
        """See `Mixer.scale_residual_`."""
        with torch.no_grad():
            self.o_proj.weight.mul_(factor)


def _heads(keys: int, n_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Number and size of heads that come to about `keys` channels: as given, else the fewest of at most 128 channels,
    and at least two, that divide them, where there are such."""
    if n_heads is None and head_dim is None:
        fewest = max(2, -(-keys // 128))
        n_heads = next((n for n in range(fewest, 2 * fewest + 1) if keys % n == 0), fewest)
    if n_heads is None:
        assert head_dim is not None
        return max(1, round(keys / max(1, head_dim))), head_dim
    return n_heads, max(1, min(128, keys // max(1, n_heads))) if head_dim is None else head_dim


def whole_width(owner: str, of: str, width: int, key: str, share: float) -> int:
    """share * width, a number of channels. owner: the mixer, key and of: the options' names, for the message.

    Raises ConfigError unless it is a whole number of at least 1, up to rounding.
    """
    found = round(share * width) if math.isfinite(share) else 0
    if found < 1 or abs(share * width - found) > 1e-5 * found:
        raise ConfigError(
            f"{owner}: {key} * {of}, a number of channels, must be a whole number of at least 1, and {share:g} * "
            f"{width} is not. Set {key} to {max(1, found) / width:g}, or {of} to another."
        )
    return found


def initial_decays(heads: int, smallest: float, largest: float, steps: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log `(heads,)`, of rates uniform in (smallest, largest], and dt_bias `(steps,)`, as published."""
    A = largest - (largest - smallest) * torch.rand(heads)
    return nn.Parameter(A.log()), nn.Parameter(initial_dt_bias(steps, *_DT))
