"""Replays a chunk's layers from CUDA graphs (see `backbones/chunks.py`), because a host that starts all kernels of a
chunk one by one may be slower than the GPU, most of all where several ranks share a chunk.

A stage is the layers between two messages of a rank, or all layers where nothing is sent. Of each there are three
graphs: of the first pass, which keeps nothing; of the second, with its activations; and of that one's backward, which
also adds the gradients of parameters to totals over all chunks. Messages, the last norm and everything outside of the
backbone run as usual between them. All chunks of one shape use the same graphs, since the backward of a chunk ends
before the next one begins; and all graphs share one memory, in which a first pass lies where activations of the second
will be. A chunk in which no sequence has a history is given states that say so, so that it is as the others. One that
is run as usual, because it is not captured yet, is given and asked for the same, since kernels round differently
without: when graphs are captured changes no bit of a run.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states

from mambaseq.backbones.graphed import (
    MOST_KEYS,
    WARM_UPS,
    Graphs,
    Key,
    check_leaves,
    gradients,
    in_place_of,
    inspect,
    is_training_step,
    places_of,
    warmed_up,
)
from mambaseq.backbones.relay import RunLayers
from mambaseq.ops.gpu import capture
from mambaseq.ops.gpu.capture import Recorder
from mambaseq.parallel.context import Like

_CURRENT: contextvars.ContextVar[Staged | None] = contextvars.ContextVar("staged", default=None)
Casting = Callable[[], contextlib.AbstractContextManager[None]]


def current() -> Staged | None:
    """What replays the chunk that is being run, or notes of what it consists."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


class Seen(NamedTuple):
    """A stage as it was run: its layers, and what it was given. Not what runs them, which would hold the module that
    holds this."""

    layers: list[Any]
    residual: Like
    branch: Like | None


class ChunkGraphs(Graphs["_Chunk"]):
    """The graphs of a module's chunks; see `Graphs`.

    Captured when as many chunks of a shape were run as a policy asks for, at the begin of a call. Those of other shapes
    in the same call are run as usual. Nothing is captured of layers that draw random numbers, nor where layers of
    several stages share a parameter, whose gradient would be rounded in another order.
    """

    what = "Training in chunks"

    def __init__(self, automatic: bool = False) -> None:
        super().__init__(automatic)
        self.seen: dict[Key, list[Seen]] = {}

    def begin(
        self, module: nn.Module, x: Tensor, lengths: Sequence[int], autocast: Any, casting: Casting, width: int | None
    ) -> Staged | None:
        """For a call with x `(batch, length, d_model)` in chunks of these lengths; None if it is none of a training's,
        or chunks like these are never replayed. autocast: whatever tells one from another; casting: enters it. width:
        how many layers' states are in a message, None where nothing is sent."""
        if not is_training_step(module, x):
            return None
        shape = torch.Size([x.shape[0], max(set(lengths), key=lengths.count), x.shape[2]])
        if self._policy is not None and not self._policy.is_of_use_in_chunks(shape):
            return None
        found = inspect(module, x.device)
        if found is None:
            return None
        addresses, switches, learned = found
        if addresses != self._addresses or len(self.seen) > MOST_KEYS:
            self.seen.clear()  # layers that may have been replaced
        # as a chunk's input always has a gradient, whether the whole's has one or not
        key = Key(shape, x.dtype, True, None, (*switches, autocast, width))
        # after a capture that failed, too: a run that goes on has it still before it
        if not self._may_capture or (self._policy is not None and capture.capturing.locked()):
            return Staged(self, key, None)
        if (seen := self.seen.get(key)) is None:
            self._calls.pop(key, None)  # not before it was seen
        made = self.find(
            module,
            x.device,
            key,
            addresses,
            lambda record: _Chunk(module, seen or [], len(x), x.device, learned, casting, record),
            lengths.count(shape[1]),
        )
        return Staged(self, key, made)


