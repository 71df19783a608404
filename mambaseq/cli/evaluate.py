"""`mambaseq validate` and `mambaseq test`: a run's metrics on its validation or test set."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from mambaseq.arguments import Arguments, add_dtype
from mambaseq.cli.arguments import asks_for_help, check_overrides, print_keys, refuse_words
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError, cut
from mambaseq.importing import uncollected
from mambaseq.reporting.runs import RunFolder, rank
from mambaseq.resources import model_folder


def run(argv: list[str], command: str) -> int:
    given = {word.partition("=")[0] for word in argv}
    parser = Arguments(
        prog=f"mambaseq {command}",
        description="Evaluate a run; --key value overrides its configuration (--data.length 4096), and `mambaseq "
        f"{command} --checkpoint RUN --help` lists the keys.",
        add_help="--checkpoint" not in given,
    )
    if "--config" in given and "--checkpoint" not in given:
        raise ConfigError(
            f"A run is evaluated, with its own configuration: `mambaseq {command} --checkpoint RUN`, the folder that "
            "`mambaseq fit --config NAME --out RUN` makes."
        )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="fit the dataset's baselines to the run's training set as well, and measure them on the same records",
    )
    add_dtype(parser)
    if command == "test":
        _add_tasks(parser)
    add_allow_import(parser)
    arguments, overrides = parser.parse_known_args(argv)
    refuse_words(argv, overrides, "--checkpoint", parser.prog)
    if asks_for_help(overrides):
        return print_keys(parser, str(RunFolder(arguments.checkpoint).require().config), overrides)
    for word in overrides:
        if word.partition("=")[0] in ("--condition", "--condition-column", "--condition-table"):
            raise ConfigError(
                f"{command} has no {word.partition('=')[0]}: each sequence of the set is measured under its own "
                "condition, from the data. Leave it out; `mambaseq predict` takes other files under any condition."
            )
    if command == "test" and _asks_for_tasks(arguments, overrides):
        model_folder(arguments.checkpoint)
        return _run_tasks(arguments)
    folder = RunFolder(arguments.checkpoint)
    check_overrides(parser, overrides, f"--checkpoint {folder.path}", str(folder.config), unused=_TASK_OPTIONS)
    folder.require()  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq.runs.evaluation import evaluate

    results = evaluate(folder, command, overrides, baselines=arguments.baselines, dtype=arguments.dtype)
    if rank() == 0:  # of several processes, the others have neither intervals nor baselines
        print(told(results))
    return 0


_TASK_OPTIONS = ("shots", "limit", "task_folder", "device", "batch_size")
_OF_RUNS = {
    "limit": "Of the run's own test set, --trainer.limit_test_batches {} takes so many batches.",
    "batch_size": "For the run's own test set it is --loader.batch_size {}.",
    "device": "For the run's own test set it is --trainer.accelerator: cpu, gpu, ...",
}
"""What sets the same for a run's own test set."""


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group(
        "tasks of lm-eval instead of the run's test set (pip install 'mambaseq[harness]')"
    )
    tasks.add_argument("--tasks", metavar="NAME[,NAME...]", help="such as lambada_openai,hellaswag,arc_easy")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question; each task has its own")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    tasks.add_argument("--task-folder", metavar="DIR", help="tasks of your own: YAML files, as lm-eval has them")
    tasks.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="prompts that are continued together; 64")


def _asks_for_tasks(arguments: argparse.Namespace, overrides: list[str]) -> bool:
    """Raises ConfigError for options of tasks without tasks, or with what else an evaluation has."""
    if arguments.tasks is None:
        if given := [name for name in _TASK_OPTIONS if getattr(arguments, name) is not None]:
            own = _OF_RUNS.get(given[0], "")
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is for tasks of lm-eval. Name some: --tasks NAME."
                + (f" {own.format(getattr(arguments, given[0]))}" if own else "")
            )
        return False
    if overrides or arguments.baselines:
        raise ConfigError(
            f"{'--baselines' if arguments.baselines else cut(overrides[0])} is for the run's own test set, and --tasks "
            "asks for others. Leave one out."
        )
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")
    return True


def _run_tasks(arguments: argparse.Namespace) -> int:
    with uncollected(for_good=True):
        from mambaseq.runs.harness_tasks import evaluate_tasks

    results = evaluate_tasks(
        arguments.checkpoint,
        [name.strip() for name in arguments.tasks.split(",") if name.strip()],
        shots=arguments.shots,
        limit=arguments.limit,
        folder=arguments.task_folder,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
    )
    wide = max(map(len, results), default=0)
    for name, value in results.items():
        if "_stderr" not in name:
            error = results.get(_error_of(name), math.nan)
            print(f"{name:<{wide}}  {value:.4f}" + ("" if math.isnan(error) else f"  (standard error {error:.4f})"))
    return 0


def _error_of(name: str) -> str:
    metric, colon, kept = name.partition(":")
    return f"{metric}_stderr{colon}{kept}"


def told(results: Mapping[str, Any]) -> str:
    """What an evaluation found, as lines: a metric each with its 95% interval, and tables of baselines."""
    from mambaseq.reporting.evaluation import remarks

    lines, notes = [], []
    for name, value in results.items():
        place, _, word = name.rpartition("/")
        if isinstance(value, float):
            of = results.get(f"{place}/intervals", {}).get("metrics", {}).get(word)
            between = "" if of is None else f"  [{of[0]:.4f}, {of[1]:.4f}]"
            lines.append(f"{name:<24} {value:.4f}{between}")
        elif word == "intervals":
            few = value.get("too_few_groups", 0)
            told = f", whose {few} group(s) are too few to draw whole" if few else ""
            notes.append(f"[95% intervals over {value['draws']:,} draws of the {value['count']:,} {value['of']}{told}]")
        elif word == "baselines":
            notes += [f"\n{place}: baselines on the same records, {value['metric']}", *_table(results, place, value)]
    return "\n".join([*lines, *remarks(results, "val"), *remarks(results, "test"), *notes])


def _table(results: Mapping[str, Any], place: str, found: Mapping[str, Any]) -> list[str]:
    metric = found["metric"]
    own = {
        "name": "this run",
        "metrics": {metric: results[f"{place}/{metric}"]},
        "intervals": results.get(f"{place}/intervals", {}).get("metrics", {}),
    }
    wide = max(len(row["name"]) for row in [own, *found["rows"]])
    lines = []
    for row in [own, *found["rows"]]:
        value, between = row["metrics"].get(metric), row.get("intervals", {}).get(metric)
        numbers = "" if value is None else f"{value:.4f}"
        numbers += "" if between is None else f"  [{between[0]:.4f}, {between[1]:.4f}]"
        lines.append(f"  {row['name']:<{wide}}  {numbers:<24}  {row.get('note', '')}".rstrip())
    return [*lines, found["verdict"]]
