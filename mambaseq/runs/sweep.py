"""Sweeps: one run for each of several settings, side by side; and the settings that were best."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
import statistics
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from mambaseq.atomic import atomic_file, json_text, plain_values
from mambaseq.data.module import named_sets
from mambaseq.errors import ConfigError, UserError, cut, cut_list, paragraph, shown
from mambaseq.plain import flatten, read_json
from mambaseq.reporting.comparison import NUMBERS, Runs, compare
from mambaseq.reporting.runs import RunFolder, RunInUse, rank
from mambaseq.runs.config import RunConfig
from mambaseq.runs.naming import resolve_config
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.run import as_overrides
from mambaseq.runs.settings import read_settings
from mambaseq.runs.training import fit
from mambaseq.runs.trials import Mode, Plan, check_optuna, propose, read_plan, told
from mambaseq.specs import fits

RECORD = "sweep.json"
_ONE_DEVICE = "trainer.devices"

Status = Literal["running", "finished", "diverged", "failed"]


class Trial(NamedTuple):
    """Some settings and what became of them.

    number: from 0 on; lines and folders call it one more. settings: whole keys to values, over those of the
        configuration. score: the metric, a mean over the seeds; None if it did not finish. runs: the folder of its run
        for each seed. message: why it failed or diverged.
    """

    number: int
    settings: dict[str, Any]
    status: Status
    score: float | None
    runs: list[Path]
    message: str = ""


class Sweep(NamedTuple):
    """metric, mode: the metric to minimize or maximize. trials: all of them, in order. best: the best one; None if none
    finished. config: its settings as a YAML file that `fit --config` takes."""

    folder: Path
    metric: str
    mode: Mode
    trials: list[Trial]
    best: Trial | None
    config: Path | None

    def table(self) -> Runs:
        """The runs side by side, as `mambaseq runs` shows them, the best first and those that did not finish last. Of
        the settings that differ, those that were tried: others follow from them."""
        sign = -1 if self.mode == "max" else 1
        order = sorted(self.trials, key=lambda t: (t.score is None, sign * (t.score or 0.0), t.number))
        place = {run: (which, trial) for which, trial in enumerate(order) for run in trial.runs}
        found = compare([self.folder])
        rows = [row for row in zip(found.folders, found.rows, strict=True) if row[0].path in place]
        rows.sort(key=lambda row: place[row[0].path][0])
        scores = [place[run.path][1] for run, _ in rows]
        tried = ("seed", *self.trials[0].settings)
        columns = [
            number
            for number, name in enumerate(found.columns)
            if "/" in name or name in NUMBERS or any(name == key or name.startswith(f"{key}.") for key in tried)
        ]
        return found._replace(
            folders=[run for run, _ in rows],
            columns=["run", "score", *(found.columns[number] for number in columns)],
            rows=[
                [row[0], trial.status if trial.score is None else trial.score, *(row[number] for number in columns)]
                for (_, row), trial in zip(rows, scores, strict=True)
            ],
        )


def sweep(plan: str | Path | Mapping[str, Any], *, out: str | Path | None = None, progress: bool = True) -> Sweep:
    """Train a run for each of several settings, one after the other.

    plan: a YAML file, or what it would hold: `config`, and a `grid` of values or a `search` among ranges; see
        `mambaseq.runs.trials.Plan`. out: a folder for the runs; `runs/NAME` of the file when left out.

    The same call continues an interrupted sweep: finished runs stay, an interrupted run is resumed, and failed ones are
    tried again; only the number of a search's `trials` may have changed. A run that diverges or fails, for whatever
    reason, is a row of the table like others.

    Raises ConfigError before the first trial for a sweep or settings that cannot be used, UserError when no trial
    finished, and KeyboardInterrupt when one was interrupted.
    """
    read = read_plan(plan)
    folder = (
        Path(out) if out is not None else Path("runs") / ("sweep" if isinstance(plan, Mapping) else Path(plan).stem)
    )
    if read.search:
        check_optuna()
    if rank() != 0:
        raise ConfigError(
            "A sweep trains each trial in one process. Start it directly, not by torchrun or SLURM's srun."
        )
    RunFolder(folder).check_place(begins=False)
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds a run, and a sweep's runs need a folder of their own. Choose another --out.")
    first = _check(read)
    metric, mode = _goal(read, first)
    with RunFolder(folder).locked():
        record = _Record.opened(folder, read)
        several = first.trainer.get("devices", "auto") == "auto" and _gpus() > 1
        alone = [f"--{_ONE_DEVICE}=1"] if several else []
        trials = _run_all(read, record, metric, mode, alone, progress)
    return _ended(read, folder, metric, mode, trials)


def _gpus() -> int:
    return torch.cuda.device_count()


def _overrides(plan: Plan, settings: Mapping[str, Any], seed: int | None = None) -> list[str]:
    found = as_overrides(plan.config, {**plan.settings, **settings}, {})
    return found if seed is None else [*found, f"--seed={seed}"]


def _check(plan: Plan) -> RunConfig:
    """The configuration of the first trial. Raises ConfigError for settings that no run takes."""
    first = None
    for settings in plan.to_check():
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # notes that each run will make itself
                parsed = parse_config(plan.config, _overrides(plan, settings))
            _check_one_device(parsed)
            parsed.check_model()
        except ConfigError as error:
            where = f"{cut(plan.source, 200)}, of a trial with {cut(told(settings), 200)}"
            raise ConfigError(f"{where}: {error}") from error
        first = first or parsed
    assert first is not None
    return first


def _check_one_device(config: RunConfig) -> None:
    devices = config.trainer.get("devices", "auto")
    several = len(devices) != 1 if isinstance(devices, list) else devices not in ("auto", 1, "1")
    if several or config.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"{_ONE_DEVICE} is {cut(devices)} (trainer.num_nodes {config.trainer.get('num_nodes', 1)}), but a sweep "
            "trains each trial on one device. Set both to 1 under settings."
        )


def _goal(plan: Plan, first: RunConfig) -> tuple[str, Mode]:
    """The logged metric that trials are compared by, and whether its smallest or largest value is best. Raises
    ConfigError for one that the runs do not log."""
    data = first.make_data(setup=True)
    chosen = {**first.settings["checkpoint"]}
    if plan.metric is not None:
        chosen |= {"monitor": plan.metric, "mode": plan.mode}
    elif plan.mode is not None:
        chosen["mode"] = plan.mode
    chosen["monitor"] = chosen["monitor"] or "val/loss"
    sets = named_sets(data.validation())
    if not sets:
        raise ConfigError(f"{plan.config} has no validation set, so its trials cannot be compared.")
    asked = dataclasses.replace(first, settings={**first.settings, "checkpoint": chosen})
    try:
        metric, mode = asked.best(asked.make_metrics(data), filter(None, sets))
    except ConfigError as error:
        raise ConfigError(f"{cut(plan.source, 200)}, metric: {error}") from error
    return metric, "max" if mode == "max" else "min"


class _Record:
    """What a sweep has done so far, in its folder."""

    def __init__(self, folder: Path, plan: dict[str, Any], trials: list[Trial]) -> None:
        self.folder, self.plan, self.trials = folder, plan, trials

    @classmethod
    def opened(cls, folder: Path, plan: Plan) -> _Record:
        """The record in a folder, or a new one. Raises UserError for a damaged one, and ConfigError for that of another
        sweep."""
        described = plain_values(
            {
                "config": plan.config,
                "base": read_settings(resolve_config(plan.config)),
                "settings": plan.settings,
                "grid": {key: {"choices": values} for key, values in plan.grid.items()},
                "search": {
                    key: {"choices": space} if isinstance(space, list) else dataclasses.asdict(space)
                    for key, space in plan.search.items()
                },
                "seeds": plan.seeds,
                "seed": plan.seed,
                "metric": plan.metric,
                "mode": plan.mode,
            }
        )
        path = folder / RECORD
        if not path.is_file():
            if taken := sorted(folder.glob("trial-*")):
                raise ConfigError(f"{folder} holds {taken[0].name}, and no sweep ({RECORD}). Choose another --out.")
            return cls(folder, described, [])
        remedy = "Choose another --out, or remove the folder."
        known = read_json(path, remedy)
        former, found = known.get("plan"), known.get("trials")
        if not isinstance(former, dict) or not isinstance(found, list):
            raise UserError(f"{path} must hold plan and trials. {remedy}")
        before, now = ({key: v for key, v in flatten(one).items() if v != {}} for one in (former, described))
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise ConfigError(
                f"{folder} holds another sweep: {cut_list(changed, 6)} changed since. Choose another --out, or give "
                "the sweep that it started with; only trials may change."
            )
        return cls(folder, described, [_trial(plan, folder, one, number, path) for number, one in enumerate(found)])

    def put(self, trial: Trial) -> None:
        """Keep a trial as it is now."""
        self.trials[trial.number : trial.number + 1] = [trial]
        kept = [
            {"settings": one.settings, "status": one.status, "score": one.score, "message": one.message}
            for one in self.trials
        ]
        with atomic_file(self.folder / RECORD, "w", encoding="utf-8") as file:
            file.write(json_text({"plan": self.plan, "trials": kept}, indent=1) + "\n")


def _trial(plan: Plan, folder: Path, raw: Any, number: int, path: Path) -> Trial:
    """A trial as it was kept. Raises UserError when it is none."""
    fine = (
        isinstance(raw, dict)
        and isinstance(raw.get("settings"), dict)
        and plan.tries(number, raw["settings"])
        and raw.get("status") in get_args(Status)
        and fits(raw.get("score"), float | None)
        and (raw.get("status") == "finished") == (raw.get("score") is not None)
        and fits(raw.get("message"), str)
    )
    if not fine:
        raise UserError(
            f"{path}: trial {number + 1} is damaged, {shown(raw)}. Choose another --out, or remove the folder."
        )
    return Trial(number, raw["settings"], raw["status"], raw["score"], _runs(plan, folder, number), raw["message"])


def _runs(plan: Plan, folder: Path, number: int) -> list[Path]:
    name = f"trial-{number + 1:03}"
    return [folder / name] if not plan.seeds else [folder / f"{name}-seed-{seed}" for seed in plan.seeds]


def _run_all(plan: Plan, record: _Record, metric: str, mode: Mode, alone: list[str], progress: bool) -> list[Trial]:
    grid = plan.grid_settings()
    for number in range(plan.trials):
        known = record.trials[number] if number < len(record.trials) else None
        if known is not None and known.status in ("finished", "diverged"):
            continue
        if known is not None:
            settings = known.settings
        elif plan.grid:
            settings = grid[number]
        else:
            former = [(one.settings, one.score) for one in record.trials[:number] if one.status != "failed"]
            settings = propose(plan, number, former, mode)
        trial = Trial(number, settings, "running", None, _runs(plan, record.folder, number))
        record.put(trial)
        print(f"trial {number + 1} of {plan.trials}: {told(settings)}", flush=True)
        trial = _tried(plan, trial, metric, alone, progress)
        record.put(trial)
        print(f"trial {number + 1} of {plan.trials}: {_outcome(trial, record.trials, metric, mode)}", flush=True)
    return record.trials[: plan.trials]


def _outcome(trial: Trial, trials: list[Trial], metric: str, mode: Mode) -> str:
    if trial.score is None:
        return f"{trial.status}: {trial.message}"
    best = _best(trials, mode)
    assert best is not None
    beside = "the best so far" if best is trial else f"the best so far is {best.score:.5g} of trial {best.number + 1}"
    return f"{metric} {trial.score:.5g}, {beside}"


def _best(trials: list[Trial], mode: Mode) -> Trial | None:
    sign = -1 if mode == "max" else 1
    finished = [(sign * trial.score, trial.number, trial) for trial in trials if trial.score is not None]
    return min(finished)[2] if finished else None


def _tried(plan: Plan, trial: Trial, metric: str, alone: list[str], progress: bool) -> Trial:
    """A trial with its outcome. alone: settings that keep a run on one device. Raises KeyboardInterrupt; the trial can
    then be continued."""
    scores = []
    seeds: list[int | None] = [*plan.seeds] or [None]
    for seed, path in zip(seeds, trial.runs, strict=True):
        run = RunFolder(path)
        begun = run.config.is_file()
        try:
            config = str(run.config) if begun else plan.config
            overrides = [] if begun else [*_overrides(plan, trial.settings, seed), *alone]
            outcome = fit(config, run, overrides, resume=begun, progress=progress)
        except RunInUse:
            raise
        except UserError as error:
            return trial._replace(status="failed", message=cut(error, 900))
        except torch.OutOfMemoryError as error:
            gc.collect()
            torch.cuda.empty_cache()
            return trial._replace(status="failed", message=f"out of memory: {cut(' '.join(str(error).split()), 200)}")
        except Exception as error:  # of a plugin, say; the other trials may do without what failed
            traceback.print_exc()
            gc.collect()
            told_of = f"{type(error).__name__}: {cut(' '.join(str(error).split()), 200)}"
            return trial._replace(status="failed", message=told_of)
        if outcome.status == "interrupted":
            print(f"{outcome.message.partition(' Resume with')[0]} Continue with the same command.", file=sys.stderr)
            raise KeyboardInterrupt
        if outcome.status == "diverged":
            return trial._replace(status="diverged", message=cut(outcome.message, 900))
        score = _score(run, metric)
        if score is None:
            return trial._replace(status="failed", message=f"{path} has no {metric} of its exported weights.")
        if not math.isfinite(score):
            return trial._replace(status="diverged", message=f"{path}: {metric} is not finite.")
        scores.append(score)
    return trial._replace(status="finished", score=statistics.fmean(scores))


def _score(run: RunFolder, metric: str) -> float | None:
    """A metric of a run's exported weights."""
    results = run.read_results()
    value = results.get(metric)
    if value is None:  # losses are in the curves alone
        value = dict(run.curve(metric)).get(results.get("exported_step", 0) - 1)
    return float(value) if isinstance(value, int | float) else None


def _ended(plan: Plan, folder: Path, metric: str, mode: Mode, trials: list[Trial]) -> Sweep:
    best = _best(trials, mode)
    if best is None:
        raise UserError(
            f"{folder}: none of {len(trials)} trials finished. The first {trials[0].status}: {trials[0].message}"
        )
    path = folder / "best.yaml"
    head = f"trial {best.number + 1} of {len(trials)}, {metric} {best.score:.6g}: {told(best.settings)}"
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(f"# {paragraph(head)}\n{parse_config(plan.config, _overrides(plan, best.settings)).yaml}")
    return Sweep(folder, metric, mode, trials, best, path)
