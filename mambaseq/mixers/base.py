"""The mixer contract: `(batch, length, d_model)` to `(batch, length, d_model)`, with a state that is a plain value."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.ops import OPS
from mambaseq.ops.decoding.block import Layer
from mambaseq.trees import register_tree


@dataclasses.dataclass
class State:
    """What a mixer remembers of the past: a plain value of tensors whose first dimension is the sequence.

    It is saved, copied, forked and resumed like any value; `forward` never changes the given one. A field that is not a
    tensor (such as a bound on lengths) applies to all sequences and is passed on unchanged. To `torch.export` it is a
    container of its tensors (see `register_tree`).
    """

    accumulated: ClassVar[tuple[str, ...]] = ()
    """Its float32 tensors that a step may also read and write as bfloat16 (see `stored_as`)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_tree(cls)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state with `function` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{n: function(value) if isinstance(value, Tensor) else value for n, value in values.items()})

    def clone(self) -> Self:
        """A copy that shares no memory with this one."""
        return self.map(torch.Tensor.clone)

    def detach(self) -> Self:
        """The same values, detached from their graph: for truncated backpropagation through time."""
        return self.map(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device. The dtype stays, because accumulators must be fp32."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def stored_as(self, dtype: torch.dtype) -> Self:
        """With what it accumulates kept in float32 or bfloat16 between steps, in which it is computed in float32. What
        has another dtype, or is not accumulated, stays."""
        kept = self.map(lambda tensor: tensor)
        for name in self.accumulated:
            if (tensor := getattr(self, name)).dtype in (torch.float32, torch.bfloat16):
                setattr(kept, name, tensor.to(dtype))
        return kept

    def select(self, sequences: Tensor) -> Self:
        """The states of some sequences, `(n,)` int64 indices; repeats fork a sequence."""
        return self.map(lambda tensor: tensor[sequences])

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Mixer(nn.Module, abc.ABC):
    """Mixes along the sequence.

    causal: position t sees nothing after t. bounded_state: the state's size does not grow with the history. These two
        decide which laws a mixer is tested under.
    companion: the name of the mixer that follows it in a stack by default ("mlp" for those whose published block has a
        channel MLP). position_wise: position t sees t alone. sums_up: the state is a sum over positions, each decayed
        by known factors, and forward takes its ops from `mambaseq.parallel.recurrences`, so that ranks which share a
        sequence may all run it at once.
    """

    causal: ClassVar[bool] = True
    bounded_state: ClassVar[bool] = True
    companion: ClassVar[str | None] = None
    sums_up: bool = False
    position_wise: ClassVar[bool] = False
    d_model: int

    @abc.abstractmethod
    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """x `(batch, length, d_model)` to y of the same shape, or `(y, state)` with `return_state`.

        state: of `batch` sequences (of `cu_seqlens` sequences when packed), None for an empty history.
        cu_seqlens: `(sequences + 1,)` int32; packs sequences into batch 1; nothing crosses a boundary.
        """

    @abc.abstractmethod
    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """The state of an empty history. max_length matters only to mixers whose state grows."""

    def step_(self, x: Tensor, state: Any) -> Tensor:
        """x `(batch, 1, d_model)` to y of the same shape; changes `state` in place. For decode loops.

        Wrong states are refused here too, because kernels would write past the end of smaller tensors.
        """
        y, new = self.forward(x, state=state, return_state=True)
        for name, tensor in state.tensors().items():
            tensor.copy_(getattr(new, name))
        return y

    def can_step_layer(self, residual: Tensor, norm: Any, state: Any) -> bool:
        """Whether `layer_step_` can take the place of the layer's norm, `step_` and the sum."""
        return False

    def layer_step_(self, residual: Tensor, norm: Any, state: Any) -> Tensor:
        """residual + step_(norm(residual)), `(batch, d_model)` fp32, without changing the residual; changes the state
        in place. For those that have kernels of the whole, where `can_step_layer` says so."""
        raise NotImplementedError

    def cpu_layer(self, stream: Tensor, norm: Any, state: Any) -> Layer | None:
        """What `layers_step_` on a CPU reads of the layer of this norm for its next step; None where it cannot run.
        stream `(batch, d_model)`."""
        return None

    def positions(self, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        """x `(1, n, d_model)`, positions of one sequence, to y of the same shape and the states after each of them, as
        those of n sequences; the given state stays as it is. None where no kernel does that faster than steps."""
        return None

    def scale_residual_(self, factor: float) -> None:
        """Multiply the weights that write to the residual stream, once, at initialisation (GPT-2's rule)."""
        with torch.no_grad():
            self.out_proj.weight.mul_(factor)  # type: ignore[union-attr, operator]


def check_backend(mixer: str, op: str, backend: str | None) -> None:
    """Raise ConfigError if the op has no backend of this name; None allows any."""
    known = [candidate.name for candidate in OPS[op].backends]
    if backend is not None and backend not in known:
        raise ConfigError(
            f"{mixer}: there is no backend {shown(backend)}.{did_you_mean(backend, known)} Known: {', '.join(known)}; "
            "null, or None in Python, takes the fastest that can."
        )


def check_state(name: str, state: Any, kind: type[State], device: torch.device, **shapes: tuple[int, ...]) -> None:
    """Raise ValueError if a given state has another kind, other shapes or another device."""
    if type(state) is not kind:
        raise ValueError(f"{name}: the state is a {type(state).__name__}; a {kind.__name__} is needed.")
    for key, shape in shapes.items():
        given = getattr(state, key)
        if given.shape != shape or given.device != device:
            raise ValueError(
                f"{name}: state.{key} is {tuple(given.shape)} on {given.device}; {shape} on {device} is needed."
            )
