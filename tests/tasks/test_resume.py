"""Laws 6 and 7: a run that was stopped or killed and resumed ends bit-identical to one that was not; two runs
of one seed are equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens", size: 20}
loader: {batch_size: 4}
model:
  d_model: 8
  backbone: {name: residual, n_layers: 1, dropout: 0.1}
  mixer: {name: mamba, d_state: 4}
optimizer: {lr: 1.0e-2, warmup_steps: 3}
checkpoint: {every_n_steps: 2, monitor: val/bits_per_token}
trainer: {max_steps: 13, accelerator: cpu, enable_progress_bar: false}
"""


class Killer(lightning.Callback):
    """Dies in the middle of a step, as a crash does: nothing is saved then."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def fit(config: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(["fit", "--config", str(config), "--out", str(out), *more]) == 0
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


VARIANTS = [
    pytest.param(("--data.endless", "true"), (3, 6, 11), id="endless"),
    pytest.param((), (3, 5, 8), id="epochs"),
    pytest.param(("--loader.num_workers", "2"), (7,), id="two-workers"),
    pytest.param(("--trainer.accumulate_grad_batches", "2"), (5,), id="accumulated"),
]


@pytest.mark.parametrize(("options", "steps"), VARIANTS)
def test_killed_and_resumed_is_bit_identical(config: Path, tmp_path: Path, options, steps) -> None:
    whole = fit(config, tmp_path / "whole", *options)
    again = fit(config, tmp_path / "again", *options)
    assert_equal(whole, again)
    for step in steps:
        out = tmp_path / f"killed{step}"
        killer = f'[{{"class_path": "tasks.test_resume.Killer", "init_args": {{"step": {step}}}}}]'
        with pytest.raises(ZeroDivisionError):
            main(["fit", "--config", str(config), "--out", str(out), *options, f"--trainer.callbacks={killer}"])
        saved = read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"]
        assert 0 < saved <= step
        assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
        assert_equal(whole, weights(out))


def start(config: Path, out: Path, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "mambaseq", "fit", "--config", str(config), "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signals_leave_a_resumable_run(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    steps = ("--trainer.max_steps", "200", "--checkpoint.every_n_steps", "20")
    whole = fit(config, tmp_path / "whole", *steps)
    out = tmp_path / "signalled"
    process = start(config, out, *steps)
    wait_for(out / "checkpoints" / "last.ckpt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, errors
        assert f"mambaseq fit --resume {out}" in errors
    assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] < 200
    assert main(["fit", "--resume", str(out)]) == 0
    assert_equal(whole, weights(out))


def test_best_weights_are_exported_and_history_is_kept(config: Path, tmp_path: Path) -> None:
    from mambaseq.checkpoints import load_model
    from mambaseq.reporting.runs import RunFolder

    out = tmp_path / "run"
    fit(config, out)
    best = read_checkpoint(out / "checkpoints" / "best.ckpt")["state_dict"]
    loaded = load_model(out).model.state_dict()
    assert_equal(
        {f"model.{k}": v for k, v in loaded.items()}, {k: v for k, v in best.items() if k.startswith("model.")}
    )
    assert main(["fit", "--resume", str(out), "--trainer.max_steps", "15"]) == 0
    steps = [step for step, _ in RunFolder(out).curve("val/loss")]
    assert steps[0] < 10 < steps[-1]


def test_an_existing_run_is_not_overwritten(config: Path, tmp_path: Path, capsys) -> None:
    fit(config, tmp_path / "run")
    before = weights(tmp_path / "run")
    assert main(["fit", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert_equal(before, weights(tmp_path / "run"))
