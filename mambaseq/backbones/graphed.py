"""Replays training steps from CUDA graphs, a pair (forward, backward) for each shape of input, because kernels of small
models are shorter than their launches.

A pair's activations are in its own memory, those of one forward pass at a time: another forward pass before its
backward runs without the graph. Everything that leaves a pair (output, gradients) is copied out of that memory.

Where several processes sum their gradients, a step is several pairs, of neighbouring layers, in one memory: the
gradients of one are then on their way while the backward pass of the one before it is replayed.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.backbones.automatic import Automatic, has_others, is_safe, leaving_room
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import capture
from mambaseq.ops.gpu.capture import Recorder

_LOG = logging.getLogger(__name__)
_Made = TypeVar("_Made")
_Found = TypeVar("_Found")

Run = Callable[[Tensor], Tensor]
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


class Part(NamedTuple):
    """Some of what a module does: from tensors to those that the next part is given.

    modules: whose parameters it reads; the last part, those of no part as well.
    """

    run: Callable[..., Sequence[Tensor]]
    modules: Sequence[nn.Module]


class StepGraphs(Graphs["_Step"]):
    """The graphs of a module's training steps; see `Graphs`.

    There are no second derivatives, and there is one backward pass for each forward pass, unless graphs are automatic:
    what a replay cannot give is then computed without it. Of each part, all gradients come at once.
    """

    def __call__(
        self, module: nn.Module, run: Run, x: Tensor, parts: Callable[[], Sequence[Part]] = tuple
    ) -> Tensor | None:
        """`run(x)` with its gradients, or None if it must be run without a graph. x `(batch, length, d_model)`.

        parts: what `run` consists of, for several processes; none if it cannot be cut.
        """
        if not self._may_capture or not is_training_step(module, x):
            return None
        if self._policy is not None and not self._policy.is_of_use(x):
            return None
        found = inspect(module, x.device)
        if found is None:
            return None
        addresses, switches, learned = found
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        cut = has_others()
        key = Key(x.shape, x.dtype, x.requires_grad, autocast, (*switches, cut))

        def make(record: Recorder) -> _Step:
            return _Step(module, run, parts() if cut else (), x, learned, autocast, record)

        step = self.find(module, x.device, key, addresses, make)
        if step is None or step.is_busy():
            return None
        self.replays += 1
        return step(None if self._policy is None else run, x, learned)


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


class _Turn:
    """A forward pass whose activations are in a pair's memory, until its backward pass or the end of its graph."""

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = False


