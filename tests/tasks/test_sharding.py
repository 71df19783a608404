"""Processes of a sharded model run it equally often, since each waits for all to gather weights."""

from __future__ import annotations

import errno
import functools
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import launching
import lightning
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mambaseq.batch import Batch
from mambaseq.checkpoints.lightning_plugin import AtomicCheckpointIO
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, UserError
from mambaseq.models import causal_lm
from mambaseq.runs.trainer_classes import make_classes
from mambaseq.tasks import sharding
from mambaseq.tasks.callbacks import StoppedAtOnce, abandons_saving
from mambaseq.tasks.contexts import gather_states
from mambaseq.tasks.sharding import FullySharded
from mambaseq.tasks.task import Task

CONFIG = """
data: {name: "tiny:TinyTokens"}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 2, backend: reference}}
trainer: {max_steps: 2, accelerator: cpu, devices: 2, strategy: fsdp2, enable_progress_bar: false}
"""


def task_of(own: int, others: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Task, list[Any]]:
    """A task that has so many batches of an evaluation, beside a process with others; and what its model is run on."""
    task, seen = Task(causal_lm(7, 8, 1)), []

    def largest(counts: torch.Tensor, op: Any) -> None:
        counts.copy_(torch.maximum(counts, torch.tensor([others, -others])))

    strategy = make_classes("strategy", "fsdp2")
    assert isinstance(strategy, FullySharded)
    trainer = SimpleNamespace(strategy=strategy, world_size=2, sanity_checking=False, num_val_batches=[own])
    monkeypatch.setattr(Task, "trainer", trainer)
    monkeypatch.setattr(torch.distributed, "all_reduce", largest)
    monkeypatch.setattr(task, "run_model", lambda batch, return_logits=None: seen.append(batch))
    return task, seen


