"""The arguments of the causal convolution, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.errors import shown
from mambaseq.ops import sequences


class ConvArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.causal_conv`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    wants_final_state: bool = True  # a backend may return an empty final state if not

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check(arguments: ConvArguments) -> None:
    """Raise ValueError where a shape, the activation or a device does not fit."""
    x, weight, bias = arguments.x, arguments.weight, arguments.bias
    if not x.is_floating_point():
        raise ValueError(f"x must be real floating-point numbers, not {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), not {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels={channels}, width), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be (channels={channels},), not {tuple(bias.shape)}")
    if arguments.activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', not {shown(arguments.activation)}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, *x.shape[:2])
    state = arguments.initial_state
    expected = (arguments.n_sequences, channels, weight.shape[1] - 1)
    if state is not None and state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, not {tuple(state.shape)}")
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")


def samples(device: torch.device) -> Iterator[tuple[str, ConvArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, channels, width = 2, 37, 19, 4
    plain = ConvArguments(normal(batch, length, channels), normal(channels, width))
    yield "x, weight", plain
    full = plain._replace(bias=normal(channels), activation="silu")
    yield (
        "initial state, reverse",
        full._replace(initial_state=normal(batch, channels, width - 1), reverse=True),
    )
    cu_seqlens = torch.tensor([0, 2, 2, 20, length], dtype=torch.int32, device=device)
    yield (
        "packed",
        full._replace(x=plain.x[:1], cu_seqlens=cu_seqlens, initial_state=normal(4, channels, width - 1)),
    )
