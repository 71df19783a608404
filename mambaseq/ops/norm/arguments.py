"""The arguments of the norms, checked once for every backend, and inputs to try them on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.errors import shown


class AddNormArguments(NamedTuple):
    """What every backend of `mambaseq.ops.add_rms_norm` receives; shapes and meaning as there."""

    x: Tensor | None
    residual: Tensor
    weight: Tensor
    eps: float = 1e-5
    out_dtype: torch.dtype | None = None


class GatedNormArguments(NamedTuple):
    """What every backend of `mambaseq.ops.gated_rms_norm` receives; shapes and meaning as there."""

    x: Tensor
    z: Tensor
    weight: Tensor
    eps: float = 1e-5
    group_size: int | None = None
    norm_before_gate: bool = False
    gate: str = "silu"

    @property
    def wants_final_state(self) -> bool:
        """Never: y is all that there is."""
        return False

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.x.shape[-1] if self.group_size is None else self.group_size


class UnitNormArguments(NamedTuple):
    """What every backend of `mambaseq.ops.unit_norm` receives; shapes and meaning as there."""

    x: Tensor
    group_size: int
    scale: float = 1.0
    eps: float = 1e-6

    @property
    def wants_final_state(self) -> bool:
        """Never: y is all that there is."""
        return False


def check_add(arguments: AddNormArguments) -> None:
    """Raise ValueError where a shape, a dtype or a device does not fit."""
    x, residual, weight = arguments.x, arguments.residual, arguments.weight
    _check_floating("residual", residual)
    if residual.ndim < 1:
        raise ValueError("residual must be (..., d_model), not a single number")
    if weight.shape != residual.shape[-1:]:
        raise ValueError(f"weight must be (d_model={residual.shape[-1]},), not {tuple(weight.shape)}")
    if x is not None:
        _check_floating("x", x)
        if x.shape != residual.shape:
            raise ValueError(f"x must have the shape of residual {tuple(residual.shape)}, not {tuple(x.shape)}")
        if x.device != residual.device:
            raise ValueError(f"x is on {x.device}, but residual is on {residual.device}")
    if weight.device != residual.device:
        raise ValueError(f"weight is on {weight.device}, but residual is on {residual.device}")


def check_gated(arguments: GatedNormArguments) -> None:
    """Raise ValueError where a shape, a dtype, the size of the groups or a device does not fit."""
    x, z, weight, size = arguments.x, arguments.z, arguments.weight, arguments.group_size
    _check_floating("x", x)
    if x.ndim < 1:
        raise ValueError("x must be (..., channels), not a single number")
    if z.shape != x.shape:
        raise ValueError(f"z must have the shape of x {tuple(x.shape)}, not {tuple(z.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be (channels={x.shape[-1]},), not {tuple(weight.shape)}")
    if size is not None and (size < 1 or x.shape[-1] % size):
        raise ValueError(f"group_size {size} does not divide {x.shape[-1]} channels")
    if arguments.gate not in ("silu", "sigmoid"):
        raise ValueError(f"gate must be 'silu' or 'sigmoid', not {shown(arguments.gate)}")
    for name, value in (("z", z), ("weight", weight)):
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")


def check_unit(arguments: UnitNormArguments) -> None:
    """Raise ValueError where a shape, a dtype or the size of the groups does not fit."""
    x, size = arguments.x, arguments.group_size
    _check_floating("x", x)
    if x.ndim < 1:
        raise ValueError("x must be (..., channels), not a single number")
    if size < 1 or x.shape[-1] % size:
        raise ValueError(f"group_size {size} does not divide {x.shape[-1]} channels")


def _check_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} must be real floating-point numbers, not {value.dtype}")


def add_samples(device: torch.device) -> Iterator[tuple[str, AddNormArguments]]:
    """Small float32 inputs that use every argument."""
    draw = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 7, 19, generator=draw).to(device) for _ in range(2))
    weight = torch.randn(19, generator=draw).to(device)
    yield "x, residual", AddNormArguments(x, residual, weight)
    yield "residual", AddNormArguments(None, residual, weight, 1e-3)


def gated_samples(device: torch.device) -> Iterator[tuple[str, GatedNormArguments]]:
    """Small float32 inputs that use every argument."""
    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 7, 18, generator=draw).to(device) for _ in range(2))
    arguments = GatedNormArguments(x, z, torch.randn(18, generator=draw).to(device))
    yield "x, z", arguments
    yield "groups", arguments._replace(group_size=6)
    yield "norm before gate", arguments._replace(group_size=9, norm_before_gate=True)
    yield "gate by a sigmoid", arguments._replace(group_size=6, norm_before_gate=True, gate="sigmoid")


def unit_samples(device: torch.device) -> Iterator[tuple[str, UnitNormArguments]]:
    """Small float32 inputs that use every argument."""
    x = torch.randn(2, 7, 18, generator=torch.Generator().manual_seed(0)).to(device)
    yield "x", UnitNormArguments(x, 18)
    yield "groups", UnitNormArguments(x, 6, 0.25, 1e-3)
