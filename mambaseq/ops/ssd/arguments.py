"""The arguments of the state-space dual, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences


class SsdArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    wants_final_state: bool = True
    chunk_size: int = 64

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check(arguments: SsdArguments) -> None:
    """Raise ValueError where a shape, a dtype, the chunk size or a device does not fit."""
    x = arguments.x
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, length, heads, head_dim), not {tuple(x.shape)}")
    batch, length, heads, head_dim = x.shape
    for name, value in arguments._asdict().items():
        if not isinstance(value, Tensor) or name == "cu_seqlens":
            continue
        if not value.is_floating_point():
            raise ValueError(f"{name} must be real floating-point numbers, not {value.dtype}")
    if arguments.dt.shape != (batch, length, heads):
        raise ValueError(f"dt must be (batch, length, heads) {(batch, length, heads)}, not {tuple(arguments.dt.shape)}")
    for name, value in (("A", arguments.A), ("D", arguments.D), ("dt_bias", arguments.dt_bias)):
        if value is not None and value.shape != (heads,):
            raise ValueError(f"{name} must be (heads={heads},), not {tuple(value.shape)}")
    B, C = arguments.B, arguments.C
    if B.ndim != 4 or B.shape[:2] != (batch, length):
        raise ValueError(
            f"B must be (batch, length, groups, d_state) with batch={batch}, length={length}, not {tuple(B.shape)}"
        )
    if C.shape != B.shape:
        raise ValueError(f"C must have the shape of B {tuple(B.shape)}, not {tuple(C.shape)}")
    if B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(f"B and C have {B.shape[2]} groups, which do not divide {heads} heads")
    if arguments.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {arguments.chunk_size}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, batch, length)
    state, expected = arguments.initial_state, (arguments.n_sequences, heads, head_dim, B.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, not {tuple(state.shape)}")
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")


def half(arguments: SsdArguments) -> SsdArguments:
    """The same with the sequences in bfloat16, as models hand them over."""
    return arguments._replace(**{name: getattr(arguments, name).bfloat16() for name in ("x", "dt", "B", "C")})


def samples(device: torch.device) -> Iterator[tuple[str, SsdArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, head_dim, groups, d_state = 2, 67, 4, 5, 2, 6
    plain = SsdArguments(
        x=normal(batch, length, heads, head_dim),
        dt=0.1 * normal(batch, length, heads).abs(),
        A=-torch.arange(1, heads + 1, device=device, dtype=torch.float32),
        B=normal(batch, length, groups, d_state),
        C=normal(batch, length, groups, d_state),
        chunk_size=16,
    )
    yield "x, dt, A, B, C", plain._replace(wants_final_state=False)
    yield "final state", plain
    full = plain._replace(dt=normal(batch, length, heads), D=normal(heads), dt_bias=normal(heads) - 2, dt_softplus=True)
    state = normal(batch, heads, head_dim, d_state)
    yield "D, dt_bias, softplus, initial state, reverse", full._replace(initial_state=state, reverse=True)
    cu_seqlens = torch.tensor([0, 10, 10, 41, length], dtype=torch.int32, device=device)
    one_row = {name: getattr(full, name)[:1] for name in ("x", "dt", "B", "C")}
    state = normal(4, heads, head_dim, d_state)
    yield "packed", full._replace(**one_row, cu_seqlens=cu_seqlens, initial_state=state)