class Staged:
    """The chunks of one call, replayed, or run as usual and noted."""

    def __init__(self, owner: ChunkGraphs, key: Key, graphs: _Chunk | None) -> None:
        self._owner, self._key, self._graphs = owner, key, graphs
        self._holds, self._number = False, 0
        self._noted: list[Seen] | None = None
        self._totals: list[Tensor | None] = []
        self._places: dict[int, int] = {}

    @contextlib.contextmanager
    def holding(self, parameters: Sequence[Tensor] = (), totals: list[Tensor | None] | None = None) -> Iterator[None]:
        """Around one pass over all chunks, whose activations and totals are in the graphs' memory. If that of another
        call is there, or a parameter has moved since, chunks are run as usual.

        parameters: of a pass with gradients, which are added to `totals`, one for each, in place.
        """
        graphs = self._graphs
        ready = graphs is not None and graphs.reads(parameters) and graphs.lock.acquire(blocking=False)
        self._holds, self._totals = ready, [] if totals is None else totals
        self._places = {p.data_ptr(): place for place, p in enumerate(parameters)} if ready else {}
        try:
            yield
        finally:
            if ready and graphs is not None:
                graphs.lock.release()
            self._holds, self._totals, self._places = False, [], {}

    def replays(self, chunk: Tensor) -> bool:
        """Whether this chunk, `(batch, length, d_model)`, is replayed."""
        return self._holds and chunk.shape == self._key.shape

    @contextlib.contextmanager
    def running(self, chunk: Tensor) -> Iterator[None]:
        """Layers are run over this chunk."""
        if chunk.shape != self._key.shape:
            yield
            return
        self._number = 0
        notes = self._graphs is None and self._key not in self._owner.seen
        self._noted = [] if notes else None
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)
        if self._noted is not None:
            self._owner.seen[self._key] = self._noted

    def around(self, layers: list[Any], run: RunLayers) -> RunLayers:
        """What runs these layers in the place of `run`."""
        number = self._number
        self._number += 1

        def as_usual(
            branch: Tensor | None, residual: Tensor, states: list[Any], wanted: bool
        ) -> tuple[Tensor, Tensor, list[Any]]:
            if self._noted is not None:
                self._noted.append(Seen(layers, Like.of(residual), None if branch is None else Like.of(branch)))
            given = [
                layer.mixer.init_state(len(residual), device=residual.device) if state is None else state
                for layer, state in zip(layers, states, strict=True)
            ]
            branch, residual, new = run(branch, residual, given, True)
            if torch.is_grad_enabled():
                branch, residual, *tensors = _Heard.apply(branch, residual, *_tensors(new))
                remaining = iter(tensors)
                new = [state.map(lambda _: next(remaining)) for state in new]
            return branch, residual, new if wanted else [None] * len(layers)

        if not self._holds or self._graphs is None or number >= len(self._graphs.stages):
            return as_usual
        stage = self._graphs.stages[number]
        if len(layers) != len(stage.layers) or any(a is not b for a, b in zip(layers, stage.layers, strict=True)):
            return as_usual

        def replayed(
            branch: Tensor | None, residual: Tensor, states: list[Any], wanted: bool
        ) -> tuple[Tensor, Tensor, list[Any]]:
            given = stage.flat(branch, residual, states)
            if given is None:
                return as_usual(branch, residual, states, wanted)
            self._owner.replays += 1
            if torch.is_grad_enabled():
                found = _Replay.apply(stage, self, *given)
            else:
                found = stage.first(given)
            return found[1], found[0], stage.states(found[2:]) if wanted else [None] * len(layers)

        return replayed

    def begin_totals(self, totals: Mapping[int, Tensor]) -> None:
        """Gradients go to these tensors from now on, by the address of their parameter: zeros, or what was found
        before."""
        zeros = []
        for address, total in totals.items():
            place = self._places[address]
            known = self._totals[place]
            if known is total:
                continue
            if known is None:
                zeros.append(total)
            else:
                total.copy_(known)
            self._totals[place] = total
        if zeros:
            torch._foreach_zero_(zeros)

    def given_out(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same, in memory of their own where they are the graphs'."""
        static = {} if self._graphs is None else {id(t) for stage in self._graphs.stages for t in stage.totals.values()}
        found = list(totals)
        memory = {place: total for place, total in enumerate(found) if total is not None and id(total) in static}
        if memory:
            own = [torch.empty_like(total) for total in memory.values()]
            torch._foreach_copy_(own, list(memory.values()))
            for place, total in zip(memory, own, strict=True):
                found[place] = total
        return found


class _Chunk:
    """The graphs of a chunk: of its stages' second passes in their order, of their backwards in the other, and of their
    first passes, which is the order in which they use one memory.

    Raises RuntimeError if they cannot be captured.
    """

    def __init__(
        self,
        module: nn.Module,
        seen: Sequence[Seen],
        batch: int,
        device: torch.device,
        learned: Sequence[nn.Parameter],
        casting: Casting,
        record: Recorder,
    ) -> None:
        self.lock = threading.Lock()
        self._addresses = {p.data_ptr() for p in learned}
        # separate leaves: autograd would accumulate into the model's own
        leaves = {p: p.detach().requires_grad_() for p in learned}
        places = places_of(module, leaves)

        @contextlib.contextmanager
        def surrounded() -> Iterator[None]:
            with casting(), in_place_of(places):
                yield

        shared: dict[tuple[int, Like], Tensor] = {}
        self.stages = [_Stage(module, one, batch, device, surrounded) for one in seen]
        for stage in self.stages:
            warmed_up(module, device, record, functools.partial(stage.warm_up, list(leaves.values())))
        of_stages = [address for stage in self.stages for address in stage.totals]
        if len(set(of_stages)) < len(of_stages):
            raise RuntimeError("layers of several stages share a parameter")
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            stage.record_second(before, shared, record)
        for stage in reversed(self.stages):
            stage.record_backward(record)
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            stage.record_first(before, record)

    def reads(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, where they were."""
        return not parameters or {p.data_ptr() for p in parameters} == self._addresses


class _Stage:
    """The graphs of a stage. Tensors are in the order: residual, branch (None for the first stage), states."""

    def __init__(self, module: nn.Module, seen: Seen, batch: int, device: torch.device, surrounded: Casting) -> None:
        self._module, self.layers = weakref.ref(module), seen.layers
        self._surrounded, self._device = surrounded, device
        self._likes = [layer.mixer.init_state(batch, device=device) for layer in seen.layers]
        self._passed = [seen.residual] if seen.branch is None else [seen.residual, seen.branch]
        kinds = [Like.of(tensor) for tensor in _tensors(self._likes)]
        self._kinds = [*self._passed, *kinds]
        self.totals: dict[int, Tensor] = {}  # by the address of the parameter
        self._learned: list[Tensor] = []
        self._with_gradient: list[int] = []  # of the outputs
        self._ys: list[Tensor] = []  # with the way back to the inputs
        self._outputs: list[Tensor] = []
        self._left: list[Tensor] = []  # of the pass without gradients

    def states(self, tensors: Sequence[Tensor]) -> list[Any]:
        remaining = iter(tensors)
        return [like.map(lambda _: next(remaining)) for like in self._likes]

    def flat(self, branch: Tensor | None, residual: Tensor, states: list[Any]) -> list[Tensor] | None:
        """The inputs in one list; None if they are of other kinds."""
        given = [residual] if branch is None else [residual, branch]
        for like, state in zip(self._likes, states, strict=True):
            given += (like if state is None else state).tensors().values()
        if len(given) != len(self._kinds):
            return None
        for tensor, kind in zip(given, self._kinds, strict=True):
            if tensor.shape != kind.shape or tensor.dtype != kind.dtype or tensor.device != self._device:
                return None
        return given

    def _call(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        branch = None if len(self._passed) == 1 else inputs[1]
        module: Any = self._module()
        states = self.states(inputs[len(self._passed) :])
        with self._surrounded():
            branch, residual, new = module._stage(self.layers, None, None, branch, inputs[0], states, True)
        return [residual, branch, *_tensors(new)]

    def _empty(self, kinds: Sequence[Like]) -> list[Tensor]:
        made = [torch.zeros(kind.shape, dtype=kind.dtype, device=self._device) for kind in kinds]
        return [tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex()) for tensor in made]

    def warm_up(self, leaves: Sequence[Tensor]) -> None:
        """Run all that is captured, and find out what has gradients. leaves: in place of the module's parameters."""
        before = _random(self._device)
        for _ in range(WARM_UPS):
            inputs = self._empty(self._kinds)
            with torch.no_grad():
                self._call(inputs)
            with torch.enable_grad():
                ys = self._call(inputs)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            check_leaves(ys, [*inputs, *leaves])
            self._with_gradient = [place for place, y in enumerate(ys) if y.requires_grad]
            with_gradient = [ys[place] for place in self._with_gradient]
            found = gradients(with_gradient, [*wanted, *leaves], [torch.zeros_like(y) for y in with_gradient])
        if [Like.of(y) for y in ys[2:]] != self._kinds[len(self._passed) :]:
            raise RuntimeError("a state changes its kind")
        if not all(torch.equal(a, b) for a, b in zip(before, _random(self._device), strict=True)):
            raise RuntimeError("a layer draws random numbers")
        has = [p for p, d in zip(leaves, found[len(wanted) :], strict=True) if d is not None]
        self._learned = has
        self.totals = {
            p.data_ptr(): torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for p in has
        }

    def record_second(self, before: _Stage | None, shared: dict[tuple[int, Like], Tensor], record: Recorder) -> None:
        """Capture the pass with gradients. before: the stage whose outputs it is given. shared: memory of gradients
        that go from a stage to the one before it."""
        self._inputs = self._empty(self._kinds)
        if before is not None and [Like.of(y) for y in before._outputs[:2]] == self._passed:
            self._inputs[:2] = [y.detach().requires_grad_() for y in before._outputs[:2]]
        self._statics = [tensor.detach() for tensor in self._inputs]

        def forward() -> list[Tensor]:
            with torch.enable_grad():
                self._ys = self._call(self._inputs)
            return self._ys

        self._second, ys = record(forward)
        self._outputs = [y.detach() for y in ys]
        del ys

        def memory(place: int, tensor: Tensor) -> Tensor:
            if place > 1:  # states: each its own
                return torch.zeros_like(tensor)
            kind = place, Like.of(tensor)
            if kind not in shared:
                shared[kind] = torch.zeros_like(tensor)
            return shared[kind]

        self._dys = [memory(place, self._outputs[place]) for place in self._with_gradient]
        self._wanted = [place for place, tensor in enumerate(self._inputs) if tensor.requires_grad]
        places = [place if place < len(self._passed) else 2 + place for place in self._wanted]
        self._dxs = [memory(at, self._statics[place]) for at, place in zip(places, self._wanted, strict=True)]

    def record_backward(self, record: Recorder) -> None:
        """Capture the gradients of what `record_second` has captured."""
        totals = list(self.totals.values())

        def backward() -> None:
            ys, self._ys = [self._ys[place] for place in self._with_gradient], []
            found = gradients(ys, [*(self._inputs[place] for place in self._wanted), *self._learned], self._dys)
            del ys
            if totals:
                torch._foreach_add_(totals, list(found[len(self._wanted) :]))  # type: ignore[arg-type]
            for memory, d in zip(self._dxs, found, strict=False):
                if d is None:
                    memory.zero_()
                else:
                    memory.copy_(d)

        self._backward, _ = record(backward)

    def record_first(self, before: _Stage | None, record: Recorder) -> None:
        """Capture the pass without gradients."""
        self._given = list(self._statics)  # of the second pass, which is not run meanwhile
        if before is not None and [Like.of(y) for y in before._left[:2]] == self._passed:
            self._given[:2] = before._left[:2]

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return self._call(self._given)

        self._first, self._left = record(forward)

    def first(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Replay the pass without gradients. Residual and branch lie where the next replay may overwrite them."""
        _fill(self._given, given)
        self._first.replay()
        kept = [torch.empty_like(tensor) for tensor in self._left[2:]]
        if kept:
            torch._foreach_copy_(kept, self._left[2:])
        return [*self._left[:2], *kept]

    def second(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Replay the pass with gradients. All outputs lie where the next replay may overwrite them."""
        _fill(self._statics, given)
        self._second.replay()
        return [tensor.detach() for tensor in self._outputs]

    def without_gradient(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [tensor for place, tensor in enumerate(outputs) if place not in self._with_gradient]

    def backward(self, dys: Sequence[Tensor | None], staged: Staged) -> list[Tensor | None]:
        """Replay the backward pass. The gradients of the inputs, which the next replay may overwrite."""
        staged.begin_totals(self.totals)
        _fill(self._dys, [dys[place] for place in self._with_gradient])
        self._backward.replay()
        found: list[Tensor | None] = [None] * len(self._inputs)
        for place, d in zip(self._wanted, self._dxs, strict=True):
            found[place] = d
        return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stage: _Stage, staged: Staged, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.stage, ctx.staged = stage, staged
        ctx.set_materialize_grads(False)
        outputs = stage.second(given)
        ctx.mark_non_differentiable(*stage.without_gradient(outputs))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.stage.backward(dys, ctx.staged)


class _Heard(torch.autograd.Function):
    """What a stage leaves, each with a gradient, zeros where nothing comes back, as graphs are given it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        ctx.mark_non_differentiable(*(y for y in outputs if not (y.is_floating_point() or y.is_complex())))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, ...]:
        return dys


def _tensors(states: Sequence[Any]) -> list[Tensor]:
    return [tensor for state in states for tensor in state.tensors().values()]


def _random(device: torch.device) -> list[Tensor]:
    """The state of the random numbers of the host and of a GPU."""
    return [torch.get_rng_state(), *get_device_states(torch.empty(0, device=device))[1]]


def _fill(memory: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
    """Copy what is not there already, with few launches. None are zeros."""
    to, found, zeros = [], [], []
    for static, tensor in zip(memory, given, strict=True):
        if tensor is None:
            zeros.append(static)
        elif tensor.data_ptr() != static.data_ptr():
            to.append(static)
            found.append(tensor.detach())
    if to:
        torch._foreach_copy_(to, found)
    if zeros:
        torch._foreach_zero_(zeros)
