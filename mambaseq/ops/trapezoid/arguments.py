"""The arguments of Mamba-3's recurrence, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences


class TrapezoidArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.trapezoid`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor | None = None
    initial_x: Tensor | None = None
    initial_B: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    wants_final_state: bool = True
    chunk_size: int = 64

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check(arguments: TrapezoidArguments) -> None:
    """Raise ValueError where a shape, a dtype, the chunk size or a device does not fit."""
    x, B = arguments.x, arguments.B
    if x.ndim != 5:
        raise ValueError(f"x must be (batch, length, heads, rank, head_dim), not {tuple(x.shape)}")
    for name, value in arguments._asdict().items():
        if not isinstance(value, Tensor):
            continue
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")
        if name != "cu_seqlens" and not value.is_floating_point():
            raise ValueError(f"{name} must be real floating-point numbers, not {value.dtype}")
    batch, length, heads, rank, head_dim = x.shape
    one = (batch, length, heads)
    for name in ("dt", "A", "trap"):
        value = getattr(arguments, name)
        if value.shape != one:
            raise ValueError(f"{name} must be (batch, length, heads) {one}, not {tuple(value.shape)}")
    if B.ndim != 5 or B.shape[:4] != x.shape[:4]:
        raise ValueError(f"B must be (batch, length, heads, rank, d_state) {(*one, rank)} + (d_state,), not "
                         f"{tuple(B.shape)}")  # fmt: skip
    if arguments.C.shape != B.shape:
        raise ValueError(f"C must have the shape of B {tuple(B.shape)}, not {tuple(arguments.C.shape)}")
    if arguments.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {arguments.chunk_size}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, batch, length)
    d_state, own = B.shape[4], (arguments.n_sequences, heads)
    for name, shape in (("state", (head_dim, d_state)), ("x", (rank, head_dim)), ("B", (rank, d_state))):
        value = getattr(arguments, f"initial_{name}")
        if value is not None and value.shape != (*own, *shape):
            raise ValueError(f"initial_{name} must be {(*own, *shape)}, not {tuple(value.shape)}")
    if (arguments.initial_x is None) != (arguments.initial_B is None):
        raise ValueError("initial_x and initial_B, of the position before the first, go together")


def half(arguments: TrapezoidArguments) -> TrapezoidArguments:
    """The same with what is multiplied in bfloat16, as models hand it over."""
    return arguments._replace(**{name: getattr(arguments, name).bfloat16() for name in ("x", "B", "C")})


def samples(device: torch.device) -> Iterator[tuple[str, TrapezoidArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, rank, head_dim, d_state = 2, 67, 3, 2, 5, 6
    plain = TrapezoidArguments(
        x=normal(batch, length, heads, rank, head_dim),
        dt=normal(batch, length, heads).abs(),
        A=-normal(batch, length, heads).abs(),
        trap=normal(batch, length, heads).sigmoid(),
        B=normal(batch, length, heads, rank, d_state),
        C=normal(batch, length, heads, rank, d_state),
        chunk_size=16,
    )
    yield "several inputs", plain._replace(wants_final_state=False)
    first: dict[str, Any] = {name: getattr(plain, name)[..., :1, :] for name in ("x", "B", "C")}
    one = plain._replace(**first)
    states: dict[str, Any] = {
        "initial_state": normal(batch, heads, head_dim, d_state),
        "initial_x": normal(batch, heads, 1, head_dim),
        "initial_B": normal(batch, heads, 1, d_state),
    }
    yield "one input, initial state, reverse", one._replace(**states, reverse=True)
    cu_seqlens = torch.tensor([0, 10, 10, 41, length], dtype=torch.int32, device=device)
    row: dict[str, Any] = {name: getattr(plain, name)[:1] for name in ("x", "dt", "A", "trap", "B", "C")}
    states = {
        "initial_state": normal(4, heads, head_dim, d_state),
        "initial_x": normal(4, heads, rank, head_dim),
        "initial_B": normal(4, heads, rank, d_state),
    }
    yield "packed", plain._replace(**row, **states, cu_seqlens=cu_seqlens)
