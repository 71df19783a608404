"""Sweeps: ordinary runs side by side, which go on where they were left, and the best settings."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mambaseq as ms
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, UserError
from mambaseq.plain import dump_yaml, read_yaml
from mambaseq.reporting.runs import RunFolder, RunInUse
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.trials import Range, propose, read_plan

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens", size: 20}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
checkpoint: {monitor: val/bits_per_token}
trainer: {max_steps: 3, accelerator: cpu, enable_progress_bar: false, gradient_clip_val: null}
"""
ASKS = [{"class_path": "tasks.test_resume.Signaller", "init_args": {"step": 1}}]  # to stop after its second step


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    return tmp_path


def written(**plan: Any) -> list[str]:
    Path("sweep.yaml").write_text(dump_yaml({"config": "run.yaml", **plan}))
    return ["sweep", "sweep.yaml", "--out", "out"]


def test_a_grid_goes_on_where_it_was_left(here: Path, capsys: pytest.CaptureFixture) -> None:
    command = written(settings={"trainer.callbacks": ASKS}, grid={"optimizer": {"lr": [0.01, 1e30]}})
    assert main(command) == 130
    told = capsys.readouterr()
    assert "trial 1 of 2: optimizer.lr 0.01" in told.out
    assert "Interrupted after step 2. Continue with the same command." in told.err
    assert not Path("out/trial-002").exists()
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("trial 2 of 2: diverged: ") for line in lines)
    at = next(number for number, line in enumerate(lines) if line.startswith("run "))
    assert lines[at].split()[:3] == ["run", "score", "optimizer.lr"]
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == ["out/trial-001", "out/trial-002"]
    assert lines[at + 2].split()[1] == "diverged"
    # a trial is the run that `fit` makes of its settings
    assert main(["fit", "--config", "run.yaml", "--out", "alone", "--optimizer.lr=0.01"]) == 0
    alone, trial = (load_file(f"{run}/model/model.safetensors") for run in ("alone", "out/trial-001"))
    assert all(torch.equal(alone[name], trial[name]) for name in alone)
    # what has finished stays
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("trial-*/**/*")}
    found = ms.sweep("sweep.yaml", out="out")
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("trial-*/**/*")} == before
    assert [trial.status for trial in found.trials] == ["finished", "diverged"]
    assert found.best is found.trials[0]
    assert (found.metric, found.mode) == ("val/bits_per_token", "min")
    assert found.best.score == RunFolder("alone").read_results()["val/bits_per_token"]
    assert found.config is not None
    best, own = (parse_config(str(path), []).settings for path in (found.config, "alone/config.yaml"))
    assert best == own
    assert main(written(grid={"optimizer.lr": [0.02]})) == 2
    assert "out holds another sweep: grid.optimizer.lr.choices, settings.trainer.callbacks" in capsys.readouterr().err


def test_seeds_are_runs_of_their_own_and_what_fails_is_tried_again(here: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("mambaseq.runs.sweep._gpus", lambda: 2)  # each trial on one of them
    plan = {"config": "run.yaml", "seeds": [3, 4], "metric": "val/loss", "grid": {"data.size": [20, 2]}}
    plan["settings"] = {"trainer": {"max_steps": 1}, "checkpoint.monitor": ""}
    found = ms.sweep(plan, out=here / "out", progress=False)
    assert [run.name for run in found.trials[0].runs] == ["trial-001-seed-3", "trial-001-seed-4"]
    curves = [RunFolder(run).curve("val/loss") for run in found.trials[0].runs]
    assert found.trials[0].score == statistics.fmean(curve[-1][1] for curve in curves)
    assert curves[0] != curves[1]
    assert found.config is not None
    own, best = (
        read_yaml(path)["trainer"]["devices"] for path in (found.trials[0].runs[0] / "config.yaml", found.config)
    )
    assert (str(own), best) == ("1", "auto")
    assert found.trials[1].status == "failed"  # no batch of 4 sequences among 2
    record = json.loads((here / "out/sweep.json").read_text())
    assert "training set has 2" in record["trials"][1]["message"]
    capsys.readouterr()
    assert ms.sweep(plan, out=here / "out", progress=False).trials == found.trials
    again = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert "trial 2 of 2" in again
    assert "trial 1 of 2" not in again
    Path("run.yaml").write_text(CONFIG.replace("batch_size: 4", "batch_size: 2"))
    with pytest.raises(ConfigError, match=r"another sweep: base\.loader\.batch_size changed"):
        ms.sweep(plan, out=here / "out", progress=False)
    with pytest.raises(UserError, match=r"none of 1 trials finished\. The first failed: "):
        ms.sweep({"config": "run.yaml", "grid": {"data.size": [1]}}, out=here / "none", progress=False)


def test_a_search(here: Path) -> None:
    pytest.importorskip("optuna")
    spaces = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "metrics": [[], ["bits_per_token"]]}
    plan: dict[str, Any] = {"config": "run.yaml", "search": spaces, "trials": 1, "mode": "max", "metric": "val/loss"}
    plan["settings"] = {"trainer.max_steps": 1, "checkpoint.monitor": ""}
    found = ms.sweep(plan, out="out", progress=False)
    assert found.mode == "max"
    assert found.best is not None
    again = ms.sweep(plan | {"trials": 2}, out="out", progress=False)  # more of them
    assert again.trials[:1] == found.trials
    assert again.best is not None
    assert again.best.score == max(trial.score or 0 for trial in again.trials)
    former = [(trial.settings, trial.score) for trial in found.trials]
    assert propose(read_plan(plan), 1, former, "max") == again.trials[1].settings


