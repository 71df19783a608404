"""The arguments of the selective scan, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences


class ScanArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.selective_scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    wants_final_state: bool = True

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check(arguments: ScanArguments) -> None:
    """Raise ValueError where a shape, a dtype or a device does not fit."""
    x, A = arguments.x, arguments.A
    if not x.is_floating_point():
        raise ValueError(f"x must be real floating-point numbers, not {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), not {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (channels={channels}, d_state), not {tuple(A.shape)}")
    d_state = A.shape[1]
    for name, value in (("dt", arguments.dt), ("z", arguments.z)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x {tuple(x.shape)}, not {tuple(value.shape)}")
    for name, value in (("B", arguments.B), ("C", arguments.C)):
        constant = value.ndim == 2 and value.shape[0] == channels
        varying = value.ndim in (3, 4) and value.shape[0] == batch and value.shape[1] == length
        if not (constant or varying) or value.shape[-1] != d_state:
            raise ValueError(
                f"{name} must be (batch, length, d_state), (batch, length, groups, d_state) or (channels, "
                f"d_state) with batch={batch}, length={length}, channels={channels}, d_state={d_state}, not "
                f"{tuple(value.shape)}"
            )
        if value.ndim == 4 and (value.shape[2] == 0 or channels % value.shape[2]):
            raise ValueError(f"{name} has {value.shape[2]} groups, which do not divide {channels} channels")
        if value.is_complex() and not A.is_complex():
            raise ValueError(f"{name} is complex but A is real")
    for name, value in (("D", arguments.D), ("dt_bias", arguments.dt_bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} must be (channels={channels},), not {tuple(value.shape)}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, batch, length)
    state = arguments.initial_state
    if state is not None:
        expected = (arguments.n_sequences, channels, d_state)
        if state.shape != expected:
            raise ValueError(f"initial_state must be {expected}, not {tuple(state.shape)}")
        if state.is_complex() and not A.is_complex():
            raise ValueError("initial_state is complex but A is real")
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")


def samples(device: torch.device) -> Iterator[tuple[str, ScanArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, complex_: bool = False) -> Tensor:
        dtype = torch.complex64 if complex_ else torch.float32
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    batch, length, channels, d_state = 2, 67, 19, 5
    decay = -torch.arange(1, d_state + 1, device=device, dtype=torch.float32).repeat(channels, 1)
    plain = ScanArguments(
        x=normal(batch, length, channels),
        dt=normal(batch, length, channels),
        A=decay,
        B=normal(batch, length, d_state),
        C=normal(batch, length, d_state),
    )
    yield "x, dt, A, B, C", plain._replace(dt=0.1 * plain.dt.abs(), wants_final_state=False)
    yield "final state", plain._replace(dt=0.1 * plain.dt.abs())
    full = plain._replace(
        D=normal(channels),
        z=normal(batch, length, channels),
        dt_bias=normal(channels) - 2,
        dt_softplus=True,
    )
    yield "D, z, dt_bias, softplus", full
    yield (
        "initial state, reverse",
        full._replace(initial_state=normal(batch, channels, d_state), reverse=True),
    )
    cu_seqlens = torch.tensor([0, 10, 10, 41, length], dtype=torch.int32, device=device)
    one_row = {name: getattr(full, name)[:1] for name in ("x", "dt", "B", "C", "z")}
    yield (
        "packed",
        full._replace(**one_row, cu_seqlens=cu_seqlens, initial_state=normal(4, channels, d_state)),
    )
    yield (
        "complex",
        full._replace(
            A=torch.complex(decay, 3 * normal(channels, d_state)),
            B=normal(channels, d_state, complex_=True),
            C=normal(batch, length, d_state, complex_=True),
            initial_state=normal(batch, channels, d_state, complex_=True),
        ),
    )
