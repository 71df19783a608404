"""The Mamba-3 block, with one input a head or several.

"Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv:2603.15569: exponential-trapezoidal steps, a
rate that depends on the data, a state that turns (a complex one, as rotations of B and C), norms and biases of B and
C, no convolution. Parameter names and shapes are those of `mamba_ssm`'s module.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_positive, check_sizes
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.initialisation import initial_dt_bias
from mambaseq.mixers.mamba2 import GatedRMSNorm
from mambaseq.ops import sequences, trapezoidal_scan
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear
from mambaseq.ops.ssd.packages import input_dtype
from mambaseq.ops.trapezoid import trapezoidal_update_
from mambaseq.ops.trapezoid.angles import AngleArguments, added_up, turns
from mambaseq.ops.trapezoid.gating import GateArguments, gated
from mambaseq.ops.trapezoid.turning import TurnArguments, turned
from mambaseq.ops.trapezoid.writing import written


@dataclasses.dataclass
class Mamba3State(State):
    """angle `(batch, n_heads, n_angles)` float64: how far each pair of the state has turned. k `(batch, n_heads, rank,
    d_state)`, v `(batch, n_heads, rank, head_dim)`: what the last position wrote, B turned, and its inputs. ssm
    `(batch, n_heads, head_dim, d_state)`. All but the angles fp32."""

    accumulated: ClassVar[tuple[str, ...]] = ("ssm",)
    angle: Tensor
    k: Tensor
    v: Tensor
    ssm: Tensor


class StateNorm(nn.Module):
    """The norm of B or C over the state's channels, in full precision."""

    def __init__(self, d_state: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_state))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., d_state)` to the same in fp32 (float64 if x is)."""
        wide = working_dtype(x)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)


class Mamba3(Mixer):
    """Mamba-3 block: in_proj to (z, x, B, C, dt, A, trap, angles), norms and biases of B and C, both turned by angles
    that add up over time, the trapezoidal scan, gate, out_proj.

        dt = softplus(dt + dt_bias),    A = -max(A_floor, 1 + a, or 1 / (1 - a) of negative a),    trap = sigmoid(trap)
        angle_t = angle_{t-1} + pi tanh(angles_t) dt_t

    Args:
        d_model: width of the residual stream.
        d_state: states a head channel (N).
        expand: d_inner = expand * d_model.
        head_dim: channels a head (P); must divide d_inner. None for d_inner's largest divisor of at most 64.
        n_groups: groups of heads with B and C of their own; must divide the number of heads, d_inner / head_dim.
        rank: inputs and outputs a head that share its state (the paper's MIMO; 4 as published). None for one
            (SISO), without the maps between them.
        rope_fraction: share of the state's channels that turn: 0.5 or 1.
        dt_min: smallest initial step size: softplus(dt_bias) is log-uniform in [dt_min, dt_max] at initialisation.
        dt_max: largest initial step size.
        dt_init_floor: no initial dt is below it.
        A_floor: no rate of decay is below it.
        softplus_rate: A = -max(A_floor, softplus(a)) instead, as mamba-ssm's release 2.3.2 has it; weights that were
            trained so need it.
        out_norm: norm each head before its gate.
        eps: epsilon of the norms.
        chunk_size: positions that are computed as one matrix, over the rank; a matter of speed and memory only.
        backend: what runs the scan; None for the fastest that can (see `mambaseq doctor`).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int | None = None,
        n_groups: int = 1,
        rank: int | None = None,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        softplus_rate: bool = False,
        out_norm: bool = False,
        eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("mamba3", d_model=d_model, d_state=d_state, expand=expand, n_groups=n_groups)
        check_sizes("mamba3", rank=rank, chunk_size=chunk_size)
        check_not_negative("mamba3", eps=eps)
        check_positive("mamba3", A_floor=A_floor)
        check_backend("mamba3", "trapezoidal_scan", backend)
        d_inner = expand * d_model
        if head_dim is None:
            head_dim = next(size for size in range(min(64, d_inner), 0, -1) if d_inner % size == 0)
        if head_dim < 1 or d_inner % head_dim:
            raise ConfigError(
                f"mamba3: head_dim {head_dim} does not divide expand * d_model = {d_inner}. Set head_dim to a divisor "
                f"of {d_inner}, leave it out for the largest up to 64, or make d_model or expand larger."
            )
        n_heads = d_inner // head_dim
        if n_heads % n_groups:
            raise ConfigError(
                f"mamba3: n_groups {n_groups} does not divide the {n_heads} heads (expand * d_model / head_dim). Set "
                "n_groups to a divisor of it, or head_dim to a smaller one."
            )
        if rope_fraction not in (0.5, 1.0):
            raise ConfigError(f"mamba3: rope_fraction must be 0.5 or 1, not {rope_fraction:g}.")
        n_angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or n_angles < 1:
            raise ConfigError(
                f"mamba3: rope_fraction {rope_fraction:g} of d_state {d_state} leaves no whole pairs to turn. Set "
                f"d_state to an even number of at least {2 if rope_fraction == 1 else 4}."
            )
        self.d_model, self.d_state, self.d_inner, self.head_dim = d_model, d_state, d_inner, head_dim
        self.n_heads, self.n_groups, self.n_angles = n_heads, n_groups, n_angles
        self.A_floor, self.softplus_rate = A_floor, softplus_rate
        self.several, self.rank, self.out_norm = rank is not None, 1 if rank is None else rank, out_norm
        self.chunk_size, self.backend = max(1, chunk_size // self.rank), backend
        width = n_groups * self.rank * d_state
        self.widths = [d_inner, d_inner, width, width, n_heads, n_heads, n_heads, n_angles]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(n_heads, dt_min, dt_max, dt_init_floor))
        self.B_bias = nn.Parameter(torch.ones(n_heads, self.rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(n_heads, self.rank, d_state))
        self.B_norm, self.C_norm = StateNorm(d_state, eps), StateNorm(d_state, eps)
        if self.several:
            self.mimo_x, self.mimo_z, self.mimo_o = (
                nn.Parameter(torch.full((n_heads, self.rank, head_dim), value))
                for value in (1 / self.rank, 1.0, 1 / self.rank)
            )
        self.D = nn.Parameter(torch.ones(n_heads))
        if out_norm:
            self.norm = GatedRMSNorm(d_inner, eps, head_dim, norm_before_gate=True)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        projected = apply_linear(self.in_proj, x)
        z, v, B, C, dt, A, trap, angles = self._parts(projected)
        before = None if state is None else state.angle
        angle, last_angle = added_up(AngleArguments(angles, dt, before, cu_seqlens))
        taken = input_dtype(self.backend, projected.dtype, x.device)
        B, C = turned(TurnArguments(B, C, self.B_bias, self.C_bias, angle, self.several, taken == torch.bfloat16))
        written = self._written(v, taken)
        y, ssm = trapezoidal_scan(
            written,
            dt,
            A,
            trap,
            B,
            C,
            initial_state=None if state is None else state.ssm,
            initial_x=None if state is None else state.v,
            initial_B=None if state is None else state.k,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self._output(y, v, z, x)
        if not return_state:
            return y
        k = _last(B, None if state is None else state.k, cu_seqlens)
        return y, Mamba3State(last_angle, k, _last(written, None if state is None else state.v, cu_seqlens), ssm)

    def _check(self, state: Mamba3State, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        shapes = {name: (n, *shape) for name, shape in self._shapes().items()}
        check_state("mamba3", state, Mamba3State, x.device, **shapes)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "angle": (self.n_heads, self.n_angles),
            "k": (self.n_heads, self.rank, self.d_state),
            "v": (self.n_heads, self.rank, self.head_dim),
            "ssm": (self.n_heads, self.head_dim, self.d_state),
        }

    def _parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Of what in_proj gives: the gate and inputs `(..., heads, head_dim)`, as they are; in full precision B and C,
        normed, `(..., rank, groups, d_state)`, dt, A and trap `(..., heads)`, and angles `(..., 1, n_angles)`."""
        z, v, *parts = projected.split(self.widths, dim=-1)
        wide = working_dtype(projected)
        B, C, dt, A, trap, angles = (part.to(wide) for part in parts)
        z, v = (part.unflatten(-1, (self.n_heads, self.head_dim)) for part in (z, v))
        ranked = (self.rank, self.n_groups, self.d_state)
        B, C = self.B_norm(B.unflatten(-1, ranked)), self.C_norm(C.unflatten(-1, ranked))
        dt = F.softplus(dt + self.dt_bias.to(wide))
        # at 0 relu passes no gradient on and masked_fill does: of the two one must, and releases differ in clamp's
        rate = F.softplus(A) if self.softplus_rate else F.relu(A) + 1 / (1 - A.masked_fill(A > 0, 0))
        A = -rate.clamp(min=self.A_floor)
        return z, v, B, C, dt, A, torch.sigmoid(trap), angles[..., None, :]

    def _written(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """What is written to the states, `(..., heads, rank, head_dim)`, of inputs `(..., heads, head_dim)`."""
        return written(v, self.mimo_x, dtype) if self.several else v[..., None, :].to(dtype)

    def _output(self, y: Tensor, v: Tensor, z: Tensor, like: Tensor) -> Tensor:
        """y `(..., heads, rank, head_dim)`, inputs and gate `(..., heads, head_dim)` to the block's output."""
        if self.out_norm:
            out = self._normed(y, v, z)
        else:
            maps = (self.mimo_x, self.mimo_z, self.mimo_o) if self.several else (None, None, None)
            out = gated(GateArguments(y, v, z, self.D, *maps))
        return apply_linear(self.out_proj, out.flatten(-2).to(like.dtype))

    def _normed(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """The same before out_proj, `(..., heads, head_dim)`, each head of y normed before its gate."""
        wide = working_dtype(v)
        skip = self.D.to(wide)[:, None, None] * self._written(v, wide)
        y = (y.to(wide) + skip).transpose(-2, -3)  # (..., rank, heads, head_dim)
        z = z.to(wide)[..., None, :, :]
        if self.several:
            z = z * self.mimo_z.to(wide).transpose(0, 1)
        y = self.norm(y.flatten(-2), z.flatten(-2).expand(*y.shape[:-2], -1)).unflatten(-1, y.shape[-2:])
        if self.several:
            y = y * self.mimo_o.to(wide).transpose(0, 1)
        return y.sum(-3)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Mamba3State:
        """See `Mixer.init_state`."""
        device = self.in_proj.weight.device if device is None else device
        return Mamba3State(
            **{
                name: torch.zeros(
                    batch_size, *shape, dtype=torch.float64 if name == "angle" else torch.float32, device=device
                )
                for name, shape in self._shapes().items()
            }
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: Mamba3State) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        x = x[:, 0]
        z, v, B, C, dt, A, trap, angles = self._parts(apply_linear(self.in_proj, x))
        state.angle.add_(turns(angles, dt))
        B, C = turned(TurnArguments(B, C, self.B_bias, self.C_bias, state.angle, self.several))
        written = self._written(v, B.dtype)
        y = trapezoidal_update_(state.ssm, written, dt, A, trap, B, C, state.v, state.k)
        state.k.copy_(B)
        state.v.copy_(written)
        return self._output(y, v, z, x).unsqueeze(1)  # (batch, 1, d_model)


def _last(value: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What stands at the last position of each sequence, `(sequences, ...)`, in full precision; of empty ones what
    stood before, or 0.

    value: `(batch, length, ...)`.
    """
    n, length, wide = sequences.count(value, cu_seqlens), value.shape[1], working_dtype(value)
    before = value.new_zeros(n, *value.shape[2:], dtype=wide) if before is None else before.to(wide)
    if length == 0:
        return before.clone()
    if cu_seqlens is None:
        return value[:, -1].to(wide).contiguous()
    ends = cu_seqlens[1:].long()
    filled = (ends > cu_seqlens[:-1]).view(-1, *[1] * (value.ndim - 2))
    return torch.where(filled, value[0].index_select(0, (ends - 1).clamp(min=0)).to(wide), before)
