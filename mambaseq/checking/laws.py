"""Laws 2 and 3 for mixers, backbones and whole models: what must be equal, and what must not be seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mambaseq.backbones.base import Backbone
from mambaseq.batch import Batch
from mambaseq.data.module import pack_collate, pad_collate
from mambaseq.metrics.base import Metric
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel
from mambaseq.tasks.fitting import probe_future, probe_neighbours
from mambaseq.tasks.optimizer import Schedule, reapply

LENGTH = 67


class LawBroken(AssertionError):
    """A part breaks its contract; the message says how."""


def close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 2e-6) -> None:
    """Raise LawBroken unless two tensors have the same shape and are equal by relative RMS error; integers exactly."""
    if actual.shape != expected.shape:
        raise LawBroken(f"{what}: the shape is {tuple(actual.shape)}, but must be {tuple(expected.shape)}.")
    if not (expected.is_floating_point() or expected.is_complex()):
        if not torch.equal(actual, expected):
            raise LawBroken(f"{what}: whole numbers differ.")
        return
    error = float((actual.detach() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise LawBroken(f"{what}: the relative error is {error:.1e}; rounding gives at most {tolerance:.0e}.")


def _listed(state: Any) -> list[State]:
    return state if isinstance(state, list) else [state]


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a mixer's state, or of a backbone's list of them."""
    return [tensor for one in _listed(state) for tensor in one.tensors().values()]


def select(state: Any, sequences: list[int]) -> Any:
    """The states of some sequences."""
    chosen = [one.select(torch.tensor(sequences)) for one in _listed(state)]
    return chosen if isinstance(state, list) else chosen[0]


def _bounded(part: Mixer | Backbone) -> bool:
    return all(one.bounded_state for one in (part.mixers() if isinstance(part, Backbone) else [part]))


def same_states(part: Mixer | Backbone, width: int, one: Any, other: Any, what: str = "states") -> None:
    """Compare two states: equal tensors or, for states that grow and may have spare room, equal outputs afterwards."""
    if _bounded(part):
        for left, right in zip(tensors(one), tensors(other), strict=True):
            close(left, right, what)
        return
    sequences = len(tensors(one)[0])
    more = torch.randn(sequences, 5, width, generator=torch.Generator().manual_seed(1))
    close(part(more, state=one), part(more, state=other), what)


@torch.no_grad()
def check_ways_to_run(part: Mixer | Backbone, width: int) -> None:
    """full == chunked == one step at a time == packed, outputs and states. part: a causal mixer or backbone over
    `(batch, length, width)`. Raises LawBroken."""
    x = torch.randn(2, LENGTH, width)
    full, last = part(x, return_state=True)
    close(part(x), full, "without return_state")
    for cuts in ((1, 2, LENGTH - 3), (33, LENGTH - 33), (LENGTH - 1, 1)):
        state, parts = None, []
        for piece in x.split(cuts, dim=1):
            y, state = part(piece, state=state, return_state=True)
            parts.append(y)
        close(torch.cat(parts, 1), full, f"in chunks of {cuts}")
        same_states(part, width, state, last, f"the state after chunks of {cuts}")
    state = part.init_state(2, max_length=LENGTH)
    close(torch.cat([part.step_(x[:, t : t + 1], state) for t in range(LENGTH)], 1), full, "step by step (step_)")
    same_states(part, width, state, last, "the state after steps")
    bounds = torch.tensor([0, 10, 10, LENGTH], dtype=torch.int32)
    packed, states = part(x[:1], cu_seqlens=bounds, return_state=True)
    close(packed[:, :10], part(x[:1, :10]), "the first of packed sequences (cu_seqlens)")
    second, second_state = part(x[:1, 10:], return_state=True)
    close(packed[:, 10:], second, "the last of packed sequences (cu_seqlens)")
    same_states(part, width, select(states, [2]), second_state, "the state of a packed sequence")
    same_states(part, width, select(states, [1]), part.init_state(1, max_length=5), "the state of an empty sequence")


