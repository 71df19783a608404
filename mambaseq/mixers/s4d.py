"""Diagonal state spaces (S4D).

Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models",
arXiv:2206.11893. Trained as a convolution by FFT, generated as a recurrence; the two are equal.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.ops import lti_scan
from mambaseq.ops.step import lti_update_

Init = Literal["lin", "inv", "legs", "real"]


def initial_A(init: Init, d_state: int, real: bool) -> Tensor:
    """The diagonal of A at initialisation: `(d_state,)`, complex64 (one half of each conjugate pair) or float32.

    lin: -1/2 + i pi n (S4D-Lin, eq. 9). inv: -1/2 + i N/pi (N/(2n+1) - 1) (S4D-Inv, eq. 8). legs: eigenvalues of
    the normal part of HiPPO-LegS (S4D-LegS). real: -(n + 1) (S4D-Real). N is the full order, twice d_state where
    conjugates are left out. Raises ConfigError for a real A with a complex initialisation.
    """
    n = torch.arange(d_state)
    if real:
        if init != "real":
            raise ConfigError(f"A real A needs init 'real', not {init!r}.")
        return -(n + 1).float()
    order = 2 * d_state
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = order / math.pi * (order / (2 * n + 1) - 1)
    elif init == "legs":
        k = torch.arange(order, dtype=torch.float64)
        scale = torch.sqrt((2 * k[:, None] + 1) * (2 * k[None, :] + 1)) / 2
        skew = torch.where(k[:, None] > k[None, :], -scale, torch.where(k[:, None] < k[None, :], scale, 0.0))
        # eigenvalues of a real skew-symmetric matrix come in conjugate pairs +-i w
        imag = torch.linalg.eigvalsh(skew * -1j).sort().values[d_state:]
    else:
        raise ConfigError(f"init 'real' needs a real A (real: true), and {init!r} is not one of lin, inv, legs.")
    return torch.complex(torch.full((d_state,), -0.5), imag.float())


class DiagonalSSM(nn.Module):
    """A bank of single-input single-output diagonal systems, one a channel: `(batch, length, channels)` to the same.

    dt is log-uniform in [dt_min, dt_max] at initialisation; B is 1, C standard normal (both `(channels, d_state)`).
    The real part of A is -exp(A_log_real), so the systems stay stable.
    """

    def __init__(
        self,
        channels: int,
        d_state: int,
        *,
        init: Init = "lin",
        real: bool = False,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mode: Literal["fft", "scan"] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.d_state, self.real = channels, d_state, real
        self.discretization: Literal["zoh", "bilinear"] = discretization
        self.mode: Literal["fft", "scan"] | None = mode
        A = initial_A("real" if real else init, d_state, real)
        self.log_dt = nn.Parameter(torch.rand(channels) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        self.A_log_real = nn.Parameter((-A.real).log().repeat(channels, 1))
        if not real:
            self.A_imag = nn.Parameter(A.imag.repeat(channels, 1))
        parts = () if real else (2,)
        self.C = nn.Parameter(torch.randn(channels, d_state, *parts) * (1.0 if real else math.sqrt(0.5)))
        self.B = nn.Parameter(torch.ones(channels, d_state))
        self.D = nn.Parameter(torch.ones(channels))

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt `(channels,)`, A, B, C `(channels, d_state)`: float32, or A and C complex64."""
        A = -torch.exp(self.A_log_real.float())
        if self.real:
            return self.log_dt.float().exp(), A, self.B.float(), self.C.float()
        A = torch.complex(A, self.A_imag.float())
        return self.log_dt.float().exp(), A, self.B.to(A.dtype), torch.view_as_complex(self.C.float())

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """x, z `(batch, length, channels)` to y, or `(y, state)` with state `(sequences, channels, d_state)`."""
        dt, A, B, C = self.system()
        return lti_scan(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            z=z,
            initial_state=state,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            discretization=self.discretization,
            mode=self.mode,
        )

    def step_(self, x: Tensor, z: Tensor | None, state: Tensor) -> Tensor:
        """x, z `(batch, channels)`; changes state `(batch, channels, d_state)` in place."""
        dt, A, B, C = self.system()
        return lti_update_(state, x, dt, A, B, C, D=self.D, z=z, discretization=self.discretization)

    def state_dtype(self) -> torch.dtype:
        return torch.float32 if self.real else torch.complex64


@dataclasses.dataclass
class S4DState(State):
    """ssm `(batch, channels, d_state)`: complex64, or fp32 where A is real."""

    ssm: Tensor


class S4D(Mixer):
    """S4D layer: diagonal systems, GELU, and a gated linear output that mixes channels.

    Args:
        d_model: width of the residual stream; one system a channel.
        d_state: states a channel (for a complex A one half of the conjugate pairs).
        init: initialisation of A: lin, inv, legs; real goes with `real: true`.
        real: real A instead of complex.
        discretization: zoh or bilinear.
        dt_min, dt_max: range of the initial step size.
        mode: "fft" (convolution), "scan" (recurrence), or None for the faster of the two where both can run.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        init: Init = "lin",
        real: bool = False,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mode: Literal["fft", "scan"] | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.ssm = DiagonalSSM(
            d_model,
            d_state,
            init=init,
            real=real,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            mode=mode,
        )
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, state: S4DState | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_state("s4d", state, S4DState, x.device, ssm=(sequences, self.d_model, self.ssm.d_state))
        initial = None if state is None else state.ssm
        y = self.ssm(x, state=initial, cu_seqlens=cu_seqlens, return_state=return_state)
        if not return_state:
            return self._output(y)
        y, ssm_state = y
        return self._output(y), S4DState(ssm_state)

    def _output(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> S4DState:
        """See `Mixer.init_state`."""
        device = self.ssm.D.device if device is None else device
        shape = (batch_size, self.d_model, self.ssm.d_state)
        return S4DState(torch.zeros(shape, dtype=self.ssm.state_dtype(), device=device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: S4DState) -> Tensor:
        """See `Mixer.step_`."""
        return self._output(self.ssm.step_(x[:, 0], None, state.ssm)).unsqueeze(1)
