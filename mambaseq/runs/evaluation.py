"""Metrics of a run on its validation or test set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambaseq.checkpoints.beginning import differing_ids
from mambaseq.checkpoints.export import LoadedModel, load_model
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.errors import ConfigError, UserError, cut_list, shown
from mambaseq.metrics.base import Metric
from mambaseq.reporting.pictures import confusion_matrix, save_png
from mambaseq.reporting.runs import RunFolder, RunInUse, rank
from mambaseq.runs.config import RunConfig
from mambaseq.runs.finishing import Facts, Outcome, plain_interrupts
from mambaseq.runs.judging import Judge, groups_of, keeps_answers
from mambaseq.runs.lost import by_first_alone
from mambaseq.runs.parsing import changed_model_settings, parse_config
from mambaseq.runs.processes import check_devices
from mambaseq.runs.report import has_section, write_report
from mambaseq.runs.resuming import changed_settings, read_record, record_of, say
from mambaseq.runs.trainer import make_trainer, misconfigured, quiet
from mambaseq.tasks.task import Task

_STAGES = {"validate": "val", "test": "test"}
_JUDGED = ("intervals", "one_answer", "baselines")


def evaluate(
    folder: RunFolder,
    command: str,
    overrides: list[str],
    *,
    progress: bool = True,
    baselines: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Metrics of the run's exported weights on its "validate" or "test" set; merged into results.json.

    Models that label or value get intervals as well: `test/intervals` has the middle 95% of each metric over draws of
    the set's sequences, and `test/one_answer` says so where the model answers all alike. baselines: fit the dataset's
    baselines to the training set and measure them on the same records; `test/baselines` has a row for each, and a
    verdict. dtype: of the weights (see `load_model`); one that is given is noted beside the results, as `test/dtype`.
    Raises UserError when there is no such set, run or model, when the overrides ask for another model, or when there is
    nothing to compare baselines by.
    """
    folder.require()
    settings = parse_config(str(folder.config), overrides)
    if overrides and (changed := changed_model_settings(str(folder.config), settings.settings)):
        raise ConfigError(
            f"{', '.join(changed)} cannot be set here: {command} evaluates the model that was trained. Leave it out, "
            "or train another model with `mambaseq fit`."
        )
    check_devices(settings.trainer)
    with quiet():
        return _evaluate(settings, folder, command, progress, baselines, dtype)


def _check_vocabulary(data: SequenceData, loaded: LoadedModel) -> None:
    """Raise ConfigError for data with ids that the model does not have, or whose ids mean something else to it."""
    rows = (loaded.model.spec or {}).get("encoder", {}).get("vocab_size")
    if rows is not None and data.vocab_size is not None and data.vocab_size > rows:
        raise ConfigError(
            f"These data have {data.vocab_size:,} ids, and the vocabulary of the model at {loaded.source.parent} has "
            f"{rows:,}. Take the tokenizer that it was trained with: leave data.tokenizer and its options out."
        )
    mine, theirs = data.tokenizer, loaded.tokenizer
    if mine is None or theirs is None:
        return
    if type(mine) is not type(theirs) or mine.options != theirs.options:
        other, count, first = differing_ids(theirs, mine)
        if other:
            raise ConfigError(
                f"The tokenizer of these data is another than that of the model at {loaded.source.parent}: {other:,} "
                f"of {count:,} ids mean something else, the first is {first}. Leave data.tokenizer and its options out."
            )


