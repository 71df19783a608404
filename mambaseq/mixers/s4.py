"""Structured state spaces (S4): systems whose matrix is diagonal plus low-rank.

Gu, Goel and Re, "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_sizes, shown
from mambaseq.mixers.hippo import legs_normal
from mambaseq.mixers.initialisation import log_uniform_dt
from mambaseq.mixers.lti_layer import LTILayer
from mambaseq.ops import state_space_scan
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.lti.fft import convolution
from mambaseq.ops.state_space.generating import dplr_kernel

Mode = Literal["blocks", "fft"]


class DPLRSystem:
    """h' = A h + B x, y = 2 Re(C h) with A = diag(diagonal) - P P^*, discretised by the bilinear rule with steps of dt.

    One half of the conjugate pairs is kept, so that P^* h is 2 Re of its half. All `(channels, d_state)` and
    complex128; dt `(channels, 1)`. A step costs d_state (Woodbury's identity; arXiv:2111.00396, appendix C.2).
    """

    def __init__(self, dt: Tensor, diagonal: Tensor, P: Tensor, B: Tensor, C: Tensor) -> None:
        self.dt, self.diagonal, self.P, self.B, self.C = dt, diagonal, P, B, C
        self.inverse = 1 / (1 - dt / 2 * diagonal)
        self.solved_P = self.inverse * P
        self.coupling = dt / (1 + dt * (P.conj() * self.solved_P).sum(-1, keepdim=True).real)

    def increment(self, h: Tensor, x: Tensor) -> Tensor:
        """h_t - h_{t-1} for h_{t-1} `(…, channels, d_state)` and x_t `(…, channels)`.

        It is (1 - dt/2 A)^-1 dt (A h + B x).
        """
        change = self.diagonal * h - self.P * (2 * (self.P.conj() * h).sum(-1, keepdim=True).real)
        change = self.inverse * self.dt * (change + self.B * x[..., None])  # (…, channels, d_state)
        return change - self.solved_P * (self.coupling * (self.P.conj() * change).sum(-1, keepdim=True).real)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Abar `(channels, n, n)`, Bbar `(channels, n)` and C `(channels, 1, n)` for real states: those of
        `torch.view_as_real`, n = 2 d_state."""
        channels, d_state = self.diagonal.shape
        n = 2 * d_state
        basis = torch.eye(n, dtype=self.dt.dtype, device=self.dt.device)
        zeros = basis.new_zeros(n, channels)
        change = self.increment(torch.view_as_complex(basis.view(n, 1, d_state, 2)), zeros)  # (n, channels, d_state)
        Abar = basis + torch.view_as_real(change).flatten(2).permute(1, 2, 0)  # (channels, n, n)
        Bbar = self.increment(torch.zeros_like(self.diagonal), torch.ones_like(zeros[0]))
        C = 2 * torch.view_as_real(self.C.conj().resolve_conj())
        return Abar, torch.view_as_real(Bbar).flatten(1), C.flatten(1)[:, None]


class DPLRSSM(nn.Module):
    """A bank of single-input single-output systems, one a channel, `n_ssm` of them with a diagonal, P and B of their
    own; see `S4`."""

    stays_float32 = True

    def __init__(self, channels: int, d_state: int, n_ssm: int, dt_min: float, dt_max: float, mode: Mode) -> None:
        super().__init__()
        self.channels, self.d_state, self.n_ssm, self.mode = channels, d_state, n_ssm, mode
        order = 2 * d_state
        diagonal, vectors = legs_normal(order)
        n = torch.arange(order, dtype=torch.float64)
        P, B = (vectors.mH @ torch.sqrt(value).to(vectors.dtype) for value in (n + 0.5, 2 * n + 1))
        self.log_dt = nn.Parameter(log_uniform_dt(channels, dt_min, dt_max))
        self.A_log_real = nn.Parameter((-diagonal.real).log().float().repeat(n_ssm, 1))  # (n_ssm, d_state)
        self.A_imag = nn.Parameter(diagonal.imag.float().repeat(n_ssm, 1))  # (n_ssm, d_state)
        self.P = nn.Parameter(torch.view_as_real(P).float().repeat(n_ssm, 1, 1))  # (n_ssm, d_state, 2)
        self.B = nn.Parameter(torch.view_as_real(B).float().repeat(n_ssm, 1, 1))  # (n_ssm, d_state, 2)
        self.C = nn.Parameter(torch.randn(channels, d_state, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.ones(channels))

    def system(self) -> DPLRSystem:
        """Computed in float64."""

        def of_channels(value: Tensor) -> Tensor:
            copies = self.channels // self.n_ssm
            return value.double()[:, None].expand(-1, copies, *value.shape[1:]).flatten(0, 1)  # (channels, ...)

        diagonal = torch.complex(-torch.exp(of_channels(self.A_log_real)), of_channels(self.A_imag))
        P, B = (torch.view_as_complex(of_channels(value).contiguous()) for value in (self.P, self.B))
        C = torch.view_as_complex(self.C.double())
        return DPLRSystem(self.log_dt.double().exp()[:, None], diagonal, P, B, C)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x `(batch, length, channels)` to y, and the state `(sequences, channels,
        d_state)`, made if `return_state`."""
        system = self.system()
        real = working_dtype(x)
        skip = self.D.to(real) * x
        if self.mode == "fft" and state is None and cu_seqlens is None and not return_state:
            return (self._convolve(x.to(real), system) + skip).to(x.dtype), x.new_empty(0)
        y, final = state_space_scan(
            x.to(real),
            *system.matrices(),
            # (sequences, channels, 2 d_state)
            initial_state=None if state is None else torch.view_as_real(state).flatten(2),
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        if return_state:
            final = torch.view_as_complex(final.unflatten(2, (-1, 2)))  # (sequences, channels, d_state)
        return (y[..., 0] + skip).to(x.dtype), final

    def _convolve(self, x: Tensor, system: DPLRSystem) -> Tensor:
        kernel = dplr_kernel(system.dt[:, 0], system.diagonal, system.P, system.B, system.C, x.shape[1])
        # (batch, length, channels)
        return convolution(x.transpose(1, 2).contiguous(), kernel.to(x.dtype)).transpose(1, 2)

    def step_(self, x: Tensor, state: Tensor) -> Tensor:
        """x `(batch, channels)`; changes state `(batch, channels, d_state)` in place."""
        # in float64, since A h is a difference of two that are larger where states are many
        system, h = self.system(), state.to(torch.complex128)
        h = h + system.increment(h, x.double())
        state.copy_(h)
        return (2 * (h * system.C).sum(-1).real + self.D.double() * x).to(x.dtype)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.channels, self.d_state

    def state_dtype(self) -> torch.dtype:
        return torch.complex64


class S4(LTILayer):
    """S4 layer: diagonal plus low-rank systems from HiPPO-LegS, GELU, and a gated linear output that mixes channels.

    Args:
        d_model: width of the residual stream; one system a channel.
        d_state: states a channel, one half of the conjugate pairs.
        n_ssm: how many A and B there are; each is shared by d_model / n_ssm channels, whose dt and C are their own.
        dt_min: smallest initial step size; they are spread log-uniformly from it to dt_max.
        dt_max: largest initial step size.
        mode: "blocks", the recurrence over blocks of time; "fft", as published, a convolution with a kernel from the
            generating function, except for packed sequences and states. "fft" is slower, by far for long sequences.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        n_ssm: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mode: Mode = "blocks",
    ) -> None:
        check_sizes("s4", d_model=d_model, d_state=d_state, n_ssm=n_ssm)
        if d_model % n_ssm:
            raise ConfigError(f"s4: n_ssm must divide d_model, and {n_ssm} does not divide {d_model}.")
        if mode not in ("blocks", "fft"):
            raise ConfigError(f"s4: mode is blocks or fft, not {shown(mode)}.")
        super().__init__("s4", d_model, DPLRSSM(d_model, d_state, n_ssm, dt_min, dt_max, mode))
