"""What of a module is replayed from CUDA graphs, because kernels of small models are shorter than their launches: when
it is captured, what a replay relies on, and what surrounds a capture. Whole training steps: `graphed_steps`; chunks of
long sequences: `staged`.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.backbones.automatic import Automatic, is_safe, leaving_room
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import capture
from mambaseq.ops.gpu.capture import Recorder

_LOG = logging.getLogger(__name__)
_Made = TypeVar("_Made")
_Found = TypeVar("_Found")

CudaGraph = bool | Literal["auto"]
"""True: capture training steps; False: never; "auto": if that is safe and faster (see `automatic`)."""

MOST_GRAPHS = 4  # steps of a module, each of which holds its activations
EAGER_CALLS = 2  # calls with a key before its capture: by then kernels are compiled, and rare shapes never get there
WARM_UPS = 2
MOST_KEYS = 64  # that are counted
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Key(NamedTuple):
    """What a replay relies on, besides the addresses of parameters and buffers."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    autocast: torch.dtype | None
    switches: tuple[Any, ...]


class Graphs(Generic[_Made]):
    """What was captured of a module, by key. A copy, or one read from a file, has none.

    A replay does not repeat what the module does on the host, and everything learned must be a parameter of it.
    Replays read and write parameters and buffers at their addresses: these may change in place; moved or replaced ones
    are captured again. Sharded parameters (DTensor, FSDP) are never captured.

    why_not: the reason why nothing is captured any more; the log has it too (debug), with its traceback.
    """

    what = "Training"

    def __init__(self, automatic: bool = False) -> None:
        self._policy = Automatic() if automatic else None
        self._pairs: dict[Key, _Made] = {}
        self._calls: dict[Key, int] = {}
        self._refused: set[Key] = set()
        self._addresses: tuple[int, ...] = ()
        self._may_capture = True
        self._stream: torch.cuda.Stream | None = None  # one for all captures: cuBLAS keeps a workspace for each
        self.replays = 0
        self.why_not: str | None = None

    def __reduce__(self) -> Any:
        return type(self), (self._policy is not None,)

    @property
    def captured(self) -> int:
        """The number of keys for which there are graphs."""
        return len(self._pairs)

    def find(
        self,
        module: nn.Module,
        device: torch.device,
        key: Key,
        addresses: tuple[int, ...],
        make: Callable[[Recorder], _Made],
        calls: int = 1,
    ) -> _Made | None:
        """What was captured for this key, now or before; None if this call, or as many of them, are to be run without.

        make: captures it; raises RuntimeError if it cannot be captured.
        """
        if addresses != self._addresses:
            self._addresses = addresses
            self._pairs.clear()
            self._calls.clear()
            self._refused.clear()
        if (made := self._pairs.get(key)) is not None:
            return made
        if key in self._refused or not self.is_due(key, calls):
            return None
        if self._policy is not None and not is_safe(module):
            self._refused.add(key)
            return None
        return self._capture(device, key, make)

    def is_due(self, key: Key, calls: int = 1) -> bool:
        """Count calls; whether the graphs for them are to be captured."""
        if self._policy is None and len(self._pairs) >= MOST_GRAPHS:
            return False
        if key not in self._calls and len(self._calls) >= MOST_KEYS:
            self._calls.clear()
            self._refused.clear()
        before = self._calls.get(key, 0)
        self._calls[key] = before + calls
        return before >= (EAGER_CALLS if self._policy is None else self._policy.eager_calls)

    def _capture(self, device: torch.device, key: Key, make: Callable[[Recorder], _Made]) -> _Made | None:
        if self._policy is not None and self._pairs:  # of an earlier shape: one at a time
            self._pairs.clear()
            self._policy.eager_calls *= 2
        try:
            with capture.capturing, self._recording(device) as record:
                made = make(record)
        except RuntimeError as error:
            self._may_capture = False
            self._pairs.clear()
            self.why_not = str(error).partition("\n")[0].rstrip(".")
            _LOG.debug("%s without CUDA graphs: %s", self.what, self.why_not, exc_info=True)
            if self._policy is None:  # requested by the user
                warnings.warn(f"{self.what} without CUDA graphs: {self.why_not}.", RuntimeWarning, stacklevel=5)
            return None
        self._pairs[key] = made
        del self._calls[key]
        return made

    @contextlib.contextmanager
    def _recording(self, device: torch.device) -> Iterator[Recorder]:
        with torch.cuda.device(device), contextlib.nullcontext() if self._policy is None else leaving_room():
            if self._stream is None or self._stream.device != device:
                self._stream = torch.cuda.Stream()
            yield Recorder(self._stream)