def _evaluate(
    settings: RunConfig, folder: RunFolder, command: str, progress: bool, baselines: bool, dtype: str | None
) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    folder.check_place(begins=False)
    before = _identities(folder)  # of every file that may be loaded, before one is
    loaded = load_model(folder.path, dtype=dtype)
    data = settings.make_data(setup=True)
    _check_vocabulary(data, loaded)
    sets = named_sets(data.validation() if command == "validate" else data.test())
    if not sets:
        raise UserError(
            f"The dataset {shown(settings.settings['data']['name'])} has no {command} set; nothing was evaluated."
        )
    notes = _notes(settings, folder, data, command) | {f"{_STAGES[command]}/dtype": dtype}
    metrics, keeps = settings.make_metrics(data), keeps_answers(loaded.model)
    main = main_metric(settings, metrics)
    if baselines and not (keeps and main):
        raise UserError(
            "Baselines are compared by a metric of labels or values, and "
            + (
                "this run has none: add --metrics '[accuracy]', or '[correlation]' for values."
                if keeps
                else f"the head {shown(settings.settings['model']['head']['name'])} continues sequences instead."
            )
        )
    task = Task(loaded.model, metrics=metrics, keep_answers=keeps)
    trainer = make_trainer(settings, folder, [], [], progress)
    if trainer.is_global_zero:
        step = "an unknown step" if loaded.card.step is None else f"step {loaded.card.step}"
        print(f"{folder.path}: the weights of {step} ({loaded.source.relative_to(folder.path)})", flush=True)
    method = trainer.validate if command == "validate" else trainer.test
    with plain_interrupts(), misconfigured(f"The {command} set cannot be read with these settings"):
        method(task, datamodule=settings.make_datamodule(data), verbose=False)
    results: dict[str, Any] = {**task.results, **task.tables}
    if not trainer.is_global_zero:
        return results
    with by_first_alone():
        counts = trainer.num_test_batches if command == "test" else trainer.num_val_batches
        if not sum(counts):
            limit = f"trainer.limit_{_STAGES[command]}_batches"
            raise ConfigError(
                f"Nothing was evaluated: {limit} is 0. Give more, such as --{limit}=1.0 for all of the set."
            )
        pictures: dict[str, Any] = {}
        for name, items in sets.items():
            place = f"{_STAGES[command]}/{name}".rstrip("/")
            answers = task.answers.get(name)
            found: dict[str, Any] = {}
            if answers is not None:
                figures = {label: results[f"{place}/{label}"] for label in metrics if f"{place}/{label}" in results}
                judge = Judge(metrics, figures, main, answers, groups_of(items))
                found |= {"intervals": judge.intervals(), "one_answer": judge.one_answer(data.class_names)}
                if baselines:
                    found["baselines"] = judge.beside(data, items, progress)
                pictures[place] = judge.pictures(data.class_names)
            else:
                pictures[place] = None
            notes |= {f"{place}/{name}": found.get(name) or {} for name in _JUDGED}
        results |= {key: value for key, value in notes.items() if value and key.rpartition("/")[2] in _JUDGED}
        try:
            with folder.locked():
                if any(_identities(folder)[path] != before[path] for path in (folder.weights, loaded.source)):
                    say(folder, "its weights changed during the evaluation; these results are not saved")
                    return results
                folder.update_results(remove=[key for key, value in notes.items() if not value], **results | notes)
                folder.update_evaluation(pictures)
        except RunInUse:
            say(folder, "it is being trained; these results are not saved")
            return results
        for name, table in task.tables.items():
            if len(table) != len(data.class_names):
                continue  # not a table of classes
            save_png(folder.path / f"{name.replace('/', '_')}.png", confusion_matrix(table, data.class_names))
        # a page with a domain's section is left as it is: that may take long, and evaluate as well
        if folder.report.is_file() and "steps" in folder.read_results() and not has_section(settings):
            write_report(folder, settings, Outcome("finished", "", Facts.of(loaded.model, data)))
        return results


def main_metric(settings: RunConfig, metrics: Mapping[str, Metric]) -> str:
    """The metric that chooses the best weights, or else the first one that says which of its values are better; ""
    for none. The loss is no metric."""
    fitting = [
        name
        for name, metric in metrics.items()
        if metric.scalar and metric.needs_logits and metric.higher_is_better is not None
    ]
    word = settings.settings["checkpoint"]["monitor"].removeprefix("val/")
    return next((name for name in fitting if word and f"/{name}".endswith(f"/{word}")), fitting[0] if fitting else "")


def _identities(folder: RunFolder) -> dict[Path, tuple[int, int, int] | None]:
    """Which files hold the weights of a run now; None for one that is not there."""
    found: dict[Path, tuple[int, int, int] | None] = {}
    for path in (folder.weights, folder.best, folder.last):
        status = path.stat() if path.exists() else None
        found[path] = None if status is None else (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _notes(settings: RunConfig, folder: RunFolder, data: SequenceData, command: str) -> dict[str, Any]:
    """Notes for results.json on what differs from the run's own data: settings that were given here, and files whose
    contents changed since training. Empty values where nothing does. Changed files are also printed."""
    stage = _STAGES[command]
    given = {key: now for key, (_, now) in changed_settings(folder, settings).items()}
    given = {key: value for key, value in given.items() if key.startswith("data.") or key.startswith("trainer.limit_")}
    former = read_record(folder)
    files = [] if former is None else former.changed_files(record_of(settings, data))
    if files and rank() == 0:
        say(folder, f"the data changed since training: {cut_list(files, 5, separator='; ')}")
    return {f"{stage}/changed_settings": given, f"{stage}/changed_files": files}
