"""What the progress bar says, and where."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from mambaseq.cli.main import main
from mambaseq.tasks import bar as bars
from mambaseq.tasks.bar import Bar

CONFIG = """
data: {name: "tiny:TinyTokens"}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
trainer: {accelerator: cpu, max_steps: 3, val_check_interval: 2, log_every_n_steps: 1, limit_val_batches: 1}
"""


def test_the_bar_is_on_standard_error_and_ends_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    out = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "kernels are compiled" in told.err
    assert told.err.endswith("]\n")  # what is said next begins a line
    assert "3/3" in told.err.replace("\r", "\n").splitlines()[-2] + told.err.splitlines()[-1]
    assert not re.search(r"v_num|\d/\d|it/s", told.out)
    assert "v_num" not in told.err
    assert re.search(r"train/loss=\d", told.err)
    assert main(["fit", "--resume", str(out), "--trainer.max_steps", "5"]) == 0
    told = capsys.readouterr()
    assert f"{out}: goes on from step 3\n" in told.err
    lines = [line for line in told.err.replace("\r", "\n").splitlines() if re.match("Epoch|First", line)]
    found = re.findall(r" (\d+)/(\d+|\?) ", "\n".join(lines))
    assert found[0] == ("3", "5")
    assert found[-1] == ("5", "5")
    assert {total for _, total in found} == {"5"}
    assert main(["validate", "--checkpoint", str(out)]) == 0
    told = capsys.readouterr()
    assert "Validation" in told.err
    assert told.err.count("First batch (kernels are compiled)") == 1
    assert not re.search(r"\d/\d|it/s", told.out)


def test_compiling_is_no_part_of_the_speed_and_the_bar_ends_with_the_run() -> None:
    clock = [0.0]
    bar: Any = Bar()
    bar.get_metrics = lambda *_: {}
    bar.train_progress_bar = line = Tqdm(total=8, file=io.StringIO())
    line._time = lambda: clock[0]
    line.start_t = 0.0
    progress = SimpleNamespace(current=SimpleNamespace(ready=3))
    trainer: Any = SimpleNamespace(current_epoch=0, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))
    trainer.fit_loop.epoch_loop.batch_progress = progress
    for number, seconds in enumerate((60.0, 1.0, 1.0)):
        clock[0] += seconds
        bar._drawn = -1e9
        bar.on_train_batch_end(trainer, None, None, None, number)
    told = line.format_dict
    assert (told["n"], told["initial"], told["elapsed"]) == (3, 1, 2.0)
    bar.on_train_end(trainer, None)  # of 8: stopped early
    assert "3/3" in line.fp.getvalue().replace("\r", "\n").splitlines()[-1]
    other: Any = Bar()  # another process's, which shows nothing
    other.get_metrics = bar.get_metrics
    other.train_progress_bar = Tqdm(total=8, disable=True)
    other.on_train_batch_end(trainer, None, None, None, 0)
    other.on_train_end(trainer, None)
    other.disable()
    assert not other._should_update(8, 8)  # it would wait for a GPU


def test_the_loss_of_a_gpu_is_that_of_when_the_bar_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Of:
        def __init__(self, number: Any) -> None:
            self.number = number

        def read(self) -> float:
            read.append(self.number.step)
            return 0.5 * self.number.step

    monkeypatch.setattr(bars, "Later", Of)
    trainer: Any = SimpleNamespace(progress_bar_metrics={}, loggers=[], callback_metrics={})
    late, now = [0.5, 0.5, 1.0], [0.5, 1.0, 1.5]
    for is_cuda, every, told in ((True, 0.2, late), (True, 30.0, now), (False, 0.2, now)):
        bar = Bar()
        bar._every = every
        assert bar.get_metrics(trainer, None) == {}  # type: ignore[arg-type]
        found = []
        for step in (1, 2, 3):
            trainer.callback_metrics["train/loss"] = SimpleNamespace(is_cuda=is_cuda, step=step)
            found.append(bar.get_metrics(trainer, None).get("train/loss"))  # type: ignore[arg-type]
        assert found == told
        bar._train_progress_bar = line = Tqdm(total=3, file=io.StringIO())
        bar.on_train_epoch_end(trainer, None)  # what stays in sight is the last
        assert "train/loss=1.500" in line.postfix
        bar.on_train_start()
        assert bar._loss is None
        trainer.callback_metrics.clear()
    assert read == [1, 1, 2, 3, *([1, 2, 3, 3] * 2)]


@pytest.mark.parametrize(("command", "option"), [("fit", "--config"), ("test", "--checkpoint")])
def test_a_word_without_an_option_is_told_from_an_option(command: str, option: str, capsys) -> None:
    assert main([command, "text/demo"]) == 2
    told = capsys.readouterr().err
    assert option in told