def test_what_a_search_proposes() -> None:
    pytest.importorskip("optuna")
    spaces = {
        "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "model.d_model": {"low": 8, "high": 32, "step": 8},
        "model.backbone.n_layers": {"low": 1, "high": 4},
        "model.backbone.pattern": {"choices": [["mamba"], ["mamba", "attention"]]},
    }
    plan = read_plan({"config": "text/demo", "search": spaces, "trials": 30})

    def proposals(seed: int, mode: str) -> list[dict[str, Any]]:
        former: list[tuple[dict[str, Any], float | None]] = []
        for number in range(30):
            settings = propose(
                read_plan({"config": "x", "search": spaces, "trials": 30, "seed": seed}), number, former, mode
            )
            former.append((settings, None if number % 7 == 3 else settings["model.backbone.n_layers"]))
        return [settings for settings, _ in former]

    found = proposals(0, "max")
    for settings in found:
        assert 1e-4 <= settings["optimizer.lr"] <= 1e-1
        assert settings["model.d_model"] in (8, 16, 24, 32)
        assert type(settings["model.backbone.n_layers"]) is int
        assert settings["model.backbone.pattern"] in (["mamba"], ["mamba", "attention"])
    assert found == proposals(0, "max")
    assert found[0] != proposals(1, "max")[0]
    assert sum(settings["optimizer.lr"] < 3e-3 for settings in found) > 5  # evenly by its logarithm
    late = [settings["model.backbone.n_layers"] for settings in found[15:]]
    assert (
        statistics.fmean(late)
        > 3
        > 2
        > statistics.fmean(settings["model.backbone.n_layers"] for settings in proposals(0, "min")[15:])
    )
    assert plan.search["model.d_model"] == Range(8, 32, step=8)


def test_steps_that_floats_do_not_hit_exactly() -> None:
    pytest.importorskip("optuna")
    spaces = {
        "optimizer.weight_decay": {"low": 0, "high": 1, "step": 0.3333333333},
        "optimizer.lr": {"low": 10000.5, "high": 20000.5, "step": 12.25},
        "trainer.gradient_clip_val": {"low": 1e9, "high": 1e9 + 1, "step": 1e-4},
        "model.d_model": {"low": 8, "high": 31, "step": 8},
    }
    plan = read_plan({"config": "x", "search": spaces, "trials": 12})
    former: list[tuple[dict[str, Any], float | None]] = []
    for number in range(12):
        former.append((propose(plan, number, former, "min"), float(number)))
    found = [settings for settings, _ in former]
    assert {one["optimizer.weight_decay"] for one in found} <= {0.0, 0.3333333333, 0.6666666666, 0.9999999999}
    assert all((one["optimizer.lr"] - 10000.5) % 12.25 == 0 for one in found)
    assert {one["model.d_model"] for one in found} == {8, 16, 24}
    assert max(one["model.d_model"] for one in plan.to_check()) == 24


GRID = {"optimizer.lr": [0.1]}