class _Step:
    """The graphs of a training step: a pair for each part. They are captured, and replayed, in the order of one step:
    forward from the first to the last, backward from the last to the first. So they use one memory as one pair would.

    Raises RuntimeError if they cannot be captured.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        parts: Sequence[Part],
        x: Tensor,
        learned: list[nn.Parameter],
        autocast: torch.dtype | None,
        record: Recorder,
    ) -> None:
        self._learned_of = _learned_of(parts, learned)
        if not self._learned_of:
            parts, self._learned_of = [Part(lambda x: [run(x)], [module])], [list(range(len(learned)))]
        # separate leaves: autograd would accumulate into the model's own on the stream that first used them
        leaves = {p: p.detach().requires_grad_() for p in learned}
        places = places_of(module, leaves)

        @contextlib.contextmanager
        def surrounded() -> Iterator[None]:
            with _casting(autocast), torch.enable_grad(), in_place_of(places):
                yield

        self.pairs = [_Pair([leaves[learned[place]] for place in of], surrounded, autocast) for of in self._learned_of]
        self.pairs[0].is_first = self.pairs[-1].is_last = True
        given = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)]

        def steps() -> None:
            for _ in range(WARM_UPS):
                passed = given
                for pair, part in zip(self.pairs, parts, strict=True):
                    passed = pair.warm_up(part, passed)

        warmed_up(module, x.device, record, steps)
        passed = given
        for pair, part in zip(self.pairs, parts, strict=True):
            passed = pair.record_forward(part, passed, record)
        dys: list[Tensor | None] = [None]
        for pair in reversed(self.pairs):
            dys = pair.record_backward(dys, record)

    def is_busy(self) -> bool:
        """Whether activations of a forward pass are still waiting for its backward."""
        return any(pair.is_busy() for pair in self.pairs)

    def __call__(self, again: Run | None, x: Tensor, learned: Sequence[nn.Parameter]) -> Tensor:
        passed: Sequence[Tensor] = [x]
        for pair, of in zip(self.pairs, self._learned_of, strict=True):
            passed = _Replay.apply(pair, again, *passed, *(learned[place] for place in of))
        (y,) = passed
        return y


def _learned_of(parts: Sequence[Part], learned: Sequence[nn.Parameter]) -> list[list[int]]:
    """Where the parameters of each part are in `learned`. Empty if several parts read one, whose gradient would be
    rounded in another order."""
    owners: dict[nn.Parameter, int] = {}
    for number, part in enumerate(parts):
        for parameter in {p for module in part.modules for p in module.parameters()}:
            if parameter in owners:
                return []
            owners[parameter] = number
    of: list[list[int]] = [[] for _ in parts]
    for place, parameter in enumerate(learned if parts else ()):
        of[owners.get(parameter, -1)].append(place)
    return of


class _Pair:
    """The graphs of a part's forward pass and of its backward. What they are given and give lies in their memory; where
    a part is followed by another, both read it there, and it is copied where a step begins and ends."""

    is_first = is_last = False

    def __init__(
        self,
        leaves: list[Tensor],
        surrounded: Callable[[], contextlib.AbstractContextManager[None]],
        autocast: torch.dtype | None,
    ) -> None:
        self.autocast = autocast
        self._leaves, self._surrounded = leaves, surrounded
        self._turn: weakref.ref[_Turn] | None = None

    def _call(self, part: Part, inputs: Sequence[Tensor]) -> list[Tensor]:
        with self._surrounded():
            return list(part.run(*inputs))

    def _wanted(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*(tensor for tensor in inputs if tensor.requires_grad), *self._leaves]

    def warm_up(self, part: Part, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run what is captured. The inputs of the next part."""
        ys, wanted = self._call(part, inputs), self._wanted(inputs)
        check_leaves(ys, wanted)
        if with_gradient := [y for y in ys if y.requires_grad]:
            gradients(with_gradient, wanted, [torch.zeros_like(y) for y in with_gradient])
        return _cut_off(ys)

    def record_forward(self, part: Part, inputs: Sequence[Tensor], record: Recorder) -> list[Tensor]:
        """Capture the forward pass. The inputs of the next part. The part is not kept: it holds the module, whose
        memory would wait for Python's collector."""
        self._inputs = inputs

        def forward() -> list[Tensor]:
            self._ys = self._call(part, inputs)
            return self._ys

        self._forward, ys = record(forward)
        self._outputs = [y.detach() for y in ys]
        # the outputs with gradients, of which a part with frozen parameters may have none
        self._places = [place for place, y in enumerate(ys) if y.requires_grad]
        return _cut_off(ys)

    def record_backward(self, dys: Sequence[Tensor | None], record: Recorder) -> list[Tensor | None]:
        """Capture the gradients of what `record_forward` has captured. dys: where those of its outputs lie, None if
        nowhere yet. Returns those of its inputs."""
        self._dys = [_or_zeros(dys[place], self._outputs[place]) for place in self._places]
        wanted = self._wanted(self._inputs)

        def backward() -> list[Tensor | None]:
            ys, self._ys = [self._ys[place] for place in self._places], []  # activations are free after this
            return [None if d is None else d.detach() for d in gradients(ys, wanted, self._dys)]

        found: list[Tensor | None] = [None] * len(wanted)
        if self._places:
            self._backward, found = record(backward)
        ready = iter(found)
        self._dxs = [next(ready) if tensor.requires_grad else None for tensor in self._inputs]
        of_leaves = list(ready)
        self._gradients = [d for d in of_leaves if d is not None]
        self._has_gradient = [d is not None for d in of_leaves]
        return self._dxs

    @property
    def n_inputs(self) -> int:
        return len(self._inputs)

    def is_busy(self) -> bool:
        """Whether the activations of a forward pass are still waiting for its backward."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and not turn.over

    def holds(self, turn: _Turn) -> bool:
        """Whether the activations of this forward pass are still in memory."""
        return not turn.over and self._turn is not None and self._turn() is turn

    def without_gradient(self, ys: Sequence[Tensor]) -> list[Tensor]:
        return [y for place, y in enumerate(ys) if place not in self._places]

    def forward(self, given: Sequence[Tensor]) -> tuple[list[Tensor], _Turn]:
        turn = _Turn()
        self._turn = weakref.ref(turn)
        for memory, tensor in zip(self._inputs, given, strict=True):
            _fill(memory.detach(), tensor)
        self._forward.replay()
        return [y.clone() if self.is_last else y.detach() for y in self._outputs], turn

    def backward(self, dys: Sequence[Tensor | None], turn: _Turn) -> tuple[list[Tensor | None], list[Tensor | None]]:
        turn.over = True
        for memory, place in zip(self._dys, self._places, strict=True):
            _fill(memory, dys[place])
        self._backward.replay()
        # copies, with few launches (a product with 1 is exact): otherwise the next replay would overwrite `.grad`
        copies = iter(torch._foreach_mul(self._gradients, 1.0) if self._gradients else ())
        dxs = [None if dx is None else dx.clone() if self.is_first else dx.detach() for dx in self._dxs]
        return dxs, [next(copies) if has else None for has in self._has_gradient]


def _cut_off(ys: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, as leaves."""
    return [y.detach().requires_grad_(y.requires_grad) for y in ys]


