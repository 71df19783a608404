"""Laws 6 and 7: a run that was stopped or killed and resumed ends bit-identical to one that was not; two runs
of one seed are equal."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import launching
import lightning
import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyTokens

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs import training

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


class Signaller(lightning.Callback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


class Killer(lightning.Callback):
    """Dies in the middle of a step, or of the validation after it, as a crash does: nothing is saved then."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step and not self.validating:
            raise ZeroDivisionError

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step and self.validating:
            raise ZeroDivisionError


class OtherTokens(TinyTokens):
    def __init__(self, length: int = 16, size: int = 20, endless: bool = False) -> None:
        super().__init__(length, size, endless)
        self.vocab_size = 9


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Where a run with these options is that went through without a break. It is trained once, and is to be left alone:
    `copied` is not."""
    folder = tmp_path_factory.mktemp("finished")
    path, runs = folder / "run.yaml", {}
    path.write_text(CONFIG)

    def run(*options: str) -> Path:
        if options not in runs:
            runs[options] = folder / str(len(runs))
            fit(path, runs[options], *options)
        return runs[options]

    return run


@pytest.fixture
def copied(finished, tmp_path: Path) -> Callable[..., Path]:
    """A run of one's own that is finished (runs can be moved: `test_a_moved_run_knows_its_best_weights`)."""
    return lambda *options: Path(shutil.copytree(finished(*options), tmp_path / "run"))


