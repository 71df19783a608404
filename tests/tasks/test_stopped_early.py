"""A run that is ended before its first step says so, and what is said of an error begins a line."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
from lightning.pytorch.strategies import DDPStrategy

from mambaseq import stopping
from mambaseq.cli.main import main
from mambaseq.errors import UserError
from mambaseq.runs import training
from mambaseq.tasks.callbacks import Throughput
from mambaseq.tasks.task import Task

CONFIG = """
data: {name: "tiny:TinyTokens", size: 32}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4, backend: reference}}
loader: {batch_size: 2}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}
"""


def end(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def with_its_model() -> None:
    training.make_trainer = end


def before_its_first_step() -> None:
    Throughput.on_train_start = end  # before the run's own handler is there


@pytest.mark.parametrize(
    ("size", "moment"), [(1, with_its_model), (1, before_its_first_step), (2, before_its_first_step)]
)
def test_a_run_that_is_ended_before_its_first_step_says_so(size: int, moment: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    command = ["fit", "--allow-import", "tiny", "--config", "c.yaml", "--out", "run"]
    ranks = launching.start(command, tmp_path, size=size, before=dict.fromkeys(range(size), moment))
    assert ranks.wait(60) == [-signal.SIGTERM] * size
    assert ranks.told(0).endswith(
        "\nrun: ended by SIGTERM. There is no checkpoint yet; the same command begins again.\n"
    )
    assert size == 1 or "SIGTERM" not in ranks.told(1)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_handler_that_somebody_has_set_stays() -> None:
    def mine(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with stopping.told_of_sigterm(str):
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with stopping.told_of_sigterm(str):
            outer = signal.getsignal(signal.SIGTERM)
            with stopping.told_of_sigterm(str):
                assert signal.getsignal(signal.SIGTERM) not in (outer, signal.SIG_DFL)
            assert signal.getsignal(signal.SIGTERM) is outer
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def never_comes() -> None:
    time.sleep(60)


def ends_while_it_waits() -> None:
    setup = DDPStrategy.setup_environment

    def ended(self: DDPStrategy) -> None:
        threading.Timer(0.5, end).start()
        setup(self)

    DDPStrategy.setup_environment = ended


def test_a_process_that_waits_for_another_one_is_ended_as_well(tmp_path: Path) -> None:
    """It waits in PyTorch, where no handler is run."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    command = ["fit", "--allow-import", "tiny", "--config", "c.yaml", "--out", "run"]
    ranks = launching.start(command, tmp_path, before={0: ends_while_it_waits, 1: never_comes})
    ranks.processes[0].join(40)
    ranks.kill(1)
    assert ranks.wait(1)[0] == 128 + signal.SIGTERM, ranks.told(0)
    assert "\nrun: ended by SIGTERM. There is no checkpoint yet" in ranks.told(0)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_error_begins_a_line_below_the_bar(batch: int, tmp_path: Path, capsys, monkeypatch) -> None:
    calls, run = [], Task.run_model

    def broken(self: Task, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == batch:
            raise UserError("Another process has ended.")
        return run(self, *arguments)

    monkeypatch.setattr(Task, "run_model", broken)
    (tmp_path / "c.yaml").write_text(CONFIG.replace("enable_progress_bar: false", "num_sanity_val_steps: 0"))
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "First step (kernels are compiled)" in told
    assert told.endswith("\nmambaseq fit: Another process has ended.\n")
