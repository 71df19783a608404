"""When a run validates, on what, with which weights, and what it says of its training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from tasks.test_resume import CONFIG, fit
from tasks.watching import NORMS
from tiny import Items, TinyTokens

from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.data.module import named_sets
from mambaseq.errors import DataError
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.callbacks import Throughput


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


class SeveralSets(TinyTokens):
    """Args: only: one of the sets alone."""

    def __init__(self, length: int = 16, size: int = 20, endless: bool = False, only: str = "") -> None:
        super().__init__(length, size, endless)
        self.only = only

    def validation(self) -> Any:
        sets = {"near": Items(1, 6, self.length, 7, False), "far": Items(3, 4, self.length // 2, 7, False)}
        return sets[self.only] if self.only else sets

    def test(self) -> Any:
        return self.validation()


def test_several_validation_sets(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    name = "--data.name=tasks.test_validation:SeveralSets"
    fit(config, out, name, "--trainer.max_steps=5", "--checkpoint.monitor=val/far/bits_per_token")
    found = RunFolder(out).read_results()
    one, other = found["val/near/bits_per_token"], found["val/far/bits_per_token"]
    assert one != other
    assert found["val/bits_per_token"] == pytest.approx((one + other) / 2)
    losses = [dict(RunFolder(out).curve(f"val/{part}loss")) for part in ("near/", "far/", "")]
    for step, loss in losses[2].items():
        assert loss == pytest.approx((losses[0][step] + losses[1][step]) / 2)
    for part, value in (("near", one), ("far", other)):
        for command, stage in (("validate", "val"), ("test", "test")):
            assert main([command, "--checkpoint", str(out), f"--data.only={part}"]) == 0
            assert RunFolder(out).read_results()[f"{stage}/bits_per_token"] == pytest.approx(value)


@pytest.mark.parametrize("names", [{"a/b": 1}, {"": 1}, {1: 1}])
def test_names_of_sets(names: dict) -> None:
    assert named_sets(None) == {}
    assert named_sets([1]) == {"": [1]}
    with pytest.raises(DataError, match="validation or test set is named"):
        named_sets(names)


def test_a_run_validates_and_saves_by_tokens(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 64 tokens, or 32 once batches are halved, whatever the epoch's end, at step 5."""
    saved = []
    write = lightning.Trainer.save_checkpoint
    monkeypatch.setattr(
        lightning.Trainer,
        "save_checkpoint",
        lambda self, path, *rest, **more: (saved.append((self.global_step, Path(path).name)), write(self, path)),
    )
    out = tmp_path / "run"
    every = ["--checkpoint.val_every_n_tokens=150", "--checkpoint.every_n_tokens=100", "--checkpoint.every_n_steps=99"]
    fit(config, out, *every, "--trainer.max_steps=7", "--checkpoint.monitor=")
    assert [step for step, _ in RunFolder(out).curve("val/loss")] == [2, 4, 6]  # 192, 320, and the last
    assert [step for step, name in saved if name == "last.ckpt"] == [2, 4, 5, 7, 7]  # 128, 256, 320, 448, the end
    more = ["--trainer.max_steps=16", "--loader.batch_size=2"]
    assert main(["fit", "--resume", str(out), *more]) == 0
    assert [step for step, _ in RunFolder(out).curve("val/loss")] == [2, 4, 6, 7, 11, 15]  # 480, 608, the last


def test_the_average_is_validated_and_exported(config: Path, tmp_path: Path) -> None:
    options = ("--optimizer.schedule=constant", "--optimizer.warmup_steps=0", "--model.backbone.dropout=0")
    raw = [fit(config, tmp_path / "0", *options, "--optimizer.lr=0", "--trainer.max_steps=1")]
    raw += [fit(config, tmp_path / f"{n}", *options, f"--trainer.max_steps={n}") for n in (1, 2)]
    out = tmp_path / "run"
    last = fit(config, out, *options, "--trainer.max_steps=2", "--ema.decay=0.2")
    exported = load_model(out).model.state_dict()
    for name, weight in exported.items():
        weights = [tensors[f"model.{name}"] for tensors in raw]
        assert torch.equal(last[f"model.{name}"], weights[2])
        first = 2 / 11 * weights[0] + 9 / 11 * weights[1]
        torch.testing.assert_close(weight, 0.2 * first + 0.8 * weights[2])  # 3 / 12 is more than 0.2
    before = RunFolder(out).read_results()
    assert before["val/bits_per_token"] != RunFolder(tmp_path / "2").read_results()["val/bits_per_token"]
    assert main(["validate", "--checkpoint", str(out)]) == 0
    assert RunFolder(out).read_results() == before


