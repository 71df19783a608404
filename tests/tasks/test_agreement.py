"""Processes that end a run together do not wait for their GPUs to agree on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from mambaseq.tasks import agreement
from mambaseq.tasks.agreement import Agreement, Sum, leave_signals_to_us


def trainer(processes: int, device: str, reduced: list[bool]) -> Any:
    def reduce(yes: bool, all: bool) -> bool:
        assert not all
        reduced.append(yes)
        return True

    strategy = SimpleNamespace(root_device=torch.device(device), reduce_boolean_decision=reduce)
    return SimpleNamespace(world_size=processes, strategy=strategy)


def test_one_process_and_those_on_cpus_know_at_once() -> None:
    reduced: list[bool] = []
    agree = Agreement()
    assert [agree(trainer(1, "cuda", reduced), yes) for yes in (False, True, False)] == [False, True, False]
    assert not reduced
    assert agree(trainer(2, "cpu", reduced), False)
    assert reduced == [False]


def test_on_gpus_the_answer_is_that_to_the_batch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    asked: list[bool] = []

    class Answer:
        def __init__(self, yes: bool, *_: Any) -> None:
            asked.append(yes)
            self.yes, self.number = yes, len(asked)

        def wait(self) -> bool:
            waited.append(self.number)
            return self.yes

    monkeypatch.setattr(agreement, "_Answer", Answer)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    agree, both = Agreement(), trainer(2, "cuda", [])
    found = [agree(both, number == 3) for number in range(1, 6)]
    assert found == [False, False, False, True, False]
    assert asked == [False, False, True, False, False]
    assert waited == [1, 2, 3, 4]  # never for the batch that was just begun


def test_a_sum_over_processes_is_waited_for_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU, which is asked before it has a batch, is not waited for with the batch."""
    order: list[str] = []

    def all_reduce(tensor: torch.Tensor, op: Any, async_op: bool) -> Any:
        assert async_op
        assert op == torch.distributed.ReduceOp.SUM
        order.append("begun")
        return SimpleNamespace(wait=lambda: (order.append("waited"), tensor.mul_(3)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    tokens = Sum()
    tokens.begin(trainer(1, "cuda", []), 5)
    assert tokens.read() == 5
    assert order == []
    tokens.begin(trainer(3, "cpu", []), 5)
    order.append("batch")
    assert tokens.read() == 15
    assert order == ["begun", "batch", "waited"]


def test_lightning_s_processes_ask_nothing_before_a_batch() -> None:
    """With its own way, every process waits for its GPU before each batch."""
    asks = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = asks.fit_loop.epoch_loop
    if not hasattr(loop, "_broadcast_sigterm_tensor"):
        pytest.skip("this Lightning has no such question")
    leave_signals_to_us(asks)
    assert loop._broadcast_sigterm_tensor is agreement._nothing


@pytest.mark.gpu
def test_an_answer_from_a_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    work = SimpleNamespace(wait=lambda: torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op, async_op: work)
    agree, tokens, both = Agreement(), Sum(), trainer(2, "cuda:0", [])
    assert [agree(both, yes) for yes in (False, True, False, False)] == [False, False, True, False]
    tokens.begin(both, 2**33)
    assert tokens.read() == 2**33
