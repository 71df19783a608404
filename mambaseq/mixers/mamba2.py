"""The Mamba-2 block.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", arXiv:2405.21060, section 7.1 and figure 6 (the parallel block). Parameter names and shapes are those of the
published checkpoints (`state-spaces/mamba2-*`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_sizes, shown
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.initialisation import initial_dt_bias
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops import gated_rms_norm, sequences
from mambaseq.ops.blocks.mamba2 import Mamba2BlockArguments, mamba2_block
from mambaseq.ops.blocks.mamba2 import why_not as why_not_whole
from mambaseq.ops.decoding import layer
from mambaseq.ops.decoding.step import causal_conv_update_, ssd_update_
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear, is_plain
from mambaseq.parallel import ends
from mambaseq.parallel.recurrences import causal_conv, ssd

_LAYERS = ("in_proj", "conv1d", "out_proj", "norm")


@dataclasses.dataclass
class Mamba2State(State):
    """conv `(batch, d_inner + 2 * n_groups * d_state, d_conv - 1)`: the last inputs of the convolution, oldest first.
    ssm `(batch, n_heads, head_dim, d_state)`. Both fp32."""

    accumulated: ClassVar[tuple[str, ...]] = ("ssm",)

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` over groups of channels, and its weight."""

    adds_bias = False  # so that `is_plain` knows it

    def __init__(self, channels: int, eps: float, group_size: int, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and its gate z, `(..., channels)`, to the same."""
        return gated_rms_norm(
            x, z, self.weight, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )


class Mamba2(Mixer):
    """Mamba-2 block: in_proj to (z, x, B, C, dt), causal convolution of (x, B, C), state-space dual, gated norm,
    out_proj.

    Args:
        d_model: width of the residual stream.
        d_state: states a head channel (N); 128 as in the published models, eight times Mamba-1's, at about its cost.
        d_conv: width of the causal convolution.
        expand: d_inner = expand * d_model.
        head_dim: channels a head (P), which share their decay; must divide d_inner. None for d_inner's largest divisor
            of at most 64, which is 64 for all usual widths.
        n_groups: groups of heads with B and C of their own; must divide the number of heads, d_inner / head_dim.
        A_init_range: -A is uniform in it at initialisation.
        dt_min: smallest initial step size: softplus(dt_bias) is log-uniform in [dt_min, dt_max] at initialisation.
        dt_max: largest initial step size.
        dt_init_floor: no initial dt is below it.
        norm_before_gate: gate what is normed instead of norming what is gated.
        eps: epsilon of the gated norm.
        conv_bias: a bias in the convolution.
        bias: biases in in_proj and out_proj.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only.
        backend: what runs the state-space dual; None for the fastest that can (see `mambaseq doctor`).
    """

    sums_up = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int | None = None,
        n_groups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        conv_bias: bool = True,
        bias: bool = False,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("mamba2", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        check_sizes("mamba2", n_groups=n_groups, chunk_size=chunk_size)
        check_not_negative("mamba2", eps=eps)
        d_inner = expand * d_model
        if head_dim is None:
            head_dim = next(size for size in range(min(64, d_inner), 0, -1) if d_inner % size == 0)
        if head_dim < 1 or d_inner % head_dim:
            raise ConfigError(
                f"mamba2: head_dim {head_dim} does not divide expand * d_model = {d_inner}. Set head_dim to a divisor "
                f"of {d_inner}, leave it out for the largest up to 64, or make d_model or expand larger."
            )
        if (d_inner // head_dim) % n_groups:
            raise ConfigError(
                f"mamba2: n_groups {n_groups} does not divide the {d_inner // head_dim} heads (expand * d_model / "
                "head_dim). Set n_groups to a divisor of it, or head_dim to a smaller one."
            )
        if len(A_init_range) != 2 or not 0 < A_init_range[0] <= A_init_range[1] < math.inf:
            raise ConfigError(
                f"mamba2: A_init_range must be two positive, finite numbers, the smaller first, not "
                f"{shown(A_init_range)}."
            )
        check_backend("mamba2", "ssd", backend)
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner, self.head_dim, self.n_groups = d_inner, head_dim, n_groups
        self.n_heads = d_inner // head_dim
        self.conv_channels = d_inner + 2 * n_groups * d_state
        self.chunk_size, self.backend = chunk_size, backend
        self.in_proj = nn.Linear(d_model, d_inner + self.conv_channels + self.n_heads, bias=bias)
        self.conv1d = nn.Conv1d(
            self.conv_channels,
            self.conv_channels,
            d_conv,
            groups=self.conv_channels,
            padding=d_conv - 1,
            bias=conv_bias,
        )
        self.dt_bias = nn.Parameter(initial_dt_bias(self.n_heads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedRMSNorm(d_inner, eps, d_inner // n_groups, norm_before_gate)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        if ends.current() is None and _runs_whole(x) and self.backend in (None, "triton") and self._has_plain_layers():
            whole = self._block_arguments(x, state, cu_seqlens, return_state)
            if why_not_whole(whole) is None:
                y, *new = mamba2_block(whole)
                return (y, Mamba2State(*new)) if return_state else y
        z, xBC, dt = self._project(x)
        xBC, conv_state = causal_conv(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        x, B, C = self._heads(xBC)
        y, ssm_state = ssd(
            x,
            dt,
            self._A(x),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = apply_linear(self.out_proj, self.norm(y.flatten(-2), z))  # from (batch, length, d_inner)
        return (y, Mamba2State(conv_state, ssm_state)) if return_state else y

    def _has_plain_layers(self) -> bool:
        """Whether kernels may do what the layers would: none is wrapped, hooked or quantised."""
        return all(is_plain(self._modules[name]) for name in _LAYERS)  # type: ignore[arg-type]

    def _block_arguments(
        self, x: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None, wants_state: bool
    ) -> Mamba2BlockArguments:
        """Computed in autocast's dtype where it is on, as the linear layers by themselves would be."""
        device = x.device.type
        return Mamba2BlockArguments(
            x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x,
            *self._weights(),
            None if state is None else state.conv,
            None if state is None else state.ssm,
            cu_seqlens,
            self.n_groups,
            self.norm.eps,
            self.norm.norm_before_gate,
            wants_state,
        )

    def _check(self, state: Mamba2State, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        conv, ssm = (n, self.conv_channels, self.d_conv - 1), (n, self.n_heads, self.head_dim, self.d_state)
        check_state("mamba2", state, Mamba2State, x.device, conv=conv, ssm=ssm)

    def _project(self, x: Tensor) -> Any:
        """The gate, what is convolved, and dt."""
        return apply_linear(self.in_proj, x).split([self.d_inner, self.conv_channels, self.n_heads], dim=-1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(..., heads, head_dim)`, B and C `(..., groups, d_state)`."""
        width = self.n_groups * self.d_state
        x, B, C = xBC.split([self.d_inner, width, width], dim=-1)
        B, C = (M.unflatten(-1, (self.n_groups, self.d_state)) for M in (B, C))
        return x.unflatten(-1, (self.n_heads, self.head_dim)), B, C

    def _A(self, x: Tensor) -> Tensor:
        return -torch.exp(self.A_log.to(working_dtype(x)))

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Mamba2State:
        """See `Mixer.init_state`."""
        device = self.in_proj.weight.device if device is None else device
        conv, ssm = (batch_size, self.conv_channels, self.d_conv - 1), (self.n_heads, self.head_dim, self.d_state)
        return Mamba2State(
            torch.zeros(conv, dtype=dtype or torch.float32, device=device),
            torch.zeros(batch_size, *ssm, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: Mamba2State) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        z, xBC, dt = self._project(x[:, 0])
        xBC = causal_conv_update_(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        x, B, C = self._heads(xBC)
        y = ssd_update_(state.ssm, x, dt, self._A(x), B, C, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return apply_linear(self.out_proj, self.norm(y.flatten(-2), z)).unsqueeze(1)  # (batch, 1, d_model)

    def can_step_layer(self, residual: Tensor, norm: RMSNorm, state: Mamba2State) -> bool:
        """See `Mixer.can_step_layer`."""
        own = "step_" in vars(self) or type(self).step_ is not Mamba2.step_
        if (
            own
            or type(state) is not Mamba2State
            or self.n_groups != 1
            or self.norm.norm_before_gate
            or not self._has_plain_layers()
        ):
            return False
        return layer.can_step(
            residual, layer.LayerNorm(norm.weight, norm.eps or 0.0), state.conv, state.ssm, self._weights()
        )

    def layer_step_(self, residual: Tensor, norm: RMSNorm, state: Mamba2State) -> Tensor:
        """See `Mixer.layer_step_`."""
        self._check(state, residual)
        given = layer.LayerNorm(norm.weight, norm.eps or 0.0)
        return layer.mamba2_step_(residual, given, state.conv, state.ssm, self._weights(), self.norm.eps)

    def _weights(self) -> layer.Mamba2Weights:
        return layer.Mamba2Weights(
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            self.out_proj.weight,
            self.out_proj.bias,
        )


def _runs_whole(x: Tensor) -> bool:
    """Whether a block is one operator there, if it can be."""
    return x.is_cuda
