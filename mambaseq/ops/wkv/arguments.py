"""The arguments of RWKV-4's WKV, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype

# The exponent of an empty history: finite, so that differences of two of them are 0 and not NaN.
EMPTY = -1e38


class WkvArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.wkv`."""

    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def n_sequences(self) -> int:
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def state(self) -> Tensor:
        """The initial state in the working precision, also where none is given."""
        real = working_dtype(self.k)
        if self.initial_state is not None:
            return self.initial_state.to(real)
        return empty_state(self.n_sequences, self.k.shape[2], real, self.k.device)


def empty_state(n_sequences: int, channels: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """What nothing has been added to: `(sequences, 3, channels)`."""
    state = torch.zeros(n_sequences, 3, channels, dtype=dtype, device=device)
    state[:, 2] = EMPTY
    return state


def check(arguments: WkvArguments) -> None:
    """Raise ValueError where a shape, a dtype or a device does not fit."""
    k, v, state = arguments.k, arguments.v, arguments.initial_state
    if not k.is_floating_point():
        raise ValueError(f"k must be real floating-point numbers, not {k.dtype}")
    if k.ndim != 3:
        raise ValueError(f"k must be (batch, length, channels), not {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, not {tuple(v.shape)}")
    channels = k.shape[2]
    for name, value in (("w", arguments.w), ("u", arguments.u)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must be (channels={channels},), not {tuple(value.shape)}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, *k.shape[:2])
    expected = (arguments.n_sequences, 3, channels)
    if state is not None and state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, not {tuple(state.shape)}")
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.device != k.device:
            raise ValueError(f"{name} is on {value.device}, but k is on {k.device}")


def samples(device: torch.device) -> Iterator[tuple[str, WkvArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, channels = 2, 67, 19
    decay = torch.exp(torch.linspace(-5, 2, channels, device=device))
    plain = WkvArguments(normal(batch, length, channels), normal(batch, length, channels), decay, normal(channels))
    yield "k, v, w, u", plain

    def state(n_sequences: int) -> Tensor:
        num, den, exponent = (normal(n_sequences, channels) for _ in range(3))
        return torch.stack([num, den.abs(), exponent], dim=1)

    yield "initial state", plain._replace(initial_state=state(batch))
    cu_seqlens = torch.tensor([0, 10, 10, 41, length, length], dtype=torch.int32, device=device)
    one_row = plain._replace(k=3 * plain.k[:1], v=plain.v[:1], cu_seqlens=cu_seqlens)
    yield "packed", one_row._replace(initial_state=state(5))
