"""What is random in a step depends on the run's seed, the step and the process alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mambaseq.tasks.task import Task


def begin(device: str, step: int = 5) -> None:
    datamodule = SimpleNamespace(batches_done=step)
    task: Any = SimpleNamespace(_fits=True, seed=3, global_rank=1, device=torch.device(device))
    task.trainer = SimpleNamespace(datamodule=datamodule)
    Task.on_train_batch_start(task, None, 0)  # type: ignore[arg-type]


def test_a_step_is_seeded_as_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(hash((3, 5, 1)) % 2**63)
    expected = torch.rand(4)

    def others(seed: int) -> None:
        raise AssertionError("a device that is not there")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", others)
    for _ in range(2):
        begin("cpu")
        assert torch.equal(torch.rand(4), expected)
    begin("cpu", step=6)
    assert not torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_seeded_as_by_torch(cuda: torch.device) -> None:
    torch.manual_seed(hash((3, 5, 1)) % 2**63)
    expected = [torch.rand(4), torch.rand(4, device=cuda)]
    begin("cuda")
    assert all(torch.equal(torch.rand(4, device=one.device), one) for one in expected)
