"""Every target counts alike: gradients are those of one big batch, whatever batches, packs, accumulation and processes
it was cut into, and a loss over a set is a mean over its targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tasks.ragged import HEADS, Ragged, expected, model_of, step_on_two_processes, train

from mambaseq.batch import Batch
from mambaseq.data.module import pack_collate, pad_collate
from mambaseq.tasks.task import LengthWarmup

LENGTHS = [5, 40, 3, 17]


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= 1e-5, (name, float(error))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (1, 4), (2, 2)])
def test_gradients_are_those_of_one_big_batch(head: str, pack: bool, size: int, accumulate: int) -> None:
    data = Ragged(head, LENGTHS)
    task, _ = train(data, head, loader={"batch_size": size, "pack": pack}, accumulate_grad_batches=accumulate)
    (found,) = task.seen
    close(found, expected(model_of(head), pad_collate(data.train())))


def test_packs_of_different_sizes() -> None:
    """Two packs, of 145 and of 509 targets."""
    data = Ragged("lm", [145, 509])
    task, _ = train(data, "lm", loader={"batch_size": 1, "pack": True}, accumulate_grad_batches=2)
    close(task.seen[0], expected(model_of("lm"), pack_collate(data.train())))


class Stream(torch.utils.data.IterableDataset):
    """Items in their order."""

    def __init__(self, items: list[Batch]) -> None:
        self.items = items

    def place(self, **_: int) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)


class InOrder(Ragged):
    def train(self) -> Any:
        return Stream(super().train())


def windows(items: list[Batch], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    """The gradients of as many items as each size says."""
    found, at = [], 0
    for size in sizes:
        found.append(expected(model_of("lm"), pad_collate(items[at : at + size])))
        at += size
    return found


@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_short_last_window(accumulate: int) -> None:
    data = InOrder("lm", [5, 40, 3, 17, 6])
    task, _ = train(data, "lm", loader={"batch_size": 1}, accumulate_grad_batches=accumulate)
    wanted = windows(data.train().items, [accumulate] * (5 // accumulate) + [5 % accumulate])
    for found, gradients in zip(task.seen, wanted, strict=True):
        close(found, gradients)


def test_batches_without_a_target_weigh_nothing() -> None:
    data = InOrder("classification", LENGTHS)
    items = data.train().items
    for item in items[:3]:
        item.targets.fill_(-100)
    data.train = lambda: Stream(items)  # type: ignore[method-assign]
    task, _ = train(data, "classification", loader={"batch_size": 1}, accumulate_grad_batches=2)
    nothing, one = task.seen
    assert not any(gradient.any() for gradient in nothing.values())
    close(one, expected(model_of("classification"), items[3]))


def test_accumulation_that_a_schedule_changes() -> None:
    data = InOrder("lm", LENGTHS)
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    task, _ = train(data, "lm", loader={"batch_size": 1}, callbacks=[schedule], max_epochs=2)
    items = data.train().items
    for found, gradients in zip(task.seen, windows(items, [1] * 4) + windows(items, [3, 1]), strict=True):
        close(found, gradients)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_equal_counts_leave_the_bits_alone(accumulate: int) -> None:
    """As without weights: the mean of the batches' losses, as Lightning takes it."""
    data = Ragged("classification", [6] * 4)
    data.train = lambda: [item for item in Ragged.train(data) if int(item.n_targets)][:1] * 4  # type: ignore[method-assign]
    task, _ = train(data, "classification", loader={"batch_size": 1}, accumulate_grad_batches=accumulate)
    model = model_of("classification")
    for _ in range(accumulate):
        item = data.train()[0]
        (model(item.inputs, item.targets).loss / accumulate).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(task.seen[0][name], parameter.grad), name


def test_length_warm_up_keeps_it() -> None:
    """Folded to 4 tokens, the tokens that no whole window is left for fall away."""
    data = Ragged("lm", LENGTHS)
    task, _ = train(
        data, "lm", loader={"batch_size": 1}, accumulate_grad_batches=4, warmup=LengthWarmup(start=4, steps_per_stage=9)
    )
    pieces = []
    for item in data.train():
        length = item.inputs.shape[1]
        step = min(4, length)
        pieces += [
            item.map(lambda t, at=at, step=step: t[:, at : at + step]) for at in range(0, length - step + 1, step)
        ]
    close(task.seen[0], expected(model_of("lm"), pad_collate(pieces)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_of_a_set_is_a_mean_over_its_targets(head: str, pack: bool) -> None:
    data = Ragged(head, LENGTHS, [2, 30, 9, 1, 14])
    task, trainer = train(data, head, loader={"batch_size": 2, "pack": pack}, limit_train_batches=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    items = data.validation()
    model = task.model.eval()
    with torch.no_grad():
        losses = [float(model(item.inputs, item.targets).loss) for item in items]
    counts = [int(item.n_targets) for item in items]
    total = sum(loss * n for loss, n in zip(losses, counts, strict=True))
    assert logged["val/loss"] == pytest.approx(total / sum(counts), rel=1e-6)
    if head == "lm":
        assert logged["val/loss"] == pytest.approx(logged["val/bits_per_token"] * math.log(2), rel=1e-6)


def test_two_processes_are_one_big_batch(tmp_path: Path) -> None:
    out = tmp_path / "found.pt"
    ranks = launching.start(functools.partial(step_on_two_processes, out), tmp_path)
    assert ranks.wait(200) == [0, 0], ranks.told(0) + ranks.told(1)
    found = torch.load(out)
    data = Ragged("lm", LENGTHS, [2, 30, 9, 1, 14])
    assert len(found["gradients"]) == 2
    for gradients in found["gradients"]:
        close(gradients, expected(model_of("lm"), pad_collate(data.train())))
    _, trainer = train(data, "lm", loader={"batch_size": 4})
    assert found["logged"]["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-5)
    logged = found["logged"]
    assert logged["val/loss"] == pytest.approx(logged["val/bits_per_token"] * math.log(2), rel=1e-6)
