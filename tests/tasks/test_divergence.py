"""A run whose loss or weights are not finite stops there, keeps its last good checkpoint and writes nothing of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import lightning
import pytest
import torch
from tiny import TinyTokens

from mambaseq.batch import Batch
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.metrics.base import Metric
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.finite import Diverged, FiniteGuard, first_wrong, largest

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens"}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
optimizer: {lr: 1.0e-2}
checkpoint: {every_n_steps: 1, monitor: val/bits_per_token}
trainer: {max_steps: 6, accelerator: cpu, enable_progress_bar: false, val_check_interval: 2,
  check_val_every_n_epoch: null}
"""


class Breaker(lightning.Callback):
    """Makes the loss, or a weight after the step, infinite at a step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step and self.what == "loss":
            run_model = pl_module.run_model

            def broken(*arguments, **options):
                pl_module.run_model = run_model
                output = run_model(*arguments, **options)
                output.loss = output.loss * torch.inf
                return output

            pl_module.run_model = broken

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.step and self.what == "weight":
            with torch.no_grad():
                pl_module.model.encoder.embedding.weight[0, 0] = torch.inf


class Overflow(lightning.Callback):
    """Makes the loss of the second validation infinite or NaN, as weights do that are finite and very large."""

    def __init__(self, value: str) -> None:
        self.value = float(value)

    def on_validation_start(self, trainer, pl_module) -> None:
        run_model = type(pl_module).run_model

        def broken(*arguments, **options):
            output = run_model(pl_module, *arguments, **options)
            output.loss = output.loss * (self.value if trainer.global_step == 4 and not pl_module.training else 1)
            return output

        pl_module.run_model = broken


class Untargeted(TinyTokens):
    """A validation set in which nothing is to be predicted."""

    def validation(self) -> list[Batch]:
        items = super().validation()
        batches = [items[index] for index in range(len(items))]
        return [dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100)) for batch in batches]


class Undefined(Metric):
    """A metric that has no value."""

    higher_is_better = False

    def update(self, output, batch) -> None:
        pass

    def compute(self) -> torch.Tensor:
        return torch.tensor(torch.nan)


def config(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return ["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]


def assert_finite(out: Path) -> None:
    for path in (out / "checkpoints").glob("*.ckpt"):
        assert all(tensor.isfinite().all() for tensor in read_checkpoint(path)["state_dict"].values())
    assert not RunFolder(out).weights.exists()
    assert not RunFolder(out).results.exists()


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(tmp_path: Path, capsys) -> None:
    begin = config(tmp_path)
    out = tmp_path / "run"
    assert main([*begin, "--trainer.max_steps=3"]) == 0
    capsys.readouterr()
    assert main(["fit", "--resume", str(out), "--trainer.max_steps=9", "--optimizer.lr=1e30"]) == 1
    told = capsys.readouterr().err
    paragraph = next(line for line in told.splitlines() if "diverged" in line)
    assert len(paragraph) < 1000
    assert "not finite after step 4" in paragraph
    assert f"of step 3. Resume from there: mambaseq fit --resume {out} --optimizer.lr LOWER" in paragraph
    assert read_checkpoint(RunFolder(out).last)["global_step"] == 3
    assert_finite(out)
    page = RunFolder(out).report
    for text in ('bad">diverged', "resumed once", "not finite after step 4"):
        assert text in page.read_text()
    assert main(["fit", "--resume", str(out), "--optimizer.lr=1e-3"]) == 0
    assert 'good">finished' in page.read_text()
    assert RunFolder(out).read_results()["steps"] == 9


def test_a_run_that_diverges_at_once_can_be_begun_anew(tmp_path: Path, capsys) -> None:
    begin = config(tmp_path)
    assert main([*begin, "--optimizer.lr=1e30", "--optimizer.schedule=constant"]) == 1
    assert "There is no checkpoint yet" in capsys.readouterr().err
    assert_finite(tmp_path / "run")
    assert main(begin) == 0


@pytest.mark.parametrize("what", ["loss", "weight"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_stops_before_anything_is_saved(tmp_path: Path, monkeypatch, capsys, what: str, device: str) -> None:
    """On a GPU it is looked at every 10 steps, and before a checkpoint is written or a validation begins."""
    if device == "cuda":
        monkeypatch.setattr(FiniteGuard, "every_n_steps", lambda self, trainer, pl_module: trainer.log_every_n_steps)
    begin = config(tmp_path)
    breaker = f'[{{"class_path": "tasks.test_divergence.Breaker", "init_args": {{"step": 2, "what": "{what}"}}}}]'
    more = ["--checkpoint.every_n_steps=2", "--trainer.val_check_interval=5", f"--trainer.callbacks={breaker}"]
    assert main([*begin, *more]) == 1
    told = capsys.readouterr().err
    seen = 3 if device == "cpu" or what == "loss" else 4  # the step of a loss is kept on the device
    assert f"not finite after step {seen}" in told
    assert read_checkpoint(RunFolder(tmp_path / "run").last)["global_step"] == 2
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_validation_without_a_finite_loss_ends_the_run(tmp_path: Path, capsys, value: str) -> None:
    begin = config(tmp_path)
    overflow = f'[{{"class_path": "tasks.test_divergence.Overflow", "init_args": {{"value": "{value}"}}}}]'
    assert main([*begin, "--checkpoint.every_n_steps=2", f"--trainer.callbacks={overflow}"]) == 1
    assert "val/loss is not finite after step 4" in capsys.readouterr().err
    assert read_checkpoint(RunFolder(tmp_path / "run").last)["global_step"] == 2
    assert_finite(tmp_path / "run")


def test_a_validation_set_without_targets_has_no_loss_and_ends_nothing(tmp_path: Path) -> None:
    assert main([*config(tmp_path), "--data.name=tasks.test_divergence:Untargeted"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["val/bits_per_token"] is None
    assert results["steps"] == 6


def test_a_metric_without_a_value_is_null(tmp_path: Path) -> None:
    begin = config(tmp_path)
    assert main([*begin, "--metrics=[tasks.test_divergence:Undefined]", "--checkpoint.monitor=val/Undefined"]) == 0
    text = (tmp_path / "run" / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert results["val/Undefined"] is None
    assert results["exported_step"] == 6  # such a score is never the best
    assert main(["test", "--checkpoint", str(tmp_path / "run")]) == 0
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)["test/Undefined"]
        is None
    )


def test_what_is_finite_and_what_is_not() -> None:
    model = torch.nn.Linear(2, 2)
    assert first_wrong(model) == ""
    for value in (torch.nan, -torch.inf, 1e30):
        with torch.no_grad():
            model.bias[1] = value
        assert first_wrong(model) == "bias"
    assert largest([]) is None
    assert float(largest([torch.tensor([3 + 4j]), torch.zeros(0), torch.tensor([-2.0])])) == 5


def test_the_first_bad_step_is_kept_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = FiniteGuard()

    class Anywhere:
        global_step, log_every_n_steps, world_size = 0, 1000, 1

    class Module(torch.nn.Linear):
        device = torch.device("meta")

    module = Module(1, 1)
    for step, loss in enumerate([1.0, torch.inf, torch.nan, 1.0]):
        Anywhere.global_step = step
        guard.on_train_batch_start(Anywhere, module, None, 0)
        guard.on_train_batch_end(Anywhere, module, {"loss": torch.tensor(loss)}, None, 0)
    with pytest.raises(Diverged, match="after step 2"):
        guard.check(Anywhere, module)