@pytest.mark.parametrize(("own", "others", "more"), [(1, 3, 2), (3, 1, 0), (2, 2, 0)])
def test_a_process_with_fewer_batches_runs_its_last_again(
    own: int, others: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = task_of(own, others, monkeypatch)
    task._compare_counts("val")
    task._seen = last = Batch(torch.zeros(1, 4, dtype=torch.int64), None)
    task._even_out("val")
    assert seen == [last] * more


def test_processes_of_a_sharded_model_gather_states() -> None:
    """One that waited for another's state would keep it from gathering weights."""
    one = causal_lm(7, 8, 2)
    gather_states(one.backbone)
    assert one.backbone.context_states == "gathered"
    for options in ({"mixer": "rwkv4"}, {"chunk_length": 4}):
        with pytest.raises(ConfigError, match=r"fsdp2 goes with .* where processes gather states"):
            gather_states(causal_lm(7, 8, 2, **options).backbone)  # type: ignore[arg-type]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone, which gathers and sums as several do."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_layers_are_gathered_together(
    mesh: DeviceMesh, together: int, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as have so many parameters, and nothing changes by it."""
    whole, model = (causal_lm(7, 8, 5, checkpoint=checkpoint) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    layers = list(model.backbone.layers)  # type: ignore[arg-type]
    monkeypatch.setattr(sharding, "_TOGETHER", together * sum(p.numel() for p in layers[0].parameters()))
    sharding.shard_over(model, mesh)
    units = {id(layer._get_fsdp_state()._fsdp_param_group) for layer in layers}
    assert len(units) == {1: 5, 2: 3, 5: 1}[together]
    tokens = torch.randint(7, (2, 9))
    for _ in range(2):
        for one in (whole, model):
            loss = one(tokens, tokens).loss
            assert loss is not None
            loss.backward()
    for (name, own), gathered in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert own.grad is not None, name
        torch.testing.assert_close(gathered.grad.full_tensor(), own.grad, msg=name)  # type: ignore[union-attr]


def test_a_process_without_a_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = task_of(1, 0, monkeypatch)
    with pytest.raises(ConfigError, match=r"The val set has fewer batches than there are processes.*batch_size lower"):
        task._compare_counts("val")


@pytest.mark.parametrize(
    ("needing", "told", "written"),
    [
        ("--ema.decay=0.5", r"trainer\.strategy ddp, but not .* Set ema\.decay to 0", "`ema.decay`"),
        (
            "--finetune.freeze=[encoder] --finetune.unfreeze={'encoder':2}",
            r"Leave finetune\.unfreeze out, or set trainer\.strategy to ddp\.",
            "`finetune.unfreeze`",
        ),
        ("--optimizer.name=muon", r"Set optimizer\.name to adamw, or trainer\.strategy to ddp\.", "muon"),
        (
            "--model.backbone.chunk_length=4",
            r"Set chunk_length to null, or trainer\.strategy to ddp\.",
            "`chunk_length`",
        ),
        (
            "--model.backbone.context_parallel=2 --model.backbone.context_states=relayed",
            r"where processes gather states.* Set trainer\.strategy to ddp, or context_parallel to 1\.",
            "relayed",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused_before_others_are_started(
    needing: str, told: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each of which would say it once more. The page on several devices has it."""
    monkeypatch.setattr(lightning.Trainer, "fit", None)  # which starts them
    (tmp_path / "c.yaml").write_text(CONFIG)
    fit = ["fit", "--allow-import=tiny", f"--config={tmp_path / 'c.yaml'}", f"--out={tmp_path / 'run'}"]
    assert main([*fit, *needing.split()]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    page = (Path(__file__).parents[2] / "docs" / "several_devices.md").read_text(encoding="utf-8")
    (refused,) = (item for item in page.partition("## What is refused")[2].split("\n- ") if "`fsdp2` with" in item)
    assert written in refused.replace("\n ", "").partition("`fsdp2` with")[2]


@pytest.mark.parametrize("waits", [False, True])
def test_a_checkpoint_that_is_being_written_when_a_run_is_stopped_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Whether training or the wait for it was interrupted. After another error a writer has time to end."""
    strategy = make_classes("strategy", "fsdp2")
    monkeypatch.setattr(FullySharded, "global_rank", 0)
    monkeypatch.setattr(strategy, "broadcast", lambda value: value)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: None)
    last, goes_on, trainer = tmp_path / "last.ckpt", threading.Event(), SimpleNamespace(strategy=strategy)

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedAtOnce

    with ThreadPoolExecutor(1) as pool:

        def write(tensors: Any, storage_writer: Any, process_group: Any) -> Future[Any]:
            def slowly() -> None:
                Path(storage_writer.path).mkdir()
                assert goes_on.wait(20)
                dcp.save(tensors, storage_writer=storage_writer, no_dist=True)

            return pool.submit(slowly)

        monkeypatch.setattr(dcp, "async_save", write)
        strategy.save_checkpoint({"state_dict": {}, "global_step": 1}, last)
        if waits:
            monkeypatch.setattr(strategy._pending.done, "exception", stop)
        with pytest.raises(StoppedAtOnce), abandons_saving(trainer):  # type: ignore[arg-type]
            (strategy.finish_saving if waits else stop)()
        goes_on.set()
    assert not list(tmp_path.iterdir())
    with ThreadPoolExecutor(1) as pool:
        goes_on.clear()
        strategy.save_checkpoint({"state_dict": {}, "global_step": 2}, last)
        threading.Timer(0.05, goes_on.set).start()
        with pytest.raises(OSError, match="another"), abandons_saving(trainer):  # type: ignore[arg-type]
            raise OSError("another")
        assert last.is_file()
    (folder,) = tmp_path.glob("last.ckpt.*.parts")
    assert torch.load(last, weights_only=True)["parts"] == {"folder": folder.name}


def disk_gets_full(folder: Path) -> None:
    """What each of two processes calls: there is room for parts, but not for the file, which the first one writes."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path.replace = full  # type: ignore[assignment,method-assign]

    def broadcast(value: Any, src: int = 0) -> Any:
        dist.broadcast_object_list(values := [value], src)
        return values[0]

    for options in ({}, {"asynchronous": False}, {"checkpoints": "whole"}):
        strategy: Any = make_classes("strategy", {"class_path": "fsdp2", "init_args": options})
        strategy.accelerator, strategy.parallel_devices = Mock(), [torch.device("cpu")] * 2
        strategy.cluster_environment = Mock(global_rank=lambda: rank)
        strategy.broadcast, strategy.checkpoint_io = broadcast, AtomicCheckpointIO()
        name = "".join(map(str, options.values())) or "beside"

        def save(path: Path = folder / name / "last.ckpt", strategy: Any = strategy) -> None:
            strategy.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
            strategy.finish_saving()

        with pytest.raises(UserError, match=rf"The disk is full .*{name}/last\.ckpt could not be written"):
            save()
    dist.destroy_process_group()


def test_all_processes_say_why_a_checkpoint_was_not_written(tmp_path: Path) -> None:
    """That the first one alone has written, too."""
    ranks = launching.start(functools.partial(disk_gets_full, tmp_path), tmp_path)
    assert ranks.wait(100) == [0, 0], ranks.told(0) + ranks.told(1)
    assert not [path for path in tmp_path.rglob("*.ckpt*") if path.is_file()]