def on_gpu(device: torch.device) -> bool:
    """Whether there are graphs on this device."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def is_training_step(module: nn.Module, x: Tensor) -> bool:
    """Whether this call is one whose graphs may be captured or replayed."""
    return (
        module.training
        and on_gpu(x.device)
        and x.numel() > 0
        and torch.is_grad_enabled()
        and is_eager(x)
        and not getattr(module, "_is_replica", False)  # DataParallel's replicas have no real parameters
        and not torch.is_anomaly_enabled()
        and not _has_any_global_hook()
    )


class Inspection(NamedTuple):
    """addresses: of parameters and buffers. switches: what may change in training: classes, modes, which parameters are
    learned, dropout. learned: the parameters with gradients."""

    addresses: tuple[int, ...]
    switches: tuple[Any, ...]
    learned: list[nn.Parameter]


def inspect(root: nn.Module, device: torch.device) -> Inspection | None:
    """Describe a module's current state. None if replays may differ from calls: modules inside have hooks, tensors are
    on other devices, sharded or of other kinds, or nothing is learned."""
    addresses: list[int] = []
    switches: list[Any] = []
    learned: dict[nn.Parameter, None] = {}  # once, even if layers share it
    waiting = [root]
    while waiting:
        module = waiting.pop()
        inside = module.__dict__  # without nn.Module's overhead: every step asks all modules
        if "_parameters" not in inside or (module is not root and any(inside[name] for name in _HOOKS)):
            return None
        switches += (type(module), "forward" in inside, inside["training"])
        if isinstance(module, nn.Dropout):
            switches.append(module.p)
        for parameter in inside["_parameters"].values():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or parameter.device != device:
                return None
            addresses.append(parameter.data_ptr())
            switches.append(parameter.requires_grad)
            if parameter.requires_grad:
                learned[parameter] = None
        for buffer in inside["_buffers"].values():
            if buffer is None:
                continue
            if type(buffer) is not Tensor or buffer.device != device or buffer.requires_grad:
                return None
            addresses.append(buffer.data_ptr())
        waiting.extend(child for child in inside["_modules"].values() if child is not None)
    return Inspection(tuple(addresses), tuple(switches), list(learned)) if learned else None


def warmed_up(module: nn.Module, device: torch.device, record: Recorder, run: Callable[[], _Found]) -> _Found:
    """What `run` returns, run as before a capture; buffers and random numbers are restored.

    Raises RuntimeError if it waits for the GPU.
    """
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        found, waits = record.warm_up(run)
    for buffer, value in before:
        buffer.copy_(value)
    if waits:
        raise RuntimeError("a layer waits for the GPU")
    return found


Places = list[tuple[dict[str, Any], str, Tensor]]


def places_of(module: nn.Module, leaves: Mapping[nn.Parameter, Tensor]) -> Places:
    """Where a module has its parameters, and what is to be in their place."""
    return [
        (owner._parameters, name, leaves[parameter])
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter in leaves
    ]


@contextlib.contextmanager
def in_place_of(places: Places) -> Iterator[None]:
    """A module with other tensors in place of its parameters."""
    before = [table[name] for table, name, _ in places]
    try:
        for table, name, leaf in places:
            table[name] = leaf
        yield
    finally:
        for (table, name, _), parameter in zip(places, before, strict=True):
            table[name] = parameter


def gradients(ys: Sequence[Tensor], inputs: Sequence[Tensor], dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Those of the inputs, from those of the outputs; autocast is on only in the forward pass, as usual."""
    with torch.autocast(ys[0].device.type, enabled=False):
        return torch.autograd.grad(ys, inputs, dys, allow_unused=True)


def check_leaves(ys: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a learned tensor is not a parameter of the module: its gradient would be lost."""
    known = {id(tensor) for tensor in inputs}
    seen: set[Any] = set()
    waiting: list[Any] = [y.grad_fn for y in ys]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            raise RuntimeError("a layer learns a tensor that is not among its parameters")
        waiting.extend(following for following, _ in node.next_functions)
