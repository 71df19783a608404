"""A run that was killed at any moment is whole once it has been resumed; a folder is one run's, and one process's."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file

from mambaseq import atomic
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.errors import UserError
from mambaseq.reporting import runs
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs import evaluation, finishing
from mambaseq.tasks.callbacks import RunCheckpoints

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens"}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
optimizer: {lr: 1.0e-2}
checkpoint: {every_n_steps: 2, monitor: val/bits_per_token, mode: max}
trainer: {max_steps: 5, accelerator: cpu, enable_progress_bar: false, val_check_interval: 2, log_every_n_steps: 1,
  check_val_every_n_epoch: null}
"""
TIMED = {"train_seconds", "tokens_per_second", "train_tokens"}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Asker(lightning.Callback):
    """Ctrl-C twice in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_WAIT", 0.0)


def begin(tmp_path: Path, name: str, *more: str) -> list[str]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return ["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / name), *more]


def assert_whole(one: Path, other: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        if (one / "checkpoints" / name).exists():
            states = [read_checkpoint(out / "checkpoints" / name)["state_dict"] for out in (one, other)]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    exported = [load_file(out / "model" / "model.safetensors") for out in (one, other)]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])
    found = [{k: v for k, v in RunFolder(out).read_results().items() if k not in TIMED} for out in (one, other)]
    assert found[0] == found[1]
    described = [json.loads((out / "model" / "model.json").read_text()) for out in (one, other)]
    assert described[0] == described[1]
    assert RunFolder(other).curves.read_bytes().startswith(b"\x89PNG")
    assert RunFolder(one).curve("train/loss") == RunFolder(other).curve("train/loss")
    assert not [path for path in other.rglob(".*") if path.name.endswith((".tmp", ".old"))]


def kill_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
    function = getattr(owner, name)

    def killed(*arguments: Any, **options: Any) -> None:
        if after:
            function(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, killed)


@pytest.mark.parametrize("monitor", ["val/bits_per_token", ""])
def test_killed_between_the_last_step_and_the_last_picture(tmp_path: Path, monitor: str, capsys) -> None:
    more = [f"--checkpoint.monitor={monitor}"]
    assert main(begin(tmp_path, "whole", *more)) == 0
    out = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, finishing, "save_model")
        with pytest.raises(Killed):
            main(begin(tmp_path, "killed", *more))
    # each resume comes further than the one before
    for place, name, after in (
        (finishing, "save_model", True),
        (finishing, "save_png", False),
        (finishing, "save_png", True),
        (RunFolder, "update_results", False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            kill_in(patch, place, name, after=after)
            with pytest.raises(Killed):
                main(["fit", "--resume", str(out)])
    capsys.readouterr()
    assert main(["fit", "--resume", str(out)]) == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert_whole(tmp_path / "whole", out)
    assert main(["fit", "--resume", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    RunFolder(out).curves.unlink()
    assert main(["fit", "--resume", str(out)]) == 0
    assert_whole(tmp_path / "whole", out)


def test_killed_as_soon_as_a_checkpoint_is_there_no_logged_step_is_lost(tmp_path: Path) -> None:
    often = ["--checkpoint.every_n_steps=3", "--checkpoint.monitor=", "--trainer.val_check_interval=100"]
    assert main(begin(tmp_path, "whole", *often)) == 0
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, lightning.Trainer, "save_checkpoint", after=True)
        with pytest.raises(Killed):
            main(begin(tmp_path, "killed", *often))
    assert [step for step, _ in RunFolder(tmp_path / "killed").curve("train/loss")] == [0, 1, 2]
    assert main(["fit", "--resume", str(tmp_path / "killed")]) == 0
    assert_whole(tmp_path / "whole", tmp_path / "killed")
    (log,) = (tmp_path / "whole" / "logs").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]  # each once
    assert b"\r" not in log.read_bytes()


def test_killed_before_the_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(begin(tmp_path, "whole")) == 0
    out = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, RunCheckpoints, "_save_last")
        with pytest.raises(Killed):
            main(begin(tmp_path, "killed"))
    assert not RunFolder(out).last.exists()
    capsys.readouterr()
    assert main(["fit", "--resume", str(out)]) == 0
    assert "there is no checkpoint yet; the run starts at its first step" in capsys.readouterr().err
    assert_whole(tmp_path / "whole", out)


def test_a_run_that_ended_early_does_not_train_on_when_its_end_is_made_up_for(tmp_path: Path, capsys) -> None:
    stopper = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/bits_per_token", "mode": "max", '
    more = [f'--trainer.callbacks={stopper}"patience": 1}}}}]', "--trainer.max_steps=9"]
    assert main(begin(tmp_path, "whole", *more)) == 0
    assert RunFolder(tmp_path / "whole").read_results()["steps"] < 9
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, finishing, "save_model")
        with pytest.raises(Killed):
            main(begin(tmp_path, "killed", *more))
    for _ in range(2):
        assert main(["fit", "--resume", str(tmp_path / "killed")]) == 0
        assert_whole(tmp_path / "whole", tmp_path / "killed")
    assert "it had ended there" in capsys.readouterr().out


def test_leftovers_of_the_killed_go_when_the_run_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    assert main(begin(tmp_path, "run")) == 0
    places = [tmp_path / "run" / "checkpoints", tmp_path / "run", tmp_path / "cache" / "stores"]
    places[2].mkdir(parents=True)
    left = []
    for place in places:
        name = atomic._temporary(place / "last.ckpt").name
        found = atomic._LEFTOVER.fullmatch(name)
        assert found is not None
        left.append(place / name.replace(found["process"], "00000000"))
        left[-1].write_bytes(b"x")
    assert main(["fit", "--resume", str(tmp_path / "run")]) == 0
    assert not any(path.exists() for path in left)


def test_a_second_ctrl_c_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    asker = '--trainer.callbacks=[{{"class_path": "tasks.test_completeness.Asker", "init_args": {{"step": {}}}}}]'
    assert main(begin(tmp_path, "run", asker.format(3))) == 130
    told = capsys.readouterr().err
    assert f"Stopped at once; the last checkpoint is of step 2. Resume with: mambaseq fit --resume {out}" in told
    assert main(begin(tmp_path, "other", asker.format(0))) == 130
    assert "Stopped at once; there is no checkpoint yet." in capsys.readouterr().err
    assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
    assert main(begin(tmp_path, "whole")) == 0
    assert_whole(tmp_path / "whole", out)


def test_rows_that_a_kill_cut_short_are_no_rows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.logs / "version_0").mkdir(parents=True)
    (folder.logs / "version_0" / "metrics.csv").write_text("loss,step\n1.5,1\n2.5,2\n,3\nx,4\n3.5,1")
    assert folder.curve("loss") == [(1, 1.5), (2, 2.5)]


HOLD = """
import sys, time
from mambaseq.reporting.runs import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_fit_is_refused_with_the_process_of_the_first(tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    assert main(begin(tmp_path, "run")) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        capsys.readouterr()
        for command in (begin(tmp_path, "run"), ["fit", "--resume", str(out), "--trainer.max_steps=9"]):
            assert main(command) == 2
            assert f"process {holder.pid} on " in capsys.readouterr().err
        for command in ("test", "validate"):  # they may look, and leave the results to the process that trains
            assert main([command, "--checkpoint", str(out)]) == 0
            assert "it is being trained; these results are not saved" in capsys.readouterr().err
        assert {
            path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".holder"
        } == before
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.setattr(runs, "_WAIT", 2.0)
    assert main(["fit", "--resume", str(out), "--trainer.max_steps=7"]) == 0  # the kernel gave it back


def test_results_of_weights_that_are_not_the_runs_any_more_are_not_written_down(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(begin(tmp_path, "run")) == 0
    load_model = evaluation.load_model

    def load_and_go_on(path: Path, **options: Any) -> Any:
        loaded = load_model(path, **options)
        assert main(["fit", "--resume", str(out), "--trainer.max_steps=7"]) == 0
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_model", load_and_go_on)
        capsys.readouterr()
        assert main(["test", "--checkpoint", str(out)]) == 0
    assert "its weights changed during the evaluation" in capsys.readouterr().err
    assert not any(key.startswith("test/") for key in RunFolder(out).read_results())


def test_places_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / "mine.py").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name, said in {
        "a\0b": "contains a NUL character",
        "x" * 300: "File name too long",
        "file": "is not a folder",
        "file/run": "Not a directory",
        "project": "holds model but no run",
    }.items():
        assert main(begin(tmp_path, name)) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
        assert len(told) < 1000
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "run.yaml") == before
    monkeypatch.chdir(tmp_path / "project")
    assert main([*begin(tmp_path, "x")[:-1], "."]) == 2
    assert "holds model but no run" in capsys.readouterr().err
    for command in (["fit", "--resume", "a\0b"], ["test", "--checkpoint", "x" * 300]):
        assert main(command) == 2
        assert "There is no run at" in capsys.readouterr().err