@torch.no_grad()
def check_future(part: Mixer | Backbone, width: int) -> None:
    """A causal mixer or backbone does not see the future, and sees the present. Raises LawBroken."""
    x = torch.randn(1, 40, width)
    changed = x.clone()
    changed[:, 25] += 10
    difference = (part(x) - part(changed)).abs()
    # an FFT spreads rounding over all positions, so only rounding may differ
    if not difference[:, :25].max() <= 1e-5:
        first = int((difference[0] > 1e-5).any(-1).nonzero()[0])
        raise LawBroken(f"causal: position {first} changes with position 25, which comes after it.")
    if not difference[:, 25:].max() > 1e-3:
        raise LawBroken("causal: changing a position by 10 changes nothing, neither there nor later.")


@torch.no_grad()
def check_given_state(part: Mixer | Backbone, width: int) -> None:
    """`forward` never changes the given state, nor do steps from the one that it returned, be it after no position, and
    forks are independent. Raises LawBroken."""
    _, state = part(torch.randn(1, 9, width), return_state=True)
    before = copy.deepcopy(state)
    for length in (0, 1, 5):
        _, after = part(torch.randn(1, length, width), state=state, return_state=True)
        part.step_(torch.randn(1, 1, width), after)
    fork: Any = [one.clone() for one in state] if isinstance(state, list) else state.clone()
    part.step_(torch.randn(1, 1, width), fork)
    for now, then in zip(tensors(state), tensors(before), strict=True):
        if not torch.equal(now, then):
            raise LawBroken("states: forward, or a step of what it returned or of a copy, changed the given state.")
    if tensors(state) and all(torch.equal(a, b) for a, b in zip(tensors(fork), tensors(state), strict=True)):
        raise LawBroken("states: step_ does not change its state in place.")


@torch.no_grad()
def check_packed(part: Mixer | Backbone, width: int) -> None:
    """For a mixer or backbone without a state: packed sequences give the same as alone. Raises LawBroken."""
    x, bounds = torch.randn(1, 30, width), torch.tensor([0, 11, 30], dtype=torch.int32)
    packed = part(x, cu_seqlens=bounds)
    close(packed, torch.cat([part(x[:, :11]), part(x[:, 11:])], 1), "packed sequences (cu_seqlens)")


def run(model: SequenceModel, batch: Batch, **options: Any) -> Any:
    """A model's output over a batch, logits included."""
    with torch.no_grad():
        return model(
            batch.inputs,
            batch.targets,
            mask=batch.mask,
            condition=batch.condition,
            cu_seqlens=batch.cu_seqlens,
            return_logits=True,
            **options,
        )


def poisoned(batch: Batch) -> Batch:
    """A padded batch with values in its padding that must not be seen."""
    if batch.mask is not None:
        real = batch.mask if batch.inputs.dim() == 2 else batch.mask[..., None]
        # a real token, which every table has
        batch.inputs = torch.where(real, batch.inputs, 7.0 if batch.inputs.is_floating_point() else batch.inputs.max())
    return batch