def _or_zeros(dy: Tensor | None, y: Tensor) -> Tensor:
    return torch.zeros_like(y) if dy is None else dy


def _fill(memory: Tensor, given: Tensor | None) -> None:
    """Copy what is not there already. None is zeros."""
    if given is None:
        memory.zero_()
    elif given.data_ptr() != memory.data_ptr():
        memory.copy_(given)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: _Pair, again: Run | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: inputs, then parameters. again: of a step with one part; recomputes the activations if they are gone
        or second derivatives are wanted."""
        ctx.set_materialize_grads(False)
        given, parameters = tensors[: pair.n_inputs], tensors[pair.n_inputs :]
        # the backward pass reads the parameters; autograd checks that they are unchanged
        ctx.save_for_backward(given[0] if again is not None else None, *parameters)
        ctx.pair, ctx.again = pair, again
        ys, ctx.turn = pair.forward(given)
        ctx.mark_non_differentiable(*pair.without_gradient(ys))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        if all(dy is None for dy in dys):
            return (None,) * (2 + ctx.pair.n_inputs + len(parameters))
        dxs: Sequence[Tensor | None]
        if ctx.pair.holds(ctx.turn) and not torch.is_grad_enabled():
            dxs, found = ctx.pair.backward(dys, ctx.turn)
        elif ctx.again is not None:
            (dy,) = (dy for dy in dys if dy is not None)
            dx, *found = _as_usual(ctx.again, x, parameters, ctx.pair.autocast, dy)
            dxs = [dx]
        else:
            raise RuntimeError(
                "A training step replayed from CUDA graphs has one backward pass and no second derivatives; its "
                "activations are gone. For several (retain_graph=True, create_graph=True), make the backbone with "
                'cuda_graph="auto" or False.'
            )
        return (None, None, *dxs, *found)


def _as_usual(
    run: Run, x: Tensor, parameters: Sequence[Tensor], autocast: torch.dtype | None, dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x and the parameters from another forward pass; with a graph if one is wanted."""
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        x = x.detach().requires_grad_(x.requires_grad)
    with torch.enable_grad(), _casting(autocast):
        y = run(x)
    inputs = [*([x] if x.requires_grad else []), *parameters]
    found = torch.autograd.grad(y, inputs, dy, allow_unused=True, create_graph=create_graph)
    return found if x.requires_grad else (None, *found)


def _casting(autocast: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False)


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
