"""Processes whose sequences and clocks differ save and validate at the same steps; none waits for another for ever."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import lightning
import pytest
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks import callbacks
from mambaseq.tasks.task import Task

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyRagged"}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4, backend: reference}}
optimizer: {lr: 1.0e-2}
loader: {batch_size: 2}
checkpoint: {every_n_steps: 99}
trainer:
  max_steps: 12
  accelerator: cpu
  devices: 2
  strategy: {class_path: DDPStrategy, init_args: {timeout: "0:00:20"}}
  enable_progress_bar: false
  log_every_n_steps: 1
"""


def noted(path: str) -> None:
    """Have this process write down the positions of each batch, and each checkpoint that it is asked for."""
    began, save = Task.on_train_batch_start, lightning.Trainer.save_checkpoint

    def note(*what: Any) -> None:
        with Path(path).open("a") as file:
            file.write(json.dumps(what) + "\n")

    def beginning(self: Task, batch: Any, number: int) -> None:
        note("batch", batch.inputs.shape[0] * batch.inputs.shape[1])
        began(self, batch, number)

    def saving(self: lightning.Trainer, path: Path, *rest: Any) -> None:
        note(Path(path).name, self.global_step)
        save(self, path, *rest)

    Task.on_train_batch_start = beginning  # type: ignore[method-assign]
    lightning.Trainer.save_checkpoint = saving  # type: ignore[method-assign]


def clock(seconds: float) -> None:
    """Have this process's clock move so far with every batch that it begins, and not otherwise."""
    now, began = [0.0], Task.on_train_batch_start

    def beginning(self: Task, batch: Any, number: int) -> None:
        now[0] += seconds
        began(self, batch, number)

    Task.on_train_batch_start = beginning  # type: ignore[method-assign]
    for module in (callbacks, training_epoch_loop, evaluation_loop, fit_loop):
        module.time = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)  # type: ignore[attr-defined]


def run_two(folder: Path, command: list[str], *before: Callable[[], None]) -> None:
    ranks = launching.start(command, folder, before=dict(enumerate(before)))
    assert ranks.wait(60) == [0, 0], ranks.told(0) + ranks.told(1)


def noted_by_two(folder: Path, *command: str) -> list[dict[str, list[int]]]:
    """What each of two processes has written down."""
    paths = [folder / f"{rank}.notes" for rank in range(2)]
    run_two(folder, list(command), *(functools.partial(noted, str(path)) for path in paths))
    told: list[dict[str, list[int]]] = []
    for path in paths:
        told.append({})
        for kind, number in map(json.loads, path.read_text().splitlines()):
            told[-1].setdefault(kind, []).append(number)
    return told


def crossed(totals: list[int], interval: int) -> list[int]:
    """The steps after which another `interval` tokens are done."""
    counts = [0, *(total // interval for total in totals)]
    return [step for step, (before, now) in enumerate(itertools.pairwise(counts), 1) if before < now]


def begin(folder: Path, *more: str) -> tuple[RunFolder, list[str]]:
    """A new run, and the command that begins it."""
    (folder / "c.yaml").write_text(CONFIG)
    run = RunFolder(folder / "run")
    return run, ["fit", "--allow-import=tiny", "--config", str(folder / "c.yaml"), "--out", str(run.path), *more]


@pytest.mark.slow
def test_they_save_and_validate_by_the_tokens_of_all(tmp_path: Path) -> None:
    """Also in a run that goes on, where each has counted what both have done."""
    often = ["--checkpoint.every_n_tokens=500", "--checkpoint.val_every_n_tokens=300", "--checkpoint.monitor="]
    run, command = begin(tmp_path, *often)
    first = noted_by_two(tmp_path, *command, "--trainer.max_steps=7")
    assert read_checkpoint(run.last)["callbacks"]["Throughput"]["tokens"] == sum(sum(one["batch"]) for one in first)
    both = noted_by_two(tmp_path, "fit", "--allow-import=tiny", "--resume", str(run.path), "--trainer.max_steps=12")
    assert both[0]["batch"] != both[1]["batch"]
    totals = list(itertools.accumulate(map(sum, zip(both[0]["batch"], both[1]["batch"], strict=True))))
    assert read_checkpoint(run.last)["callbacks"]["Throughput"]["tokens"] == totals[-1]
    assert run.read_results()["train_tokens"] == totals[-1]
    ends = [7, 12]
    assert both[0]["last.ckpt"] == both[1]["last.ckpt"] == sorted(crossed(totals, 500) + ends)
    assert [step + 1 for step, _ in run.curve("val/loss")] == sorted({*crossed(totals, 300), *ends})


@pytest.mark.skipif(not hasattr(training_epoch_loop, "time"), reason="this Lightning has no such interval")
def test_the_first_process_s_clock_says_when_to_validate(tmp_path: Path) -> None:
    every = ["--trainer.val_check_interval=00:00:00:04", "--checkpoint.every_n_steps=5"]
    run, command = begin(tmp_path, *every)
    run_two(tmp_path, command, functools.partial(clock, 1.0), functools.partial(clock, 1.5))
    assert [step + 1 for step, _ in run.curve("val/loss")] == [4, 8, 12]