def near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise LawBroken unless two tensors are equal up to rounding, element by element."""
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    except AssertionError as error:
        raise LawBroken(f"{what}: {' '.join(str(error).split())[:200]}") from error


def joined(model: SequenceModel, items: Sequence[Batch]) -> Iterator[tuple[str, Batch]]:
    """The sequences together, as "padded" and "packed"; not padded for a model that is neither causal nor takes a
    mask."""
    if model.takes_padding:
        yield "padded", poisoned(pad_collate(list(items)))
    yield "packed", pack_collate(list(items))


def check_joined(model: SequenceModel, items: Sequence[Batch]) -> None:
    """Sequences give the same alone, padded and packed: losses and outputs. items: batches of one, of different
    lengths. Raises LawBroken."""
    alone = [run(model, item) for item in items]
    counts = torch.stack([item.n_targets for item in items]).double()
    mean = (torch.stack([one.loss for one in alone]).double() * counts).sum() / counts.sum().clamp(min=1)
    for how, batch in joined(model, items):
        together = run(model, batch)
        near(together.loss.double(), mean, f"{how}: the loss is not the mean of the losses of single sequences")
        told = f"{how}: a sequence gives another result than alone"
        if not model.head.per_token:
            near(together.logits, torch.cat([one.logits for one in alone]), told)
        elif how == "packed":
            near(together.logits[0], torch.cat([one.logits[0] for one in alone]), told)
        elif batch.mask is not None:
            real = batch.mask[:, :: model.head.stride]
            near(together.logits[real], torch.cat([one.logits[0] for one in alone]), told)
        else:  # of one length
            near(together.logits.flatten(0, 1), torch.cat([one.logits[0] for one in alone]), told)


@torch.no_grad()
def check_encoder(model: SequenceModel, items: Sequence[Batch]) -> None:
    """An encoder sees only what it declares: of the future, of other inputs, of padding and other sequences. items: as
    in `check_joined`. Raises LawBroken, or ConfigError from the probes that a run makes."""
    encoder, first = model.encoder, items[0]
    if getattr(encoder, "causal", None) is None:
        raise LawBroken(f"{type(encoder).__name__} does not say whether it is causal. Declare causal = True or False.")
    probe_future(model, first)
    for _, batch in joined(model, items):
        probe_neighbours(model, batch)
    if getattr(encoder, "position_wise", False):
        whole = encoder(first.inputs, first.condition)
        parts = [encoder(piece, first.condition) for piece in first.inputs.split(1, dim=1)]
        close(torch.cat(parts, 1), whole, "position_wise: inputs encoded one by one", tolerance=1e-5)


@torch.no_grad()
def check_optimizer(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
    """Law 6: a new optimizer with the saved state of another continues like that one. make: makes one from groups of
    parameters. Raises LawBroken."""
    start, gradients = torch.randn(2, 3), torch.randn(4, 2, 3)

    def with_schedule(weight: torch.nn.Parameter) -> tuple[torch.optim.Optimizer, Schedule]:
        optimizer = make([{"params": [weight], "weight_decay": 0.1, "muon": False, "factor": 1.0}])
        return optimizer, Schedule(optimizer, lambda step: 1.0)

    def stepped(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, first: int, stop: int) -> None:
        for gradient in gradients[first:stop]:
            weight.grad = None

            def closure(gradient: Tensor = gradient) -> float:  # by which Lightning computes gradients
                weight.grad = gradient.clone()
                return 0.0

            optimizer.step(closure)

    one = torch.nn.Parameter(start.clone())
    optimizer, _ = with_schedule(one)
    stepped(one, optimizer, 0, 2)
    if torch.equal(one, start):
        raise LawBroken("two steps do not change a weight that has gradients once the closure of step was called.")
    for state in optimizer.state.values():
        if wrong := [name for name, value in state.items() if not isinstance(value, Tensor | int | float | None)]:
            raise LawBroken(
                f"its state {wrong[0]} is neither a tensor nor a number; a checkpoint with it cannot be read."
            )
    other = torch.nn.Parameter(one.detach().clone())
    again, schedule = with_schedule(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which would share its tensors
    reapply(again, schedule)  # as a resumed run does
    stepped(one, optimizer, 2, 4)
    stepped(other, again, 2, 4)
    if not torch.equal(one, other):
        raise LawBroken(
            "a new one with the saved state continues differently: something that its steps depend on is neither in "
            "its state nor in its groups."
        )


def check_metric(metric: Metric, model: SequenceModel, items: Sequence[Batch]) -> None:
    """A metric gives the same for sequences one by one and in a batch, returns a tensor, and is empty after a reset.
    items: as in `check_joined`. Raises LawBroken."""
    values = []
    for batches in (items, [batch for _, batch in joined(model, items)][:1], items):
        metric.reset()
        for batch in batches:
            metric.update(run(model, batch), batch)
        value = metric.compute()
        if not isinstance(value, Tensor) or (metric.scalar and value.numel() != 1):
            raise LawBroken(
                f"compute() gives {str(value)[:80]}; it must be a tensor, with one number if scalar is True."
            )
        values.append(value.double())
    for other, told in ((values[2], "after reset() the number differs"), (values[1], "it depends on the batches")):
        if not torch.allclose(values[0], other, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise LawBroken(f"{told}: {values[0].tolist()} and {other.tolist()}. Accumulate sums and counts.")