def fit(config: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(["fit", "--config", str(config), "--out", str(out), *more]) == 0
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_same_end(one: Path, other: Path, *, curves: bool = False) -> None:
    """The runs end with the same weights, best ones, exported ones, their results, and what was logged on the way."""
    assert_equal(weights(one), weights(other))
    best, same = (read_checkpoint(out / "checkpoints" / "best.ckpt") for out in (one, other))
    assert best["global_step"] == same["global_step"]
    assert_equal(best["state_dict"], same["state_dict"])
    assert_equal(*(load_file(out / "model" / "model.safetensors") for out in (one, other)))
    timed = {"train_seconds", "tokens_per_second", "train_tokens"}  # a killed run trained some steps twice
    found, again = ({k: v for k, v in RunFolder(out).read_results().items() if k not in timed} for out in (one, other))
    assert found == again
    assert found["exported_step"] == best["global_step"]
    if curves:
        for name in ("train/loss", "val/bits_per_token"):
            points, others = (
                [(point.step, point.value, point.tokens) for point in RunFolder(out).points(name)]
                for out in (one, other)
            )
            assert len(points) > 2
            assert points == others
            assert all(tokens == 64 * (step + 1) for step, _, tokens in points)
            seconds = [point.seconds or 0 for point in RunFolder(other).points(name)]
            assert 0 < seconds[0] <= seconds[-1] == sorted(seconds)[-1]


# validation and checkpoint after the same steps; the loss falls, so "max" keeps the first weights
SPARSE = ("--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null", "--checkpoint.every_n_steps=4")
VARIANTS = [
    pytest.param(("--data.endless", "true"), (6, 11), id="endless"),
    pytest.param((), (5, 8), id="epochs"),
    pytest.param((*SPARSE, "--checkpoint.mode=min"), (9,), id="validated-when-saved"),
    pytest.param((*SPARSE, "--checkpoint.mode=max"), (5, 9), id="early-best"),
    pytest.param(("--checkpoint.every_n_steps=5",), (6,), id="saved-at-epoch-end"),
    pytest.param(("--loader.num_workers", "2"), (7,), id="two-workers"),
    pytest.param(("--trainer.accumulate_grad_batches", "2"), (5,), id="accumulated"),
    pytest.param(
        (
            *("--optimizer.name=muon", "--optimizer.schedule=wsd", '--finetune.lr_of={"head": 0.5}'),
            *("--finetune.freeze=[backbone]", '--finetune.unfreeze={"backbone.layers.0.mixer": 6}'),
        ),
        (5, 8),
        id="muon-thawing",
    ),
    pytest.param(("--ema.decay=0.9", "--checkpoint.val_every_n_tokens=256"), (9,), id="average-by-tokens"),
]


@pytest.mark.parametrize(("options", "steps"), VARIANTS)
def test_killed_and_resumed_is_bit_identical(config: Path, tmp_path: Path, finished, options, steps) -> None:
    """The steps before it was killed are those of a second run of the seed, which end alike, too."""
    whole = finished(*options)
    for step in steps:
        out = tmp_path / f"killed{step}"
        killer = f'[{{"class_path": "tasks.test_resume.Killer", "init_args": {{"step": {step}}}}}]'
        with pytest.raises(ZeroDivisionError):
            main(["fit", "--config", str(config), "--out", str(out), *options, f"--trainer.callbacks={killer}"])
        saved = read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"]
        assert 0 < saved <= step
        assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
        assert_same_end(whole, out)


@pytest.mark.parametrize("options", [(), ("--data.endless", "true")], ids=["epochs", "endless"])
def test_two_runs_of_one_seed_are_equal(config: Path, tmp_path: Path, finished, options: tuple[str, ...]) -> None:
    fit(config, tmp_path / "again", *options)
    assert_same_end(finished(*options), tmp_path / "again")


def test_killed_in_a_validation_and_resumed_validates_again(config: Path, tmp_path: Path) -> None:
    options = (*SPARSE, "--checkpoint.every_n_steps=2", "--checkpoint.mode=max")
    fit(config, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    killer = '[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 4, "validating": true}}]'
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--config", str(config), "--out", str(out), *options, f"--trainer.callbacks={killer}"])
    assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
    assert_same_end(tmp_path / "whole", out)


@pytest.mark.parametrize("step", [3, 5, 12], ids=["validation due", "not due", "last step"])
def test_ctrl_c_drops_nothing(config: Path, tmp_path: Path, finished, step: int) -> None:
    options = (*SPARSE, "--checkpoint.mode=max", "--trainer.log_every_n_steps=1")
    out = tmp_path / "stopped"
    callback = f'[{{"class_path": "tasks.test_resume.Signaller", "init_args": {{"step": {step}}}}}]'
    code = main(["fit", "--config", str(config), "--out", str(out), *options, f"--trainer.callbacks={callback}"])
    if step == 12:
        assert code == 0  # there was nothing left to stop
    else:
        assert code == 130
        assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == step + 1
        assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
    assert_same_end(finished(*options), out, curves=True)


def start(config: Path, out: Path, *more: str) -> launching.Ranks:
    """`fit` in a process of its own, which is forked: its imports would take most of the test's time."""
    command = ["fit", "--allow-import", "tiny", "--config", str(config), "--out", str(out), *more]
    # as many threads as here: sums are cut into as many parts, and rounded accordingly
    threads = functools.partial(torch.set_num_threads, torch.get_num_threads())
    return launching.start(command, out.parent / "process", size=1, before={0: threads})


def wait_for(path: Path, ranks: launching.Ranks) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert ranks.processes[0].is_alive(), ranks.told(0)
        assert time.monotonic() < deadline
        time.sleep(0.05)


# many steps are left when the first checkpoint is seen
MANY = ("--trainer.max_steps", "100", "--checkpoint.every_n_steps", "10")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signals_leave_a_resumable_run(config: Path, tmp_path: Path, finished, number: signal.Signals) -> None:
    out = tmp_path / "signalled"
    ranks = start(config, out, *MANY)
    wait_for(out / "checkpoints" / "last.ckpt", ranks)
    os.kill(ranks.processes[0].pid, number)
    assert ranks.wait(60) == [130 if number == signal.SIGINT else -signal.SIGKILL], ranks.told(0)
    if number == signal.SIGINT:
        assert f"mambaseq fit --resume {out}" in ranks.told(0)
    assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] < 100
    assert main(["fit", "--resume", str(out)]) == 0
    assert_equal(weights(finished(*MANY)), weights(out))


def test_best_weights_are_exported_and_history_is_kept(copied) -> None:
    from mambaseq.checkpoints import load_model

    out = copied()
    best = read_checkpoint(out / "checkpoints" / "best.ckpt")["state_dict"]
    loaded = load_model(out).model.state_dict()
    assert_equal(
        {f"model.{k}": v for k, v in loaded.items()}, {k: v for k, v in best.items() if k.startswith("model.")}
    )
    before = RunFolder(out).read_results()
    assert main(["validate", "--checkpoint", str(out)]) == 0
    assert RunFolder(out).read_results() == before
    assert main(["fit", "--resume", str(out), "--trainer.max_steps", "15"]) == 0
    steps = [step for step, _ in RunFolder(out).curve("val/loss")]
    assert steps[0] < 10 < steps[-1]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_results_are_those_of_the_exported_weights(copied, mode: str) -> None:
    out = copied(*SPARSE, f"--checkpoint.mode={mode}")
    results = RunFolder(out).read_results()
    assert results["steps"] == 13
    assert results["exported_step"] == (4 if mode == "max" else 13)  # the last step is validated, whatever the interval
    curve = dict(RunFolder(out).curve("val/bits_per_token"))
    assert results["val/bits_per_token"] == pytest.approx(curve[results["exported_step"] - 1], rel=1e-6)
    assert main(["validate", "--checkpoint", str(out)]) == 0
    assert RunFolder(out).read_results() == results


def test_without_a_monitor_the_last_weights_are_exported_and_validated(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(config, out, *SPARSE, "--checkpoint.monitor=")
    results = RunFolder(out).read_results()
    assert results["exported_step"] == 13
    assert main(["validate", "--checkpoint", str(out)]) == 0
    assert RunFolder(out).read_results() == results


def test_a_moved_run_knows_its_best_weights(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "run", *SPARSE, "--checkpoint.mode=max")
    moved = (tmp_path / "run").rename(tmp_path / "moved")  # nothing is left where it was
    assert main(["fit", "--resume", str(moved), "--trainer.max_steps", "17"]) == 0
    assert RunFolder(moved).read_results()["exported_step"] == 4


def test_an_existing_run_is_not_overwritten(config: Path, copied, capsys) -> None:
    out = copied()
    before = weights(out)
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert_equal(before, weights(out))


def test_a_resumed_run_forgets_its_former_end(config: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Stopped after a resume, its weights, results and settings are those of the resume."""
    from mambaseq.checkpoints import load_model

    out = tmp_path / "run"
    fit(config, out, "--checkpoint.monitor=", "--trainer.max_steps=5")
    assert load_model(out).card.step == 5
    callback = '[{"class_path": "tasks.test_resume.Signaller", "init_args": {"step": 8}}]'
    more = ["--trainer.max_steps=13", f"--trainer.callbacks={callback}"]
    page, left = RunFolder(out).report, []
    assert 'good">finished' in page.read_text()
    write = training.write_report
    monkeypatch.setattr(training, "write_report", lambda *rest: (left.append(page.exists()), write(*rest))[1])
    assert main(["fit", "--resume", str(out), *more]) == 130
    assert left == [False]  # a run that is killed has no page that says it has finished
    assert 'bad">interrupted' in page.read_text()
    assert "resumed once" in page.read_text()
    loaded = load_model(out)
    assert loaded.card.step == 9
    assert loaded.source == out / "checkpoints" / "last.ckpt"
    assert_equal({f"model.{k}": v for k, v in loaded.model.state_dict().items()}, weights(out))
    assert RunFolder(out).read_results() == {}
    capsys.readouterr()
    assert main(["test", "--checkpoint", str(out)]) == 0
    assert "the weights of step 9 (checkpoints/last.ckpt)" in capsys.readouterr().out
    assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0  # as far as the first resume wanted
    assert load_model(out).card.step == RunFolder(out).read_results()["steps"] == 13
    assert main(["test", "--checkpoint", str(out)]) == 0
    assert ">test</th>" in page.read_text()  # results that come later are on the page, too


def test_a_run_that_goes_on_is_read_from_its_best_checkpoint(copied) -> None:
    from mambaseq.checkpoints import load_model

    out = copied(*SPARSE, "--checkpoint.mode=max")
    callback = '[{"class_path": "tasks.test_resume.Signaller", "init_args": {"step": 14}}]'
    more = ["--trainer.max_steps=20", f"--trainer.callbacks={callback}"]
    assert main(["fit", "--resume", str(out), *more]) == 130
    assert load_model(out).card.step == 4
    assert main(["fit", "--resume", str(out), "--trainer.callbacks=null", "--checkpoint.monitor="]) == 0
    assert load_model(out).card.step == 20
    assert not RunFolder(out).best.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_has_nothing_to_do(config: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    fit(config, out)
    before = contents(out)
    for options in ([], ["--trainer.max_steps=3"], ["--trainer.max_epochs=1"]):
        capsys.readouterr()
        assert main(["fit", "--resume", str(out), *options]) == 0
        printed = capsys.readouterr()
        assert printed.out.count("\n") == 1
        assert "nothing to do, the run is at step 13" in printed.out
        assert contents(out) == before


def test_a_resume_that_is_refused_changes_nothing(copied) -> None:
    out = copied()
    before = contents(out)
    assert main(["fit", "--resume", str(out), "--trainer.max_steps=20", "--trainer.val_check_interval=100"]) == 2
    after = contents(out)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("command", ["fit", "test", "validate"])
def test_the_model_of_a_run_cannot_change(copied, capsys, command: str) -> None:
    out = copied()
    before = contents(out)
    run = ["--resume", str(out), "--trainer.max_steps=15"] if command == "fit" else ["--checkpoint", str(out)]
    capsys.readouterr()
    assert main([command, *run, "--model.d_model=16", "--model.mixer.name=s4d"]) == 2
    assert "model.d_model, model.mixer." in capsys.readouterr().err
    assert contents(out) == before
    assert main([command, *run, "--model.d_model=8", "--loader.batch_size=2"]) == 0  # as it is


def test_data_of_another_vocabulary_are_refused_on_resume(copied, capsys) -> None:
    out = copied()
    before = contents(out)
    assert main(["fit", "--resume", str(out), "--data.name=tasks.test_resume:OtherTokens"]) == 2
    assert "do not fit the model" in capsys.readouterr().err
    assert contents(out) == before


def test_what_computes_and_regularizes_a_model_may_change(copied) -> None:
    out = copied()
    more = ["--trainer.max_steps=15", "--model.backbone.dropout=0", "--model.mixer.backend=reference"]
    assert main(["fit", "--resume", str(out), *more]) == 0
    assert RunFolder(out).read_results()["steps"] == 15
