"""Training over sequences whose activations do not fit into memory: one chunk of time after another, with exact
gradients.

In the forward pass the layers run over one chunk at a time and pass their states on; only the input, the output and the
states between chunks are kept. In the backward pass the chunks are run again from the last to the first, each from its
initial state; the gradient of its final state comes from the next chunk. This is checkpointing (Chen et al.,
arXiv:1604.06174) along time. Memory a token is that of input, output and their gradients, `batch x length x d_model`
each, for any number of layers, plus the activations of one chunk. The cost is the time of one more forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from mambaseq.backbones.graphed import in_place_of
from mambaseq.backbones.relay import Bundles, Relay
from mambaseq.backbones.staged import ChunkGraphs, Staged
from mambaseq.errors import ConfigError
from mambaseq.ops import sequences
from mambaseq.parallel import Part
from mambaseq.parallel.pieces import Piece, cut

# (x, states or None, cu_seqlens, return_state) → (y, states)
Run = Callable[[Tensor, list[Any] | None, Tensor | None, bool], tuple[Tensor, list[Any]]]


class _Own(NamedTuple):
    """A piece of a rank's row, `begin` to `end`. For the job nothing is carried from one to the next, since a relay
    hands states on. Sequences that begin here are `entering` among those that begin on the rank, those that end here
    are numbers `first` and up among those that end on it."""

    begin: int
    end: int
    first: int
    finished: int
    entering: slice
    segments: slice
    carried_in: int = 0
    carried_out: int = 0


def plan(length: int, chunk_length: int, batch: int, bounds: list[int] | None = None) -> list[Piece]:
    """The chunks of `batch` rows of this length, or of one row of packed sequences (see `cut`)."""
    return cut([*range(0, length, chunk_length), length], batch, bounds)


def _own(part: Part) -> list[_Own]:
    """The pieces of a rank's row."""
    found: list[_Own] = []
    at = first = begun = segment = 0
    for number in part.mine:
        piece = part.pieces[number]
        begin, at = at, at + piece.end - piece.begin
        entering = slice(begun, begun := begun + piece.stop - piece.first - piece.carried_in)
        segments = slice(segment, segment := segment + piece.stop - piece.first)
        found.append(_Own(begin, at, first, piece.finished, entering, segments))
        first += piece.finished
    return found


class _Layout(NamedTuple):
    """The names of the tensors in a list of states, to make states from tensors again."""

    kinds: list[tuple[type, list[str]]]

    @classmethod
    def of(cls, states: list[Any]) -> _Layout:
        return cls([(type(state), list(state.tensors())) for state in states])

    def states(self, tensors: Sequence[Tensor]) -> list[Any]:
        remaining = iter(tensors)
        return [kind(**{name: next(remaining) for name in names}) for kind, names in self.kinds]


def _tensors(states: list[Any]) -> list[Tensor]:
    return [tensor for state in states for tensor in state.tensors().values()]


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class _Surroundings:
    """The current autocast and random state, to run a chunk again in the same way.

    Autocast's cache is off: a later call that needs gradients must not find weights there that were cast without them,
    and weights cast only once would accumulate the gradients of all chunks in half precision.
    """

    def __init__(self, x: Tensor) -> None:
        self.device_type = x.device.type
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys([self.device_type, "cpu"])
            if torch.amp.is_autocast_available(kind)
        ]

    @contextlib.contextmanager
    def casting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def with_random(self, random: Any) -> Iterator[None]:
        cpu, devices, states = random
        with torch.random.fork_rng(devices, device_type=self.device_type if devices else "cuda"):
            torch.set_rng_state(cpu)
            set_device_states(devices, states, device_type=self.device_type)
            yield


def _random_state(x: Tensor) -> Any:
    return torch.get_rng_state(), *get_device_states(x)


