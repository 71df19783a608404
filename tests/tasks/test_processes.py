"""Two processes train as one does: the same data in the same order, the same loss. Where one is lost the other says so,
nothing is half-written, and the run goes on as if nothing had been."""

from __future__ import annotations

import datetime
import logging
import os
import resource
import time
from pathlib import Path
from unittest.mock import Mock

import launching
import pytest
import torch
from fuzz.kill_ranks import differences
from lightning.pytorch.strategies import DDPStrategy

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs import lost
from mambaseq.runs.trainer_classes import make_classes
from mambaseq.tasks.task import Task

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens", size: 32}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4, backend: reference}}
optimizer: {lr: 1.0e-2}
finetune: {freeze: [backbone], unfreeze: {backbone.layers.0.mixer: 4}}
ema: {decay: 0.5}
checkpoint: {every_n_steps: 3}
trainer: {max_steps: 8, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
"""
TWO = ["--loader.batch_size=2", "--trainer.devices=2"]
WITHIN = 20  # seconds that a process waits for another


def fit(folder: Path, *more: str) -> list[str]:
    """The command; it resumes what has begun in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(CONFIG)
    if (folder / "run" / "config.yaml").is_file():
        return ["fit", "--allow-import", "tiny", "--resume", str(folder / "run")]
    return ["fit", "--allow-import", "tiny", "--config", str(folder / "c.yaml"), "--out", str(folder / "run"), *more]


def patient(seconds: int) -> str:
    return f'--trainer.strategy={{class_path: DDPStrategy, init_args: {{timeout: "0:00:{seconds:02}"}}}}'


@pytest.mark.slow
def test_two_processes_get_the_loss_of_one_also_after_one_was_killed(tmp_path: Path) -> None:
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    assert main(fit(one, "--loader.batch_size=4")) == 0
    ranks = launching.start(fit(two, *TWO, patient(WITHIN)), two)
    assert ranks.wait(200) == [0, 0], ranks.told(0) + ranks.told(1)
    saved = [read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt") for folder in (one, two)]
    first, other = ({**checkpoint["state_dict"], **checkpoint["average"]} for checkpoint in saved)
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        assert (tensor - other[name]).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), name
    curves = [RunFolder(folder / "run").curve("val/bits_per_token") for folder in (one, two)]
    assert curves[0]
    for (step, value), (other_step, found) in zip(*curves, strict=True):
        assert step == other_step
        assert value == pytest.approx(found, rel=1e-4)
    assert "of each of 2 devices" in RunFolder(two / "run").report.read_text()

    ranks = launching.start(fit(killed, *TWO, patient(WITHIN)), killed)
    while not RunFolder(killed / "run").last.is_file() and ranks.busy_for(0) is not None:
        time.sleep(0.005)
    ranks.kill(1)
    assert ranks.wait(WITHIN + 20) == [2, -9]
    told = ranks.told(0)
    assert "process 0 of 2 stops, because another one has ended" in told
    assert f"resume with: mambaseq fit --resume {killed / 'run'}" in told
    assert "Traceback" not in told
    ranks = launching.start(fit(killed), killed)
    assert ranks.wait(200) == [0, 0], ranks.told(0) + ranks.told(1)
    assert differences(two, killed) == []


def infinite_loss() -> None:
    """From the fifth batch on."""
    run, calls = Task.run_model, []

    def broken(self, batch, *arguments):
        output = run(self, batch, *arguments)
        calls.append(1)
        if len(calls) > 4:
            output.loss = output.loss * torch.inf
        return output

    Task.run_model = broken


def full_disk() -> None:
    """No file can be as long as a checkpoint is."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def test_what_happens_to_one_process_stops_both_with_a_reason(tmp_path: Path) -> None:
    whole, sharded = [patient(WITHIN)], ["--trainer.strategy=fsdp2", "--ema.decay=0", "--finetune.unfreeze={}"]
    for name, fault, rank, how, codes, told in (
        ("infinite_loss", infinite_loss, 1, whole, [1, 0], ["is not finite after step 5", "of step 3. Resume"]),
        ("full", full_disk, 0, whole, [2, 2], ["because another one has ended", "There is no checkpoint yet"]),
        ("parts", full_disk, 1, sharded, [2, 2], ["The disk is full"]),  # each writes, beside training, its part
    ):
        folder = tmp_path / name
        ranks = launching.start(fit(folder, *TWO, *how), folder, before={rank: fault})
        assert ranks.wait(WITHIN + 100) == codes, ranks.told(0) + ranks.told(1)
        for words in told:
            assert words in ranks.told(1 - rank)
        assert "The disk is full" in ranks.told(rank) or fault is infinite_loss
        assert not list(folder.rglob("*.tmp"))
    assert not list((folder / "run").glob("checkpoints/*"))
    page = RunFolder(tmp_path / "infinite_loss" / "run").report.read_text()
    assert 'bad">diverged' in page
    assert read_checkpoint(RunFolder(tmp_path / "infinite_loss" / "run").last)["global_step"] == 3


def test_a_process_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    ranks = launching.start(fit(tmp_path, *TWO, patient(1)), tmp_path)
    ranks.kill(1)
    assert ranks.wait(100)[0] == 2, ranks.told(0)
    assert "another one did not answer in time" in ranks.told(0)
    assert "timeout: '1:00:00'" in ranks.told(0)


def test_a_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On a GPU nothing else would tell it for minutes."""
    started: list[tuple] = []
    monkeypatch.setattr(lost.threading, "Thread", lambda target, args, **_: started.append((target, args)) or Mock())
    monkeypatch.setenv("MAMBASEQ_FIRST_PROCESS", str(os.getppid()))
    with lost.watch_processes(Mock(world_size=1)):
        assert not started
    with lost.watch_processes(Mock(world_size=2, local_rank=1)):
        pass
    ((watch, arguments),) = started
    parents, codes = iter([*arguments, *arguments, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", codes.append)
    watch(*arguments, 0.0, 0.0)
    assert codes == [1]
    assert "the first process of this run has ended" in capsys.readouterr().err


def test_a_later_run_is_none_of_the_processes_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first process is nobody's helper, whoever started it; and no run leaves its name in the environment."""
    started: list[dict] = []
    monkeypatch.setattr(lost.threading, "Thread", lambda **how: started.append(how) or Mock())
    monkeypatch.setenv("MAMBASEQ_FIRST_PROCESS", str(os.getppid()))
    seen: list[str] = []

    def fails() -> None:  # on the second of two machines, whose first process was started by hand
        with lost.watch_processes(Mock(world_size=4, local_rank=0, is_global_zero=False)):
            seen.append(os.environ["MAMBASEQ_FIRST_PROCESS"])
            raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        fails()
    assert seen == [str(os.getpid())]
    assert "MAMBASEQ_FIRST_PROCESS" not in os.environ
    assert not started


def test_a_first_process_says_how_the_run_goes_on_before_it_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """Lightning kills it when it finds that another one has ended, before they have met for instance."""
    observer = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    caplog.set_level(logging.INFO, observer.name)
    with lost.watch_processes(Mock(world_size=2, local_rank=0, global_rank=0, default_root_dir="runs/a")):
        observer.info("Child process with PID 7 terminated with code -9. 100%")
    assert "code -9. 100%\nruns/a: process 0 of 2 stops, too. Resume with: mambaseq fit --resume runs/a" in caplog.text
    assert "\n\nChild process" in f"\n{caplog.messages[0]}"  # below the bar's line
    assert not observer.filters


def test_a_process_that_does_not_answer_is_waited_for_as_long_as_the_page_says() -> None:
    """Half an hour also by NCCL, whose own ten minutes no strategy leaves it."""
    page = (Path(__file__).parents[2] / "docs" / "several_devices.md").read_text(encoding="utf-8")
    assert "after half an hour where one does not answer" in page
    for strategy in (DDPStrategy(), make_classes("strategy", "fsdp2")):
        assert strategy._timeout == datetime.timedelta(minutes=30)


def test_a_process_watches_the_first_one_before_they_have_met(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It would wait for the address of one that died while both were starting."""
    started: list[tuple] = []
    monkeypatch.setattr(lost.threading, "Thread", lambda target, args, **_: started.append((target, args)) or Mock())
    monkeypatch.setenv("MAMBASEQ_FIRST_PROCESS", "123")
    monkeypatch.setenv("LOCAL_RANK", "0")  # what the first process starts otherwise has its environment
    assert main(["--version"]) == 0
    assert started == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--version"]) == 0
    assert started == [(lost.end_with, (123,))]
    assert "MAMBASEQ_FIRST_PROCESS" not in os.environ
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    lost.end_with(os.getppid() + 1, grace=0.0)  # it died before this one could look
    assert codes == [1]
