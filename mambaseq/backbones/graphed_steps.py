"""Replays training steps from CUDA graphs, a pair (forward, backward) for each shape of input, because kernels of small
models are shorter than their launches.

A pair's activations are in its own memory, those of one forward pass at a time: another forward pass before its
backward runs without the graph. Everything that leaves a pair (output, gradients) is copied out of that memory.

Where several processes sum their gradients, a step is several pairs, of neighbouring layers, in one memory: the
gradients of one are then on their way while the backward pass of the one before it is replayed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mambaseq.backbones.automatic import has_others
from mambaseq.backbones.graphed import (
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
from mambaseq.ops.gpu.capture import Recorder

Run = Callable[[Tensor], Tensor]


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

    places: of parameters, memory of their size where gradients are wanted, say where processes sum them. Each is taken
    by one gradient: another of the same backward pass, of other graphs, would overwrite it before both are added.
    Whatever reads a gradient there must be done before the place is given again.
    """

    def __init__(self, automatic: bool = False) -> None:
        super().__init__(automatic)
        self.places: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

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
        return step(None if self._policy is None else run, x, learned, self.places)


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

    def __call__(
        self, again: Run | None, x: Tensor, learned: Sequence[nn.Parameter], places: MutableMapping[Tensor, Tensor]
    ) -> Tensor:
        passed: Sequence[Tensor] = [x]
        for pair, of in zip(self.pairs, self._learned_of, strict=True):
            passed = _Replay.apply(pair, again, places, *passed, *(learned[place] for place in of))
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
            found = [None if d is None else d.detach() for d in gradients(ys, wanted, self._dys)]
            first = len(found) - len(self._leaves)
            return [*found[:first], *map(_laid_out_as, found[first:], self._leaves)]

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

    def backward(
        self, dys: Sequence[Tensor | None], turn: _Turn, places: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradients of the inputs, and those of the parameters, each in its place of `places` if it has one."""
        turn.over = True
        for memory, place in zip(self._dys, self._places, strict=True):
            _fill(memory, dys[place])
        self._backward.replay()
        # copies, with few launches: otherwise the next replay would overwrite `.grad`
        wanted = (place for place, has in zip(places, self._has_gradient, strict=True) if has)
        found = [_place_of(d, place) for d, place in zip(self._gradients, wanted, strict=True)]
        if found:
            torch._foreach_copy_(found, self._gradients)
        copies = iter(found)
        dxs = [None if dx is None else dx.clone() if self.is_first else dx.detach() for dx in self._dxs]
        return dxs, [next(copies) if has else None for has in self._has_gradient]


def _cut_off(ys: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, as leaves."""
    return [y.detach().requires_grad_(y.requires_grad) for y in ys]


def _laid_out_as(d: Tensor | None, leaf: Tensor) -> Tensor | None:
    """A gradient with its parameter's strides, without which autograd would copy it once more."""
    return d if d is None or d.stride() == leaf.stride() else torch.empty_like(leaf).copy_(d)


def _place_of(d: Tensor, place: Tensor | None) -> Tensor:
    """Memory for a copy of a gradient: a place that is just like it, or new memory."""
    if place is None or (place.shape, place.stride(), place.dtype, place.device) != (
        d.shape,
        d.stride(),
        d.dtype,
        d.device,
    ):
        return torch.empty_like(d)
    return place.detach()  # a tensor of its own, which autograd takes as `.grad` without a copy


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
    def forward(
        ctx: Any, pair: _Pair, again: Run | None, places: MutableMapping[Tensor, Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """tensors: inputs, then parameters. again: of a step with one part; recomputes the activations if they are gone
        or second derivatives are wanted. places: where gradients are wanted."""
        ctx.set_materialize_grads(False)
        given, parameters = tensors[: pair.n_inputs], tensors[pair.n_inputs :]
        # the backward pass reads the parameters; autograd checks that they are unchanged
        ctx.save_for_backward(given[0] if again is not None else None, *parameters)
        ctx.pair, ctx.again, ctx.places = pair, again, places
        ys, ctx.turn = pair.forward(given)
        ctx.mark_non_differentiable(*pair.without_gradient(ys))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        if all(dy is None for dy in dys):
            return (None,) * (3 + ctx.pair.n_inputs + len(parameters))
        dxs: Sequence[Tensor | None]
        if ctx.pair.holds(ctx.turn) and not torch.is_grad_enabled():
            # what was accumulated before may lie in the same place
            places = [ctx.places.pop(p, None) if p.grad is None else None for p in parameters]
            dxs, found = ctx.pair.backward(dys, ctx.turn, places)
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
        return (None, None, None, *dxs, *found)


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
