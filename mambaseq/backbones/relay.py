"""Residual layers over a piece of sequences that are split along time: the states that each layer leaves are handed to
the rank with the next piece, and their gradients come back (see `mambaseq.parallel`).

In a graph, receiving and sending are nodes through which the residual stream passes. So in the backward pass they run
in the one order that the layers have, on every rank: a layer's gradient begins with that of the states it sent, and
ends with sending that of the states it received.

Where a rank has piece after piece, the states of several layers go in one message (`Bundles`). For a host must start
all kernels of a piece in the time in which a GPU runs them, and messages are dear to start; and a GPU that sends one
holds some of its processors until another has room for it, which a few messages of a piece always find.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.backbones.pooling import Way
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.growing import GrowingState
from mambaseq.parallel import Part
from mambaseq.parallel.context import Like
from mambaseq.parallel.ends import Ends

_RELAY: contextvars.ContextVar[Relay | None] = contextvars.ContextVar("relay", default=None)
# (branch, residual, state, return_state) → (branch, residual, state)
RunLayer = Callable[[Tensor | None, Tensor, Any, bool], tuple[Tensor, Tensor, Any]]
# the same of layers that follow each other, with a list of states
RunLayers = Callable[[Tensor | None, Tensor, list[Any], bool], tuple[Tensor, Tensor, list[Any]]]


# whose states are handed on
Owner = Mixer | Way


def current() -> Relay | None:
    """The relay of the piece that is being run."""
    return None if torch.compiler.is_compiling() else _RELAY.get()


class _Known(NamedTuple):
    """What arrives for a layer: states like this one, of empty histories, and what is sent of them; see `_wide`."""

    like: Any
    kinds: list[Like]
    wide: bool


class Bundles:
    """Which layers' states go in one message, between pieces that ranks run one after the other: of L layers and N
    ranks L // 2N. The last rank is then half a piece behind the first, which has another half to spare before it waits
    for the last.

    owners: of the states, in the order in which they run. x: the input of a rank's pieces.
    """

    def __init__(self, part: Part, owners: Iterable[Owner], x: Tensor) -> None:
        self.part = part
        n = part.batch if part.bounds is None else 1
        self.known: list[_Known] = []  # of each layer that has states
        for owner in owners:
            if not owner.position_wise:
                like, wide = owner.init_state(n, device=x.device), _wide(owner, x)
                self.known.append(_Known(like, [_kind(tensor, wide) for tensor in like.tensors().values()], wide))
        self.width = max(1, len(self.known) // (2 * part.context.size))

    def kinds(self, number: int) -> list[list[Like]]:
        """What is sent of each layer of a message that begins with this one."""
        return [known.kinds for known in self.known[number : number + self.width]]

    def ends(self, number: int) -> bool:
        """Whether this layer is the last of its message."""
        return (number + 1) % self.width == 0 or number == len(self.known) - 1


class Relay:
    """Hands on the states of piece `index` of a part.

    keeps: remember what is received, for `again`: the same piece run again, with gradients. Then nothing is sent or
    received but gradients. backwards: time runs from the last piece to the first. gathers: nothing is handed on; all
    ranks run a layer at once, from what each says of its piece (see `mambaseq.parallel.ends`). bundles: of what is
    sent, if ranks have several pieces; a message a layer without.
    """

    def __init__(
        self,
        part: Part,
        index: int,
        keeps: bool = False,
        backwards: bool = False,
        gathers: bool = False,
        bundles: Bundles | None = None,
    ) -> None:
        self.context, self.backwards = part.context, backwards
        self._part = part if gathers else None
        piece, size = part.pieces[index], part.context.size
        before, after = (index - 1) % size, (index + 1) % size
        n = self._n = piece.stop - piece.first
        # which of the piece's sequences come from another one, and which go on to another
        self._arriving, self._leaving = slice(0, piece.carried_in), slice(n - piece.carried_out, n)
        arrive, leave = piece.carried_in, piece.carried_out
        if backwards:
            before, after, arrive, leave = after, before, leave, arrive
            self._arriving, self._leaving = self._leaving, self._arriving
        self.source, self.target = before if arrive else None, after if leave else None
        self._arrive, self._finished = arrive, slice(0, n - leave)
        self._keeps, self._kept = keeps, list[list[Tensor]]()
        self._replayed: Iterator[list[Tensor]] | None = None
        self._fillers = 0
        self._bundles = bundles
        # how many layers with states were run; of bundles, what is for later layers, and what earlier ones left
        self._number = 0
        self._come, self._going = collections.deque[list[Tensor]](), list[Tensor]()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Layers are run for this piece."""
        self._number = 0
        token = _RELAY.set(self)
        try:
            yield
        finally:
            _RELAY.reset(token)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The layers are run again, from what was received the first time."""
        self._replayed = iter(self._kept)
        try:
            with self.running():
                yield
        finally:
            self._replayed = None

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Rows have one more sequence at their end, from an empty history, of which nobody hears."""
        self._fillers += 1
        try:
            yield
        finally:
            self._fillers -= 1

    @property
    def gathers(self) -> bool:
        return self._part is not None

    def around(self, layer: Any) -> Callable[..., Any]:
        """The layer, as it is to be run (again, too)."""
        if self._part is None or layer.mixer.position_wise:
            return layer
        return functools.partial(Ends(self._part).call, layer)

    def stages(self, layers: Iterable[Any]) -> list[list[Any]]:
        """Layers that follow each other between messages: where states of several share one, those up to the last of
        a message; a layer by itself without."""
        if self._bundles is None:
            return [[layer] for layer in layers]
        number, stages, stage = self._number, list[list[Any]](), list[Any]()
        for layer in layers:
            stage.append(layer)
            if not layer.mixer.position_wise:
                if self._bundles.ends(number):
                    stages.append(stage)
                    stage = []
                number += 1
        return [*stages, stage] if stage else stages

    def run(
        self,
        mixer: Owner,
        layer: RunLayer,
        branch: Tensor | None,
        residual: Tensor,
        given: Any,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """A layer over this piece. given: states of the sequences that begin in it, or None. The state returned, if it
        is wanted, is that of the sequences that end in it."""

        def layers(
            branch: Tensor | None, residual: Tensor, states: list[Any], wanted: bool
        ) -> tuple[Tensor, Tensor, list[Any]]:
            branch, residual, new = layer(branch, residual, states[0], wanted)
            return branch, residual, [new]

        branch, residual, states = self.run_stage([mixer], layers, branch, residual, [given], return_state)
        return branch, residual, states[0]

    def run_stage(
        self,
        mixers: Sequence[Owner],
        layers: RunLayers,
        branch: Tensor | None,
        residual: Tensor,
        given: list[Any],
        return_state: bool,
    ) -> tuple[Tensor, Tensor, list[Any]]:
        """One of `stages`, as `run`."""
        first = self._number
        numbers = {at: first + n for n, at in enumerate(i for i, one in enumerate(mixers) if not one.position_wise)}
        self._number += len(numbers)
        if not numbers or (self.source is None and self.target is None and not self._fillers):
            return layers(branch, residual, given, return_state)
        if self._part is not None:
            if given[0] is not None and self._arrive:  # room for what is gathered
                given = [_together(mixers[0].init_state(self._arrive, device=residual.device), given[0])]
            branch, residual, new = layers(branch, residual, given, return_state)
            return branch, residual, [_some(new[0], self._finished) if return_state else None]
        states = list(given)
        for at, number in numbers.items():
            carried = None
            if self.source is not None:
                branch, residual, carried = self._receive(number, mixers[at], branch, residual)
            states[at] = self._entering(mixers[at], carried, given[at])
            if self._fillers and states[at] is not None:
                more = mixers[at].init_state(self._fillers, device=residual.device)
                states[at] = _together(states[at], more)
        branch, residual, new = layers(branch, residual, states, return_state or self.target is not None)
        if self.target is not None:
            for at, number in numbers.items():
                wide = self._is_wide(number, mixers[at], residual)
                branch = self._send(number, branch, _some(new[at], self._leaving), wide)
        if not return_state:
            return branch, residual, [None] * len(mixers)
        return branch, residual, [_some(one, self._finished) if at in numbers else one for at, one in enumerate(new)]

    def _is_wide(self, number: int, mixer: Owner, residual: Tensor) -> bool:
        return _wide(mixer, residual) if self._bundles is None else self._bundles.known[number].wide

    def _receive(
        self, number: int, mixer: Owner, branch: Tensor | None, residual: Tensor
    ) -> tuple[Tensor | None, Tensor, Any]:
        assert self.source is not None
        room = None
        if not mixer.bounded_state:
            # its size depends on what came before
            (numbers,) = self.context.receive([Like((2,), torch.int64)], self.source, residual.device, self.backwards)
            room = numbers.tolist()
        if self._bundles is None:
            like = mixer.init_state(self._arrive, None if room is None else room[0], device=residual.device)
            wide = self._is_wide(number, mixer, residual)
            bundle = [[_kind(tensor, wide) for tensor in like.tensors().values()]]
        else:
            like, bundle = self._bundles.known[number].like, self._bundles.kinds(number)
        if not self._come:
            kinds = [kind for one in bundle for kind in one]
            passed = [residual] if branch is None else [residual, branch]
            if torch.is_grad_enabled():
                anchor = residual.new_zeros(0).requires_grad_()
                outputs = _Receive.apply(self, kinds, anchor, *passed)
                residual, *others = outputs[: len(passed)]
                branch = others[0] if others else None
                found = iter(outputs[len(passed) :])
            else:
                found = iter(self.received(kinds, residual.device))
            self._come += [[next(found) for _ in one] for one in bundle]
        state = _with(like, self._come.popleft())
        if room is not None:
            state.longest = room[1]
        return branch, residual, state

    def _send(self, number: int, branch: Tensor, state: Any, wide: bool) -> Tensor:
        assert self.target is not None
        self._going += [tensor.to(_kind(tensor, wide).dtype) for tensor in state.tensors().values()]
        if self._bundles is not None and not self._bundles.ends(number):
            return branch
        tensors, self._going = self._going, []
        if isinstance(state, GrowingState):
            numbers = torch.tensor([state.capacity, state.longest], device=branch.device)
            self.context.send([numbers], self.target, self.backwards)
        if torch.is_grad_enabled():
            sent: Tensor = _Send.apply(self, branch.new_zeros(0).requires_grad_(), branch, *tensors)
            return sent
        self.sent(tensors)
        return branch

    def received(self, kinds: list[Like], device: torch.device) -> list[Tensor]:
        """The tensors that the rank with the piece before has sent."""
        if self._replayed is not None:
            return next(self._replayed)
        assert self.source is not None
        tensors = self.context.receive(kinds, self.source, device, self.backwards)
        if self._keeps:
            self._kept.append(tensors)
        return tensors

    def sent(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the rank with the piece after."""
        if self._replayed is None:
            assert self.target is not None
            self.context.send(tensors, self.target, self.backwards)

    def _entering(self, mixer: Owner, carried: Any, given: Any) -> Any:
        """The states of all sequences of the piece: of those that go on in it, and of those that begin."""
        begun = self._n - self._arrive
        if carried is None or not begun:
            return given if carried is None else carried
        if given is None:
            growing = isinstance(carried, GrowingState)
            device = next(iter(carried.tensors().values())).device
            given = mixer.init_state(begun, carried.capacity if growing else None, device=device)
        # the one that comes from the piece behind is the last
        return _together(given, carried) if self.backwards else _together(carried, given)


def _wide(mixer: Owner, residual: Tensor) -> bool:
    """Whether states are float64, as where the mixer computes in it."""
    first = next(mixer.parameters(), residual)
    return torch.float64 in (first.dtype, residual.dtype)


def _kind(tensor: Tensor, wide: bool) -> Like:
    """What is sent of a state's tensor: accumulators are fp32 on every rank, or wider where all is computed so, or
    where they always are, as angles that add up."""
    dtype = tensor.dtype
    if dtype.is_complex:
        dtype = torch.promote_types(dtype, torch.complex128 if wide else torch.complex64)
    elif dtype.is_floating_point:
        dtype = torch.promote_types(dtype, torch.float64 if wide else torch.float32)
    return Like(tuple(tensor.shape), dtype)


def _some(state: Any, rows: slice) -> Any:
    return state.map(lambda tensor: tensor if rows == slice(0, len(tensor)) else tensor[rows])


def _with(like: Any, tensors: Sequence[Tensor]) -> Any:
    """A state as another one, of these tensors."""
    remaining = iter(tensors)
    return like.map(lambda _: next(remaining))


def _together(one: Any, other: Any) -> Any:
    """The states of both one's sequences and the other's."""
    if isinstance(one, GrowingState):
        one, other = dataclasses.replace(one), dataclasses.replace(other)  # whose tensors may be replaced
        room = max(one.capacity, other.capacity)
        one.reserve_(room)
        other.reserve_(room)
        one.longest = max(one.longest, other.longest)
    parts, more = one.tensors(), other.tensors()
    joined: list[Tensor] = []
    for name, tensor in parts.items():
        dtype = torch.promote_types(tensor.dtype, more[name].dtype)
        joined.append(torch.cat([tensor.to(dtype), more[name].to(dtype)]))  # (sequences, ...)
    return _with(one, joined)


def _has_gradient(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


class _Receive(torch.autograd.Function):
    """The states that the rank before has left, beside tensors that pass through. The anchor has a gradient, so that
    the states have one whatever passes."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, kinds: list[Like], anchor: Tensor, *passed: Tensor) -> tuple[Tensor, ...]:
        tensors = relay.received(kinds, passed[0].device)
        ctx.relay, ctx.kinds, ctx.n, ctx.device = relay, kinds, len(passed), passed[0].device
        ctx.set_materialize_grads(False)
        # a view, for a tensor that was kept is given out again
        tensors = [tensor.view_as(tensor) for tensor in tensors]
        ctx.mark_non_differentiable(*(tensor for tensor in tensors if not _has_gradient(tensor.dtype)))
        return (*(tensor.view_as(tensor) for tensor in passed), *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        gradients = [
            torch.zeros(kind.shape, dtype=kind.dtype, device=ctx.device) if one is None else one
            for one, kind in zip(d[ctx.n :], ctx.kinds, strict=True)
            if _has_gradient(kind.dtype)
        ]
        if gradients:
            ctx.relay.context.send(gradients, ctx.relay.source, back=not ctx.relay.backwards)
        return None, None, None, *d[: ctx.n]


class _Send(torch.autograd.Function):
    """Sends states; the branch passes through."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, anchor: Tensor, branch: Tensor, *tensors: Tensor) -> Tensor:
        relay.sent(tensors)
        ctx.relay, ctx.kinds, ctx.device = relay, [Like.of(tensor) for tensor in tensors], branch.device
        ctx.set_materialize_grads(False)
        return branch.view_as(branch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor | None) -> tuple[Any, ...]:
        kinds = [kind for kind in ctx.kinds if _has_gradient(kind.dtype)]
        context, target, back = ctx.relay.context, ctx.relay.target, not ctx.relay.backwards
        found = iter(context.receive(kinds, target, ctx.device, back) if kinds else [])
        return None, None, d, *(next(found) if _has_gradient(kind.dtype) else None for kind in ctx.kinds)
