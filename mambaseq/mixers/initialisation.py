"""Initial values of dynamics: step sizes, and those of a selective block (Gu and Dao, arXiv:2312.00752, sections 3.6
and 4.6.2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mambaseq.errors import ConfigError, check_positive, shown

AInit = Literal["s4d-real", "s4d-lin", "constant", "random"]


def log_uniform_dt(size: int, dt_min: float, dt_max: float) -> Tensor:
    """`(size,)` logarithms of step sizes, uniform between those of dt_min and dt_max.

    Raises ConfigError unless 0 < dt_min <= dt_max.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ConfigError(f"dt_min must be above 0 and at most dt_max, both finite, not {dt_min} and {dt_max}.")
    return torch.rand(size) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)


def initial_dt_bias(channels: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """`(channels,)`: its softplus is log-uniform in [dt_min, dt_max], and nowhere below the floor.

    Raises ConfigError unless all are above 0 and dt_min <= dt_max.
    """
    check_positive("A mixer", dt_init_floor=floor)
    dt = log_uniform_dt(channels, dt_min, dt_max).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus


def initial_A_parts(init: AInit | None, channels: int, d_state: int, complex_: bool) -> tuple[Tensor, Tensor | None]:
    """log(-Re A) and, for a complex A, Im A, both `(channels, d_state)` float32; n counts from 0 (Table 8).

        s4d-real  -(n + 1)                 s4d-lin  -1/2 + n i, the only complex one (S4D's own "lin" has pi n i)
        constant  -1/2                     random   -exp(N(0, 1)), each channel and state its own

    None takes s4d-real, or s4d-lin for a complex A. Raises ConfigError where init and `complex_` do not go together.
    """
    if init is None:
        init = "s4d-lin" if complex_ else "s4d-real"
    if init not in ("s4d-real", "s4d-lin", "constant", "random"):
        raise ConfigError(f"mamba: A_init must be s4d-real, s4d-lin, constant or random, not {shown(init)}.")
    if complex_ and init != "s4d-lin":
        raise ConfigError(
            f"mamba: A_init {shown(init)} is real. Take s4d-lin for a complex A, or leave out `complex: true`."
        )
    if init == "s4d-lin":
        if not complex_:
            raise ConfigError("mamba: A_init 's4d-lin' is complex. Set `complex: true`, or take a real one.")
        return torch.full((channels, d_state), 0.5).log(), torch.arange(d_state).float().repeat(channels, 1)
    if init == "constant":
        return torch.full((channels, d_state), 0.5).log(), None
    if init == "random":
        return torch.randn(channels, d_state), None
    return torch.arange(1, d_state + 1).float().log().repeat(channels, 1), None


def constant_B(channels: int, d_state: int, complex_: bool) -> Tensor:
    """Ones `(channels, d_state)`; for complex numbers `(channels, 2 d_state)`, real and imaginary parts in turn."""
    return torch.tensor([1.0, 0.0]).repeat(channels, d_state) if complex_ else torch.ones(channels, d_state)


def constant_C(channels: int, d_state: int, complex_: bool) -> Tensor:
    """Standard normal numbers, real or complex, in the shape of `constant_B`."""
    return torch.randn(channels, 2 * d_state) * math.sqrt(0.5) if complex_ else torch.randn(channels, d_state)