def test_too_little_memory_is_a_failed_trial_and_a_run_that_is_in_use_an_end(here: Path, monkeypatch) -> None:
    def fails(error: BaseException) -> None:
        def fit(*arguments: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr("mambaseq.runs.sweep.fit", fit)

    plan = {"config": "run.yaml", "grid": {"optimizer.lr": [0.1, 0.2]}}
    fails(torch.OutOfMemoryError("Tried to allocate 9 GiB"))
    with pytest.raises(
        UserError, match=r"none of 2 trials finished\. The first failed: out of memory: Tried to allocate"
    ):
        ms.sweep(plan, out="out", progress=False)
    fails(RuntimeError("no such\nkernel"))
    with pytest.raises(UserError, match=r"none of 2 trials finished\. The first failed: RuntimeError: no such kernel"):
        ms.sweep(plan, out="out", progress=False)
    fails(RunInUse("process 7 trains there"))
    with pytest.raises(RunInUse):
        ms.sweep(plan, out="out", progress=False)
    record = json.loads(Path("out/sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["running", "failed"]


def test_a_score_that_is_not_finite_is_of_a_run_that_diverged(here: Path, monkeypatch) -> None:
    ended = SimpleNamespace(status="finished")
    monkeypatch.setattr("mambaseq.runs.sweep.fit", lambda *arguments, **options: ended)
    monkeypatch.setattr("mambaseq.runs.sweep._score", lambda *arguments: math.nan)
    with pytest.raises(UserError, match=r"The first diverged: nan/trial-001: val/bits_per_token is not finite"):
        ms.sweep({"config": "run.yaml", "grid": GRID}, out="nan", progress=False)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"gird": GRID}, "there is no key 'gird'. Did you mean 'grid'?"),
        ({"config": "nothing", "grid": GRID}, "No configuration is named 'nothing'"),
        ({"config": 3, "grid": GRID}, "config must name a configuration"),
        ({}, "give either grid"),
        ({"grid": GRID, "search": GRID, "trials": 1}, "give either grid"),
        ({"grid": {"optimizer.lr": 0.1}}, "optimizer.lr must be a list of values to try, not 0.1"),
        ({"grid": {"optimizer.lr": [1, 1]}}, "optimizer.lr has a value twice"),
        ({"grid": {"optimizer.lr": [0.1, "x"]}}, "with optimizer.lr x: "),
        ({"grid": {"optimizer.lrr": [1]}}, "there is no key 'optimizer.lrr'. Did you mean 'optimizer.lr'?"),
        ({"grid": GRID, "settings": {"trainer.max_step": 1}}, "there is no key 'trainer.max_step'"),
        ({"grid": GRID, "settings": {"print_config": ""}}, "sweep.yaml: settings: there is no key 'print_config'"),
        ({"grid": GRID, "settings": {"optimizer": {"lr": 1}}}, "optimizer.lr is in settings and in grid"),
        ({"grid": GRID, "settings": {"trainer.devices": 2}}, "trainer.devices is 2"),
        ({"grid": GRID, "trials": 1}, "trials is of a search"),
        ({"grid": GRID, "seeds": [1, 1]}, "seeds must be a list of different whole numbers"),
        ({"grid": {"seed": [1]}, "seeds": [1]}, "seed is a key of the trials"),
        ({"grid": GRID, "metric": "val/los"}, "metric: checkpoint.monitor is 'val/los', which this run does not log"),
        ({"grid": GRID, "mode": "least"}, "mode must be min or max"),
        ({"grid": {"optimizer.lr": list(range(20_000))}}, "MAMBASEQ_MAX_TRIALS"),
        (
            {"search": {f"model.a{n}.name": [1, 2, 3, 4] for n in range(9)}, "trials": 1},
            "sweep.yaml: search, with all names combined, asks for 262,144 configurations",
        ),
        ({"search": {"optimizer.lr": {"low": 1}}, "trials": 1}, "or {low: ..., high: ...}"),
        ({"search": {"optimizer.lr": {}}, "trials": 1}, "there is no low and no high in {}"),
        (
            {"search": {"optimizer.lr": {"choices": [1], "high": 2}}, "trials": 1},
            "has choices, or low and high, not both",
        ),
        (
            {"search": {"optimizer.lr": {"lo": 1, "high": 2}}, "trials": 1},
            "optimizer.lr: there is no key 'lo'. Did you mean 'low'?",
        ),
        (
            {"search": {"optimizer.lr": {"min": 1, "max": 2}}, "trials": 1},
            "optimizer.lr: there is no key 'min'. Did you mean 'low'?",
        ),
        (
            {"search": {"optimizer.lr": {"choice": [1]}}, "trials": 1},
            "optimizer.lr: there is no key 'choice'. Did you mean 'choices'?",
        ),
        ({"grid": {"lr": [1]}}, "grid: there is no key 'lr'. Did you mean 'optimizer.lr'?"),
        ({"search": {"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "trials": 1}, "low above 0"),
        ({"search": {"optimizer.lr": {"low": 2, "high": 1}}, "trials": 1}, "the first below the second"),
        ({"search": {"optimizer.lr": {"low": -1e308, "high": 1e308}}, "trials": 1}, "optimizer.lr: high - low"),
        ({"search": {"optimizer.lr": {"low": 0, "high": 1, "step": 1e-99}}, "trials": 1}, "step 1e-99 is too small"),
        ({"search": {"optimizer.lr": {"low": 1, "high": 2}}}, "trials must say how many"),
        ({"search": {"optimizer.lr": {"low": 1, "high": 2}}, "trials": 1}, "pip install 'mambaseq[sweep]'"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_the_first_trial(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, plan: dict[str, Any], told: str
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(written(**plan)) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message) < 1000
    assert not Path("out").exists()


def test_options_of_the_command_line_are_no_settings(here: Path) -> None:
    with pytest.raises(ConfigError, match="there is no key 'print_config'"):
        ms.fit("run.yaml", out="out", settings={"print_config": ""})


def test_a_record_that_is_damaged_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    command = written(grid=GRID)
    Path("out/trial-001").mkdir(parents=True)
    assert main(command) == 2
    assert "out holds trial-001, and no sweep" in capsys.readouterr().err
    Path("out/sweep.json").write_text('{"plan": {}, "trials": 3}')
    assert main(command) == 2
    assert "out/sweep.json must hold plan and trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"optimizer.lr": 0.2}},
        {"settings": {"optimizer.lr": "x"}},
        {"settings": {}},
        {"status": "finished"},
        {"score": 1.0},
        {"message": None},
    ],
)
def test_a_trial_that_is_damaged_is_refused(here: Path, monkeypatch, change: dict[str, Any]) -> None:
    def fit(*arguments: Any, **options: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr("mambaseq.runs.sweep.fit", fit)
    plan = {"config": "run.yaml", "grid": GRID}
    with pytest.raises(UserError, match="none of 1 trials"):
        ms.sweep(plan, out="out", progress=False)
    record = json.loads(Path("out/sweep.json").read_text())
    record["trials"][0] |= change
    Path("out/sweep.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"out/sweep\.json: trial 1 is damaged"):
        ms.sweep(plan, out="out", progress=False)


def test_settings_that_a_search_can_have() -> None:
    spaces = {
        "optimizer.lr": {"low": 0, "high": 1, "step": 0.3},
        "model.d_model": {"low": 8, "high": 16},
        "metrics": [[]],
    }
    plan = read_plan({"config": "x", "search": spaces, "trials": 1})
    fine = {"optimizer.lr": 0.9, "model.d_model": 9, "metrics": []}
    assert plan.tries(3, fine)
    for key, value in (
        *(("optimizer.lr", one) for one in (0.8, 1.2, -0.3, "x", None)),
        *(("model.d_model", one) for one in (17, 8.5, True)),
        ("metrics", ["a"]),
    ):
        assert not plan.tries(3, fine | {key: value})


def test_names_are_checked_in_all_combinations() -> None:
    names = {"model.mixer.name": ["mamba", "s4d"], "model.backbone.mlp": [True, False], "optimizer.lr": [0.1, 0.2]}
    plan = read_plan({"config": "x", "grid": names})
    found = list(plan.to_check())
    assert len(found) == plan.checks() == 8
    assert {(one["model.mixer.name"], one["model.backbone.mlp"]) for one in found} == {
        ("mamba", True),
        ("mamba", False),
        ("s4d", True),
        ("s4d", False),
    }


def test_a_sweep_goes_on_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_plan({"config": "run.yaml", "grid": GRID}).config
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert read_plan({"config": "../run.yaml", "grid": GRID}).config == before