def test_the_folder_one_stands_in_may_be_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    assert main([*begin(tmp_path, "x")[:-1], "."]) == 0
    assert "mambaseq: . holds 'notes.txt'; the run is written beside that.\n" in capsys.readouterr().err
    assert main(["fit", "--resume", ".", "--trainer.max_steps=6"]) == 0
    assert "notes.txt" not in capsys.readouterr().err
    assert main(["validate", "--checkpoint", ".", "--trainer.limit_val_batches=0"]) == 2
    assert "Nothing was evaluated: trainer.limit_val_batches is 0. Give more, such as" in capsys.readouterr().err
    assert RunFolder(".").read_results()["steps"] == 6
    RunFolder(".").remove()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["notes.txt"]


def test_a_folder_of_runs_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`mambaseq runs` would find the outer one alone."""
    assert main(begin(tmp_path, "runs/one")) == 0
    assert main(begin(tmp_path, "runs/two")) == 0
    assert "beside that" not in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    assert main(begin(tmp_path, "runs")) == 2
    told = capsys.readouterr().err
    assert "runs is a folder of runs (one, two), and a run there would hide them." in told
    assert f"--out {tmp_path / 'runs' / 'NAME'}." in told
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["sweep", str(sweep_file(tmp_path)), "--out", str(tmp_path / "sweep")]) == 0
    assert main(begin(tmp_path, "sweep")) == 2
    assert "sweep is a folder of runs (trial-001, trial-002)" in capsys.readouterr().err


def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text("config: run.yaml\ngrid: {seed: [0, 1]}\nmetric: val/loss\nmode: min\n")
    return path


def test_a_run_that_may_not_be_written_to(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(begin(tmp_path, "run")) == 0
    monkeypatch.setattr(runs.os, "access", lambda path, mode: False)
    capsys.readouterr()
    for command in (["fit", "--resume"], ["test", "--checkpoint"], ["validate", "--checkpoint"]):
        assert main([*command, str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert "cannot be written to" in told
        assert told.count("\n") == 1


def test_a_folder_that_is_no_run_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="no run"):
        RunFolder(tmp_path).remove()
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_the_last_epoch_is_validated_whatever_the_interval(tmp_path: Path) -> None:
    more = ["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"]
    assert main(begin(tmp_path, "run", *more, "--trainer.val_check_interval=null")) == 0
    run = RunFolder(tmp_path / "run")
    steps = run.read_results()["steps"]
    assert [step + 1 for step, _ in run.curve("val/bits_per_token")] == [steps * 2 // 3, steps]
