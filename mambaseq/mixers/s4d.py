"""Diagonal state spaces (S4D).

Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models",
arXiv:2206.11893. Trained as a convolution by FFT, generated as a recurrence; the two are equal.
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
from mambaseq.ops import sequences
from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.decoding.step import lti_update_
from mambaseq.ops.lti import cuda, discretise, discretize
from mambaseq.ops.lti.arguments import LtiArguments
from mambaseq.parallel import ends
from mambaseq.parallel.recurrences import lti_scan

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
            raise ConfigError(f"A real A needs init 'real', not {shown(init)}.")
        return -(n + 1).float()
    order = 2 * d_state
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = order / math.pi * (order / (2 * n + 1) - 1)
    elif init == "legs":
        imag = legs_normal(order)[0].imag
    else:
        raise ConfigError(f"init 'real' needs a real A (real: true), and {shown(init)} is not one of lin, inv, legs.")
    return torch.complex(torch.full((d_state,), -0.5), imag.float())


class DiagonalSSM(nn.Module):
    """A bank of single-input single-output diagonal systems, one a channel: `(batch, length, channels)` to the same.

    dt is log-uniform in [dt_min, dt_max] at initialisation; B is 1, C standard normal (both `(channels, d_state)`).
    The real part of A is -exp(A_log_real), so the systems stay stable.
    """

    stays_float32 = True

    def __init__(
        self,
        channels: int,
        d_state: int,
        *,
        init: Init | None = None,
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
        for name, value, known in (
            ("discretization", discretization, ("zoh", "bilinear")),
            ("mode", mode, ("fft", "scan", None)),
        ):
            if value not in known:
                raise ConfigError(f"{name} is one of {', '.join(map(str, known))}, not {shown(value)}.")
        A = initial_A(init or ("real" if real else "lin"), d_state, real)
        self.log_dt = nn.Parameter(log_uniform_dt(channels, dt_min, dt_max))
        self.A_log_real = nn.Parameter((-A.real).log().repeat(channels, 1))  # (channels, d_state)
        if not real:
            self.A_imag = nn.Parameter(A.imag.repeat(channels, 1))  # (channels, d_state)
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

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.log_dt, self.A_log_real, None if self.real else self.A_imag, self.B

    def _holds_by_kernel(self) -> bool:
        return self.discretization == "zoh" and discretise.can_run(*self._parts())

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Abar, Bbar and C `(channels, d_state)`: what a step multiplies by; see `lti.discretize`."""
        if self._holds_by_kernel():
            C = self.C.float()
            return (*discretise.zero_order_hold(*self._parts()), C if self.real else torch.view_as_complex(C))
        dt, A, B, C = self.system()
        log_decay, B = discretize(dt, A, B, self.discretization)
        return torch.exp(log_decay), B, C

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x, z `(batch, length, channels)` to y, and the state `(sequences, channels,
        d_state)`, made if `return_state`."""
        if self.mode is None and ends.current() is None and self._holds_by_kernel():
            a, B, C = self.discrete()
            arguments = LtiArguments(x, a, B, C, state, cu_seqlens, False, "scan", self.D, z)
            if cuda.why_not(arguments) is None:
                if cu_seqlens is not None:
                    sequences.check(cu_seqlens, *x.shape[:2])
                return cuda.run(arguments, a)
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

    def step_(self, x: Tensor, state: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z `(batch, channels)`; changes state `(batch, channels, d_state)` in place."""
        parts = (*self._parts(), self.C, self.D, z)
        if step_gpu.can_run(state, x, *parts) and step_gpu.can_update(state):
            return step_gpu.system_update_(state, x, *parts, self.discretization)
        dt, A, B, C = self.system()
        return lti_update_(state, x, dt, A, B, C, D=self.D, z=z, discretization=self.discretization)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.channels, self.d_state

    def state_dtype(self) -> torch.dtype:
        return torch.float32 if self.real else torch.complex64


class S4D(LTILayer):
    """S4D layer: diagonal systems, GELU, and a gated linear output that mixes channels.

    Args:
        d_model: width of the residual stream; one system a channel.
        d_state: states a channel (for a complex A one half of the conjugate pairs).
        init: initialisation of A: lin, inv or legs, or, for a real A, real. None takes lin or real.
        real: real A instead of complex.
        discretization: zoh or bilinear.
        dt_min: smallest initial step size; they are spread log-uniformly from it to dt_max.
        dt_max: largest initial step size.
        mode: "fft" (convolution), "scan" (recurrence), or None for the faster of the two where both can run.
    """

    sums_up = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        init: Init | None = None,
        real: bool = False,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mode: Literal["fft", "scan"] | None = None,
    ) -> None:
        check_sizes("s4d", d_model=d_model, d_state=d_state)
        ssm = DiagonalSSM(
            d_model,
            d_state,
            init=init,
            real=real,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            mode=mode,
        )
        super().__init__("s4d", d_model, ssm)
