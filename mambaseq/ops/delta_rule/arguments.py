"""The arguments of the gated delta rule, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences


class DeltaArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    wants_final_state: bool = True
    chunk_size: int = 64

    @property
    def n_sequences(self) -> int:
        return self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check(arguments: DeltaArguments) -> None:
    """Raise ValueError where a shape, a dtype, the chunk size or a device does not fit."""
    q, k, v, g, beta, state, *_ = arguments
    if v.ndim != 4:
        raise ValueError(f"v must be (batch, length, heads, d_value), not {tuple(v.shape)}")
    batch, length, heads, d_value = v.shape
    for name, value in arguments._asdict().items():
        if not isinstance(value, Tensor):
            continue
        if value.device != v.device:
            raise ValueError(f"{name} is on {value.device}, but v is on {v.device}")
        if name != "cu_seqlens" and not value.is_floating_point():
            raise ValueError(f"{name} must be real floating-point numbers, not {value.dtype}")
    if k.ndim != 4 or k.shape[:2] != (batch, length):
        raise ValueError(
            f"k must be (batch, length, key heads, d_key) with batch={batch}, length={length}, not {tuple(k.shape)}"
        )
    if q.shape != k.shape:
        raise ValueError(f"q must have the shape of k {tuple(k.shape)}, not {tuple(q.shape)}")
    key_heads, d_key = k.shape[2:]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"q and k have {key_heads} heads, which do not divide the {heads} of v")
    one = (batch, length, heads)
    if g is not None and g.shape not in (one, (*one, d_key)):
        raise ValueError(f"g must be (batch, length, heads) {one} or (..., d_key={d_key}), not {tuple(g.shape)}")
    if beta is not None and beta.shape != one:
        raise ValueError(f"beta must be (batch, length, heads) {one}, not {tuple(beta.shape)}")
    if arguments.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {arguments.chunk_size}")
    if arguments.cu_seqlens is not None:
        sequences.check(arguments.cu_seqlens, batch, length)
    expected = (arguments.n_sequences, heads, d_value, d_key)
    if state is not None and state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, not {tuple(state.shape)}")


def half(arguments: DeltaArguments) -> DeltaArguments:
    """The same with the sequences in bfloat16, as models hand them over."""
    return arguments._replace(**{name: getattr(arguments, name).bfloat16() for name in ("q", "k", "v")})


def samples(device: torch.device) -> Iterator[tuple[str, DeltaArguments]]:
    """Small float32 inputs that use every argument."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, d_key, d_value = 2, 67, 4, 6, 5
    plain = DeltaArguments(
        q=normal(batch, length, 2, d_key),
        k=F.normalize(normal(batch, length, 2, d_key), dim=-1),
        v=normal(batch, length, heads, d_value),
        g=-normal(batch, length, heads).abs(),
        beta=torch.sigmoid(normal(batch, length, heads)),
        chunk_size=16,
    )
    yield "a decay a head", plain._replace(wants_final_state=False)
    yield "no decay", plain._replace(g=None)
    channels = plain._replace(g=-2 * normal(batch, length, heads, d_key).abs())
    state = normal(batch, heads, d_value, d_key)
    yield "a decay a channel, initial state, reverse", channels._replace(initial_state=state, reverse=True)
    yield "a decay a channel, no delta", channels._replace(beta=None)
    cu_seqlens = torch.tensor([0, 10, 10, 41, length], dtype=torch.int32, device=device)
    for label, made in (("packed", plain), ("packed, a decay a channel", channels)):
        one_row = {name: getattr(made, name)[:1] for name in ("q", "k", "v", "g", "beta")}
        state = normal(4, heads, d_value, d_key)
        yield label, made._replace(**one_row, cu_seqlens=cu_seqlens, initial_state=state)
