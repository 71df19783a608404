"""Runs on the tasks of lm-eval. Needs its package: the extra `harness`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseq.errors import ConfigError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.reporting.runs import RunFolder, RunInUse
from mambaseq.runs.resuming import say


def evaluate_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run on tasks of lm-eval.

    tasks: their names. shots: examples before each question; None for what a task has. limit: only the first so many
        of each task. folder: of further tasks (YAML files, as lm-eval has them).

    The numbers are also merged into a run's results.json, under `tasks/`.

    Returns:
        `{"TASK/METRIC": value}`, a metric with a filter other than `none` as `METRIC:FILTER`, standard errors as
        `METRIC_stderr`.

    Raises:
        ConfigError for a task that does not exist or cannot be run by this model, UserError for data of a task that
        cannot be had.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from mambaseq.runs.harness import Harness
    except ImportError as error:
        raise ConfigError(
            f"Tasks of lm-eval need its package ({error}). Install it with: pip install 'mambaseq[harness]'. LAMBADA "
            "and perplexity need none: see `mambaseq text/lambada --help` and `mambaseq text/perplexity --help`."
        ) from error
    if not tasks:
        raise ConfigError("--tasks names none. Name some with commas between, such as lambada_openai,hellaswag.")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"There is no folder {shown(folder, 300)} of tasks. Give one with YAML files of lm-eval.")
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False)
    if missing := [name for name in tasks if name not in manager.all_tasks]:  # reading all that ships takes seconds
        manager = TaskManager(include_path=include)
        missing = [name for name in missing if name not in manager.all_tasks]
    if missing:
        near = did_you_mean(missing[0], manager.all_tasks)
        raise ConfigError(
            f"lm-eval has no task {cut_list(map(shown, missing))}.{near} `lm-eval ls tasks` lists them; tasks of your "
            "own are found in the folder --task-folder."
        )
    model = Harness(checkpoint, device, batch_size, dtype=dtype)
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ImportError) as error:  # what downloads raise
        raise UserError(
            f"The tasks {cut_list(tasks)} cannot be run: {cut(' '.join(str(error).split()), 500)}. Their data are "
            "downloaded from the Hugging Face Hub at the first use, and some need more packages."
        ) from error
    assert found is not None
    results = dict(_flat(found["results"]))
    named: dict[str, Any] = {f"tasks/{name}": value for name, value in results.items()}
    run = RunFolder(checkpoint)
    if run.config.is_file():  # not an exported model alone
        try:
            with run.locked():
                run.update_results(**named)
        except RunInUse:
            say(run, "it is being trained; these results are not saved")
    return results


def _flat(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, kept = name.partition(",")
            if isinstance(value, int | float) and kept:
                yield f"{task}/{metric}" + ("" if kept == "none" else f":{kept}"), float(value)
