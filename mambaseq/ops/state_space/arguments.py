"""The arguments of the scan of dense linear systems, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype


class StateSpaceArguments(NamedTuple):
    """What every backend receives; channel c belongs to system `c // (channels / systems)`."""

    x: Tensor  # (batch, length, channels)
    A: Tensor  # (systems, d_state, d_state)
    B: Tensor  # (systems, d_state)
    C: Tensor  # (systems, outputs, d_state)
    initial_state: Tensor | None = None  # (sequences, channels, d_state)
    cu_seqlens: Tensor | None = None
    wants_final_state: bool = True  # a backend may return an empty final state if not

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the states and of y: complex if A is."""
        if self.x.is_complex():
            return self.x.dtype
        return working_dtype(self.x, self.A)


def samples(device: torch.device) -> Iterator[tuple[str, StateSpaceArguments]]:
    """Small float32 inputs: a system a channel, shared systems, complex ones, packed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    def arguments(systems: int, channels: int, outputs: int, dtype: torch.dtype) -> StateSpaceArguments:
        d_state = 5
        A = normal(systems, d_state, d_state, dtype=dtype)
        A = 0.97 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
        B, C = normal(systems, d_state, dtype=dtype), normal(systems, outputs, d_state, dtype=dtype)
        return StateSpaceArguments(normal(2, 150, channels, dtype=dtype), A, B, C)

    yield "a system a channel", arguments(6, 6, 1, torch.float32)
    shared = arguments(2, 6, 3, torch.float32)
    yield "shared, initial state", shared._replace(initial_state=normal(2, 6, 5))
    oscillating = arguments(3, 3, 2, torch.complex64)
    bounds = torch.tensor([0, 10, 10, 81, 150], dtype=torch.int32, device=device)
    state = normal(4, 3, 5, dtype=torch.complex64)
    yield "complex, packed", oscillating._replace(x=oscillating.x[:1], initial_state=state, cu_seqlens=bounds)