def test_the_first_of_several_processes_tells_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text("{}")
    monkeypatch.setattr("mambaseq.runs.evaluation.evaluate", lambda *_, **__: {"val/accuracy": 0.5})
    for variables, lines in (({}, 1), ({"LOCAL_RANK": "1"}, 0), ({"RANK": "2", "LOCAL_RANK": "0"}, 0)):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            assert main(["validate", "--checkpoint", str(tmp_path)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_an_average_of_tied_weights_and_of_a_run_on_its_way(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killer = '--trainer.callbacks=[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 4}}]'
    begin = ["fit", "--config", str(config), "--out", str(out), "--model.tie_embeddings=true", "--ema.decay=0.5"]
    with pytest.raises(ZeroDivisionError):
        main([*begin, "--checkpoint.monitor=", killer])
    saved = read_checkpoint(out / "checkpoints" / "last.ckpt")
    weight = load_model(out).model.encoder.embedding.weight
    assert torch.equal(weight, saved["average"]["head.linear.weight"])
    assert not torch.equal(weight, saved["state_dict"]["model.encoder.embedding.weight"])


def test_what_is_logged_of_a_training(config: Path, tmp_path: Path) -> None:
    NORMS.clear()
    out = tmp_path / "run"
    callback = '--trainer.callbacks=[{"class_path": "tasks.watching.Norms"}]'
    more = ("--trainer.log_every_n_steps=1", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=null")
    fit(config, out, *more, callback, "--trainer.max_steps=4", "--optimizer.schedule=constant")
    curves = {name: RunFolder(out).curve(f"train/{name}") for name in ("lr", "grad_norm", "memory_gib")}
    assert [value for _, value in curves["lr"]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert [value for _, value in curves["grad_norm"]] == pytest.approx(NORMS, rel=1e-4)
    assert 0.1 < curves["memory_gib"][-1][1] < 100


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any, dict[str, float], list[float]]:
    """A trainer, a module and a batch of 100 tokens; what is logged; a clock that stands until it is set."""
    logged: dict[str, float] = {}
    module = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(1, 1), log=logged.__setitem__)
    connector = SimpleNamespace(should_update_logs=True)
    trainer = SimpleNamespace(world_size=1, datamodule=None, _logger_connector=connector)
    clock = [0.0]
    monkeypatch.setattr("mambaseq.tasks.callbacks.time.perf_counter", lambda: clock[0])
    return trainer, module, SimpleNamespace(inputs=torch.zeros(2, 50)), logged, clock


def test_the_first_batch_is_no_part_of_the_speed(timed: Any) -> None:
    """Neither in a run that begins nor in one that goes on; the totals have all."""
    trainer, module, batch, logged, clock = timed
    found = Throughput()
    for durations in ((60, 1, 3), (50, 2)):
        state = json.loads(json.dumps(found.state_dict()))
        found = Throughput()
        found.load_state_dict(state)
        found.on_train_start(trainer, module)
        for number, seconds in enumerate(durations):
            found.on_train_batch_start(trainer, module, batch, number)
            clock[0] += seconds
            found.on_train_batch_end(trainer, module, None, batch, number)
    assert (found.tokens, found.seconds) == (500, 116)
    assert found.rate == logged["train/tokens_per_second"] == 300 / 6


def test_what_comes_between_batches_is_part_of_the_speed(timed: Any) -> None:
    """Waiting for data, for other processes, and for a GPU that was only asked: but not validating and saving."""
    trainer, module, batch, _, clock = timed
    found = Throughput()
    found.on_train_start(trainer, module)
    for number in range(4):
        found.on_train_batch_start(trainer, module, batch, number)
        clock[0] += 1
        found.on_train_batch_end(trainer, module, None, batch, number)
        clock[0] += 2  # until the next batch
        if number == 1:
            found.on_save_checkpoint(trainer, module, {})
            clock[0] += 100
        if number == 2:
            found.on_validation_start(trainer, module)
            clock[0] += 100
    assert found.rate == 300 / (3 * 3)  # the first batch of four is left out, and so is what follows the last


def test_what_is_logged_is_the_time_of_the_gpu_not_of_the_host_that_is_ahead(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host takes 1 s a batch, the GPU 4; the host waits for it only where the rate is logged."""
    trainer, module, batch, logged, clock = timed
    module.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    busy, waits = [0.0], []

    def wait(device: torch.device) -> None:
        waits.append(number)
        clock[0] = max(clock[0], busy[0])

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    found = Throughput()
    for number in range(8):
        trainer._logger_connector.should_update_logs = number in (3, 7)
        found.on_train_batch_start(trainer, module, batch, number)
        clock[0] += 1
        busy[0] = max(clock[0], busy[0]) + 4
        found.on_train_batch_end(trainer, module, None, batch, number)
        if number in (3, 7):
            assert logged["train/tokens_per_second"] == pytest.approx(100 / 4, rel=0.1)
    assert waits == [0, 3, 7]
