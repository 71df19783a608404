"""What a launcher has started is what a run trains on, or the run says that it is not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import launching
import pytest
import torch

import mambaseq as ms
from mambaseq.atomic import json_text
from mambaseq.errors import ConfigError, UserError
from mambaseq.registry import allow_imports
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs import processes
from mambaseq.runs.processes import check_devices

CONFIG = """
metrics: [token_accuracy]
data: {name: "tiny:TinyTokens", size: 32}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4, backend: reference}}
loader: {batch_size: 2}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}
"""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}
STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
UNEVEN = {"SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2"}
ONE_TASK = {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
ONE_OF_TORCHRUN = {**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
BY_HAND = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch):
    """Sets the environment of a process that is started by nobody but what is given."""

    def environment(given: dict[str, str]) -> None:
        for name in os.environ:
            if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return environment


@pytest.mark.parametrize(
    ("given", "settings", "found"),
    [
        ({}, {}, {}),
        ({}, {"devices": 2}, {}),
        (TORCHRUN, {}, {"devices": 8, "num_nodes": 2}),
        (TORCHRUN, {"devices": "auto", "num_nodes": 2}, {"devices": 8, "num_nodes": 2}),
        (TORCHRUN, {"devices": "8", "num_nodes": 2}, {}),
        (SLURM | STEP, {}, {"devices": 8, "num_nodes": 2}),
        (SLURM, {}, {}),  # the job's script itself
        (BY_HAND, {}, {"devices": 2, "num_nodes": 1}),
        ({**BY_HAND, "WORLD_SIZE": "1"}, {"devices": 1}, {}),
        (ONE_TASK, {}, {"devices": 1, "num_nodes": 1}),
        (ONE_TASK, {"devices": 1}, {}),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NNODES": "2"}, {"devices": 1}, {}),  # of a larger job
        (ONE_TASK | {"SLURM_JOB_NAME": "bash"}, {"devices": 2}, {}),  # a shell
    ],
)
def test_devices_are_what_a_launcher_started(given: dict, settings: dict, found: dict, start) -> None:
    start(given)
    assert check_devices({"accelerator": "cpu", **settings}) == found


@pytest.mark.parametrize(
    ("given", "settings", "told"),
    [
        (TORCHRUN, {"devices": 1}, r"is 1 \* 1 = 1, but torchrun started 16 .* --trainer.devices 16, or start 1\."),
        (TORCHRUN, {"devices": [0, 1], "num_nodes": 2}, r"is 2 \* 2 = 4, but torchrun .* Give --trainer.devices 8"),
        (TORCHRUN, {"num_nodes": 4}, r"torchrun started 16 processes, 8 of them on this machine; not 8 \* 4"),
        (SLURM | STEP, {"devices": 4}, r"is 4 \* 1 = 4, but SLURM started 16 processes"),
        (ONE_TASK, {"devices": 2}, r"is 2 \* 1 = 2, but SLURM started 1 process, .* --trainer.devices 1, or start 2\."),
        (ONE_OF_TORCHRUN, {"devices": 2}, r"is 2 \* 1 = 2, but torchrun started 1 process, "),
        (SLURM | UNEVEN, {}, r"SLURM started 3 processes on 2 machines; each machine has to have as many\. Start"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "3"}, {}, r"torchrun started 16 processes on 3 machines; each machine has to"),
        (SLURM | UNEVEN, {"devices": 3}, r"SLURM started 3 processes on 2 machines; each machine"),
        (SLURM | UNEVEN | {"SLURM_STEP_NUM_NODES": "4"}, {}, r"SLURM started 3 processes on 4 machines; each machine"),
        (BY_HAND, {"devices": "4"}, r"is 4 \* 1 = 4, but a launcher .* started 2 processes.*--trainer.devices 2"),
    ],
)
def test_other_devices_than_a_launcher_started_are_refused(given: dict, settings: dict, told: str, start) -> None:
    start(given)
    with pytest.raises(ConfigError, match=told):
        check_devices({"accelerator": "cpu", **settings})


def test_a_script_that_has_trained_on_two_goes_on_with_two(start, monkeypatch: pytest.MonkeyPatch) -> None:
    start({"LOCAL_RANK": "0"})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert check_devices({"accelerator": "cpu"}) == {"devices": 2, "num_nodes": 1}
    with pytest.raises(ConfigError, match="but an earlier training of this script started 2 processes"):
        check_devices({"accelerator": "cpu", "devices": 1})


def test_gpus_that_are_not_there_are_refused_with_a_remedy(start, monkeypatch: pytest.MonkeyPatch) -> None:
    start({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for accelerator in ("gpu", "auto"):
        with pytest.raises(ConfigError, match=r"trainer\.devices is 4, .* sees 2 GPUs\. Give --trainer\.devices 2, or"):
            check_devices({"accelerator": accelerator, "devices": 4})
    assert check_devices({"accelerator": "gpu", "devices": -1}) == {}
    start({**BY_HAND, "WORLD_SIZE": "8"})
    with pytest.raises(ConfigError, match="no --gpus-per-task"):
        check_devices({})


def speak_at_once() -> None:
    processes._FIRST_SPEAKS = 0.0


def write_slowly() -> None:
    """As to a disk that several machines share."""
    write = RunFolder.update_results

    def slow(self: RunFolder, *arguments: Any, **values: Any) -> None:
        time.sleep(1.0)
        write(self, *arguments, **values)

    RunFolder.update_results = slow


def script() -> None:
    with allow_imports("tiny"):
        run = ms.fit("c.yaml", out="run", progress=False)
        first = dict(run.results)
        found = run.evaluate("validation", progress=False)
    rank = os.environ["RANK"]
    Path(f"found{rank}.json").write_text(json_text([first, run.results, found]))


def fill_the_disk_once() -> None:
    """When the first results are written."""
    write = RunFolder.update_results

    def full(self: RunFolder, *arguments: Any, **values: Any) -> None:
        RunFolder.update_results = write
        raise UserError("The disk is full.")

    RunFolder.update_results = full


def failing_script() -> None:
    told: list[Any] = []
    with allow_imports("tiny"):
        try:
            ms.fit("c.yaml", out="run", progress=False)
        except UserError as error:
            told.append([type(error).__name__, str(error)])
        run = ms.load("run").resume(progress=False)
        try:
            run.evaluate("validation", progress=False, settings={"trainer.limit_val_batches": 0})
        except UserError as error:
            told.append([type(error).__name__, str(error)])
        update, RunFolder.update_evaluation = RunFolder.update_evaluation, None  # an error of the program
        try:
            run.evaluate("validation", progress=False)
        except (UserError, TypeError) as error:
            told.append([type(error).__name__, str(error)])
        RunFolder.update_evaluation = update
        told.append(run.evaluate("test", progress=False))
    Path(f"told{os.environ['RANK']}.json").write_text(json_text(told))


@pytest.mark.slow
def test_two_processes_of_torchrun_train_one_run_or_refuse_it_once(tmp_path: Path) -> None:
    """A script has the same results in both, although the first one writes them."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    run = tmp_path / "run"
    command = ["fit", "--allow-import", "tiny", "--config", str(tmp_path / "c.yaml"), "--out", str(run)]
    ranks = launching.start([*command, "--trainer.devices=1"], tmp_path, before={1: speak_at_once})
    assert ranks.wait(60) == [2, 2]
    assert ranks.told(0).startswith("mambaseq fit: trainer.devices times trainer.num_nodes is 1 * 1 = 1, but torchrun")
    assert ranks.told(1) == ""
    assert not run.exists()
    ranks = launching.start(script, tmp_path, before={0: write_slowly})
    assert ranks.wait(100) == [0, 0], ranks.told(0) + ranks.told(1)
    mine, others = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert mine == others
    assert mine[0]["devices"] == 2
    assert "val/token_accuracy" in mine[0]


def test_what_fails_in_the_first_process_is_told_in_both(tmp_path: Path) -> None:
    """And what they do next is the same again."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    ranks = launching.start(failing_script, tmp_path, before={0: fill_the_disk_once})
    assert ranks.wait(100) == [0, 0], ranks.told(0) + ranks.told(1)
    mine, others = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert mine[0] == others[0] == ["UserError", "The disk is full."]
    assert mine[1] == others[1]
    assert mine[1][0] == "ConfigError"
    assert mine[1][1].startswith("Nothing was evaluated")
    assert mine[2][0] == "TypeError"
    assert others[2] == [
        "UserError",
        f"run: the first process failed (TypeError: {mine[2][1]}). What it said itself says where.",
    ]
    assert mine[3] == others[3]
    assert "test/token_accuracy" in mine[3]
