"""The arguments of the time-invariant scan, once discretised, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype


class LtiArguments(NamedTuple):
    """What every backend receives. Those that do not say otherwise leave D and z to `lti_scan`."""

    x: Tensor  # (batch, length, channels)
    log_decay: Tensor  # (channels, d_state), the logarithm of Abar
    B: Tensor  # (channels, d_state), Bbar
    C: Tensor  # (channels, d_state)
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    mode: str | None = None
    D: Tensor | None = None  # (channels,)
    z: Tensor | None = None  # (batch, length, channels)

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def real_dtype(self) -> torch.dtype:
        return working_dtype(self.x)

    @property
    def state_dtype(self) -> torch.dtype:
        return working_dtype(self.x, self.log_decay)


class System(NamedTuple):
    """What the operators of `lti_scan` receive: B, C and the state `(sequences, channels, d_state)` have the dtype of
    decay, which is Abar, real or complex."""

    x: Tensor
    decay: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    D: Tensor | None = None
    z: Tensor | None = None

    @property
    def n_sequences(self) -> int:
        return sequences.count(self.x, self.cu_seqlens)


def system_of(arguments: LtiArguments, decay: Tensor | None = None) -> System:
    """The arguments, the system and its states in the dtype of those. decay: exp of log_decay, where that is known
    already; log_decay is then not read."""
    wide = arguments.state_dtype
    x, log_decay, B, C, state, cu_seqlens, reverse, _, D, z = arguments
    decay = torch.exp(log_decay.to(wide)) if decay is None else decay
    state = None if state is None else state.to(wide)
    return System(x, decay, B.to(wide), C.to(wide), state, cu_seqlens, reverse, D, z)


SCHEMA = "Tensor x, Tensor decay, Tensor B, Tensor C, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"


def samples(device: torch.device) -> Iterator[tuple[str, LtiArguments]]:
    """Small float32 inputs, real and complex."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    batch, length, channels, d_state = 2, 67, 19, 5
    x = normal(batch, length, channels)
    decay = -torch.arange(1, d_state + 1, device=device, dtype=torch.float32).repeat(channels, 1) / 30
    yield "real", LtiArguments(x, decay, normal(channels, d_state), normal(channels, d_state))
    B, C = (normal(channels, d_state, dtype=torch.complex64) for _ in range(2))
    oscillating = LtiArguments(x, torch.complex(decay, normal(channels, d_state)), B, C)
    state = normal(batch, channels, d_state, dtype=torch.complex64)
    yield "complex, initial state, reverse", oscillating._replace(initial_state=state, reverse=True)
    cu_seqlens = torch.tensor([0, 10, 10, 41, length], dtype=torch.int32, device=device)
    state = normal(4, channels, d_state, dtype=torch.complex64)
    yield "packed", oscillating._replace(x=x[:1], initial_state=state, cu_seqlens=cu_seqlens)
    yield "D, z", oscillating._replace(D=normal(channels), z=normal(batch, length, channels))