@dataclasses.dataclass
class _Job:
    """One call: what is run, the chunks, and what a backward pass needs besides tensors."""

    run: Run
    init_state: Callable[[int], list[Any]]
    # each parameter's module, its name there, and its number
    places: list[tuple[nn.Module, str, int]]
    chunks: Sequence[Piece | _Own]
    return_state: bool
    surroundings: _Surroundings
    layout: _Layout | None = None
    # of each chunk, where sequences are split over ranks
    relays: list[Relay] | None = None
    # what replays chunks, where that may be
    staged: Staged | None = None
    random: list[Any] = dataclasses.field(default_factory=list)

    def entering(self, chunk: Piece | _Own, given: Sequence[Tensor], carried: Sequence[Tensor]) -> list[Tensor] | None:
        """The states that a chunk starts from, None for empty histories only."""
        new = [tensor[chunk.entering] for tensor in given]
        if isinstance(chunk, _Own) or not chunk.carried_in:
            return new or None
        begun = chunk.stop - chunk.first - chunk.carried_in
        if not begun:
            return list(carried)
        if not new:
            new = _tensors(self.init_state(begun))
        return [torch.cat([old, more.to(old)]) for old, more in zip(carried, new, strict=True)]  # (sequences, ...)

    def run_chunk(
        self, chunk: Piece | _Own, x: Tensor, states: list[Tensor] | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """y of a chunk and the states of all its sequences, which are left out if they are not needed."""
        wanted = self.return_state or bool(chunk.carried_out)
        if cu_seqlens is not None:
            within = chunk.segments if isinstance(chunk, _Own) else slice(chunk.first, chunk.stop)
            inside = cu_seqlens[within.start : within.stop + 1] - chunk.begin
            cu_seqlens = inside.clamp(0, chunk.end - chunk.begin)
        old = None if states is None or self.layout is None else self.layout.states(states)
        with self.surroundings.casting():
            y, new = self.run(x, old, cu_seqlens, wanted)
        if not wanted:
            return y, []
        if self.layout is None:
            self.layout = _Layout.of(new)
        return y, _tensors(new)

    def holding(
        self, parameters: Sequence[Tensor] = (), totals: list[Tensor | None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """See `Staged`."""
        return contextlib.nullcontext() if self.staged is None else self.staged.holding(parameters, totals)

    def running(self, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """See `Staged`."""
        return contextlib.nullcontext() if self.staged is None else self.staged.running(x)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, given: Sequence[Tensor], keep: bool
    ) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """y, the final states if they are returned, and with `keep` the states passed to each chunk."""
        y: Tensor | None = None
        carried: list[Tensor] = []
        kept: list[list[Tensor]] = []
        finished: list[list[Tensor]] = []
        for index, chunk in enumerate(self.chunks):
            if keep:
                kept.append(carried)
                self.random.append(_random_state(x))
            x_chunk = x[:, chunk.begin : chunk.end]
            with (
                contextlib.nullcontext() if self.relays is None else self.relays[index].running(),
                self.running(x_chunk),
            ):
                part, states = self.run_chunk(chunk, x_chunk, self.entering(chunk, given, carried), cu_seqlens)
            if y is None:
                y = part.new_empty(*x.shape[:2], *part.shape[2:])
            y[:, chunk.begin : chunk.end] = part
            if self.return_state and (chunk.finished or self.relays is not None):
                finished.append([tensor[: chunk.finished] for tensor in states])
            # a copy if this is a part of a larger tensor, which would be kept alive
            carried = [tensor[chunk.finished :] for tensor in states] if chunk.carried_out else []
            if chunk.finished:
                carried = [tensor.clone() for tensor in carried]
        assert y is not None
        return y, [torch.cat(parts) for parts in zip(*finished, strict=True)], kept  # states (sequences, ...)

    def with_parameters(self, leaves: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """The module with other tensors in place of its parameters: hooks of the parameters must see only the sum over
        all chunks."""
        return in_place_of([(module._parameters, name, leaves[index]) for module, name, index in self.places])


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _Job, x: Tensor, cu_seqlens: Tensor | None, n_given: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given, parameters = tensors[:n_given], tensors[n_given:]
        with job.holding():
            y, final, kept = job.forward(x, cu_seqlens, given, keep=True)
        ctx.job, ctx.n_given, ctx.sizes = job, n_given, [len(states) for states in kept]
        ctx.save_for_backward(x, cu_seqlens, *given, *parameters, *(t for states in kept for t in states))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(tensor for tensor in final if not _differentiable(tensor)))
        return y, *final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        x, cu_seqlens, *others = ctx.saved_tensors
        n_given, n_parameters = ctx.n_given, len(ctx.needs_input_grad) - 4 - ctx.n_given
        given, parameters = others[:n_given], others[n_given : n_given + n_parameters]
        kept = iter(others[n_given + n_parameters :])
        carried = [[next(kept) for _ in range(size)] for size in ctx.sizes]
        leaves = [p.detach().requires_grad_() for p in parameters]
        wants_x, wants_given = ctx.needs_input_grad[1], ctx.needs_input_grad[4 : 4 + n_given]

        dx = torch.zeros_like(x) if wants_x else None
        dparameters: list[Tensor | None] = [None] * n_parameters
        dgiven: list[list[Tensor]] = [[] for _ in given]
        dcarried: list[Tensor | None] = []
        with job.holding(parameters, dparameters):
            for index in range(len(job.chunks) - 1, -1, -1):
                chunk = job.chunks[index]
                x_chunk = x[:, chunk.begin : chunk.end].detach()
                replays = job.staged is not None and job.staged.replays(x_chunk)
                # with a relay, so that every layer hands its gradient on; with graphs, which always give one
                x_chunk.requires_grad_(wants_x or job.relays is not None or job.staged is not None)
                entering = job.entering(chunk, given, carried[index])
                states = None if entering is None else [t.detach().requires_grad_(_differentiable(t)) for t in entering]
                with (
                    torch.enable_grad(),
                    job.with_parameters(leaves),
                    contextlib.nullcontext() if replays else job.surroundings.with_random(job.random[index]),
                    contextlib.nullcontext() if job.relays is None else job.relays[index].again(),
                    job.running(x_chunk),
                ):
                    y, left = job.run_chunk(chunk, x_chunk, states, cu_seqlens)
                    doutputs = [
                        None if dy is None else dy[:, chunk.begin : chunk.end],
                        *(_joined(*three, chunk) for three in itertools.zip_longest(left, dfinal, dcarried)),
                    ]
                    found = _gradients([y, *left], doutputs, [x_chunk, *leaves, *(states or [])])
                del y, left, x_chunk, states, doutputs
                if dx is not None and found[0] is not None:
                    dx[:, chunk.begin : chunk.end] = found[0]
                _accumulate(dparameters, found[1 : 1 + n_parameters])
                dstates = found[1 + n_parameters :]
                dcarried = [None if d is None else d[: chunk.carried_in] for d in dstates] if chunk.carried_in else []
                for parts, wanted, tensor, d in zip(dgiven, wants_given, given, dstates, strict=False):
                    if wanted:
                        new = tensor[chunk.entering]
                        parts.append(torch.zeros_like(new) if d is None else d[chunk.carried_in :])
                del found, dstates  # before another chunk is run
            if job.staged is not None:
                dparameters = job.staged.given_out(dparameters)
        return (
            None,
            dx,
            None,
            None,
            *(torch.cat(parts[::-1]) if parts else None for parts in dgiven),
            *(None if d is None else d.to(p.dtype) for d, p in zip(dparameters, parameters, strict=True)),
        )


def _joined(state: Tensor, dfinal: Tensor | None, rest: Tensor | None, chunk: Piece | _Own) -> Tensor | None:
    """The gradient of a chunk's states: of the sequences that ended in it, and of those that continue."""
    if dfinal is None and rest is None:
        return None
    ended, going = state[: chunk.finished], state[chunk.finished :]
    return torch.cat(
        [
            torch.zeros_like(ended) if dfinal is None else dfinal[chunk.first :][: chunk.finished],
            torch.zeros_like(going) if rest is None else rest,
        ]
    )


def _gradients(
    outputs: list[Tensor], doutputs: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """`torch.autograd.grad` without inputs and outputs that have no gradient."""
    known = [(y, d) for y, d in zip(outputs, doutputs, strict=True) if d is not None and y.requires_grad]
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if known and wanted:
        ys, ds = zip(*known, strict=True)
        for index, d in zip(
            wanted, torch.autograd.grad(ys, [inputs[i] for i in wanted], ds, allow_unused=True), strict=True
        ):
            found[index] = d
    return found


def _accumulate(totals: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Add in place, at least in fp32."""
    found: list[Tensor] = []
    added: list[Tensor] = []
    for index, d in enumerate(more):
        if d is not None:
            total = totals[index]
            if total is None:
                totals[index] = d.to(torch.promote_types(d.dtype, torch.float32), copy=True)
            else:
                found.append(total)
                added.append(d)
    if found:
        torch._foreach_add_(found, added)  # on a GPU one kernel for many


def _check_whole(parameters: Sequence[Tensor]) -> None:
    """Refuse sharded parameters: leaf tensors replace the parameters, and if a wrapper gathers a layer's shards, they
    would stay shards."""
    for parameter in parameters:
        if type(parameter) not in (Tensor, nn.Parameter):
            raise ConfigError(
                f"chunk_length cannot train layers that are sharded one by one (a parameter is a "
                f"{type(parameter).__name__}): train with whole copies (ddp), or without chunk_length."
            )


@torch.compiler.disable
def run_in_chunks(
    module: nn.Module,
    run: Run,
    init_state: Callable[[int], list[Any]],
    x: Tensor,
    state: list[Any] | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    chunk_length: int,
    bundles: Bundles | None = None,
    graphs: ChunkGraphs | None = None,
) -> tuple[Tensor, list[Any]]:
    """`run(x, state, cu_seqlens, return_state)`, over `chunk_length` positions at a time.

    Outputs, states and gradients are those of the one call, up to rounding. `run` must be causal, and its states
    (`State`), with the sequence as first dimension, must be all that it remembers. It is called again in the backward
    pass, with the same autocast and random numbers. Everything learned must be an input of it or a parameter of
    `module`. There are no second derivatives. `torch.compile` leaves the graph here.

    module: what `run` computes with. init_state: n → states of n empty histories. x `(batch, length, d_model)`, any
        float dtype; cu_seqlens `(sequences + 1,)`, whose values are read on the host once (waiting for the GPU), since
        they decide how sequences are cut. bundles: x is a rank's part of split sequences, whose pieces are the chunks.
        graphs: replay chunks from these; for a `run` that calls the module's `_through` once.
        Raises ValueError for states of another number of sequences, and ConfigError for gradients of parameters that
        are shards, as FSDP's of single layers are.
    """
    batch, length = x.shape[:2]
    bounds = None
    if cu_seqlens is not None:
        sequences.check(cu_seqlens, batch, length)
        bounds = sequences.offsets(cu_seqlens, length)
    given = [] if state is None else _tensors(state)
    chunks: Sequence[Piece | _Own]
    if bundles is None:
        n_given = batch if bounds is None else len(bounds) - 1
        chunks, relays = plan(length, chunk_length, batch, bounds), None
    else:
        part = bundles.part
        n_given = len(part.entering)
        chunks, relays = _own(part), [Relay(part, number, keeps=True, bundles=bundles) for number in part.mine]
    for tensor in given:
        if tensor.shape[:1] != (n_given,):
            raise ValueError(f"A state is {tuple(tensor.shape)}, but there are {n_given} sequences.")
    parameters = [p for p in module.parameters() if p.requires_grad]
    numbers = {id(p): index for index, p in enumerate(parameters)}
    job = _Job(
        run,
        init_state,
        [
            (owner, name, numbers[id(p)])
            for owner in module.modules()
            for name, p in owner._parameters.items()
            if id(p) in numbers
        ],
        chunks,
        return_state,
        _Surroundings(x),
        None if state is None else _Layout.of(state),
        relays=relays,
    )
    if torch.is_grad_enabled() and (bundles is not None or any(t.requires_grad for t in (x, *given, *parameters))):
        _check_whole(parameters)
        if graphs is not None and cu_seqlens is None:
            lengths = [chunk.end - chunk.begin for chunk in chunks]
            width = None if bundles is None else bundles.width
            autocast, casting = tuple(job.surroundings.autocast), job.surroundings.casting
            job.staged = graphs.begin(module, x, lengths, autocast, casting, width)
        if bundles is not None and not x.requires_grad:  # on every rank alike: others wait for gradients
            x = x.detach().requires_grad_()
        y, *final = _InChunks.apply(job, x, cu_seqlens, len(given), *given, *parameters)
    else:
        y, final, _ = job.forward(x, cu_seqlens, given, keep=False)
    if not return_state:
        return y, []
    assert job.layout is not None
    return y, job.layout.states(final)
