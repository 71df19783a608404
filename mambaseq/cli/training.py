"""The work of `mambaseq fit`, apart so that the command line stays quick."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambaseq.atomic import atomic_file, remove_leftovers
from mambaseq.checkpoints.export import ModelCard, load_weights, save_model, task_weights
from mambaseq.checkpoints.lightning_io import AtomicCheckpointIO, read_checkpoint
from mambaseq.cli.config import RunConfig
from mambaseq.cli.finishing import Run, diverged, interrupted
from mambaseq.cli.resuming import (
    Resumption,
    changed_settings,
    check_changed_data,
    is_over,
    read_record,
    record_of,
    refuse_without_effect,
    say,
    write_record,
)
from mambaseq.data.module import SequenceData
from mambaseq.data.purpose import task_of
from mambaseq.errors import ConfigError, UserError, cut_list
from mambaseq.models import SequenceModel, build_model
from mambaseq.reporting.runs import RunFolder, rank
from mambaseq.resources import cache_dir
from mambaseq.tasks.callbacks import Interrupted, RunCheckpoints, StoppedAtOnce, Throughput
from mambaseq.tasks.finite import Diverged, FiniteGuard
from mambaseq.tasks.fitting import check_data
from mambaseq.tasks.logs import RunLog
from mambaseq.tasks.record import KEY, DataRecord, shown
from mambaseq.tasks.task import Task


def model_card(settings: RunConfig, data: SequenceData, spec: dict[str, Any]) -> ModelCard:
    """What is saved beside the weights."""
    tokenizer = None
    if data.tokenizer is not None:
        if data.tokenizer_name is None:
            raise ConfigError(
                f"The dataset {settings.settings['data']['name']!r} has a tokenizer without tokenizer_name."
            )
        tokenizer = {"name": data.tokenizer_name, "options": data.tokenizer.options}
    return ModelCard(
        spec=spec,
        tokenizer=tokenizer,
        class_names=list(data.class_names),
        condition_names=list(data.condition_names),
        length=data.length,
        start_ids=list(data.start_ids),
        reader=data.reader,
        writer=data.writer,
        reader_options=data.reader_options(),
        writer_options=data.writer_options(),
        generation=settings.settings["generation"],
        task=task_of(data),
    )


_DECIDED = (  # the trainer's settings that a run cannot leave to others: the value that is refused (None: any), and why
    ("default_root_dir", None, "a run writes to its own folder, --out"),
    ("logger", False, "a run draws its curves from its logs"),
    ("enable_checkpointing", False, "a run can always be gone on with, by checkpoints of its own"),
)


def make_trainer(
    settings: RunConfig,
    folder: RunFolder,
    callbacks: list[lightning.Callback],
    loggers: list[Logger],
    progress: bool,
) -> lightning.Trainer:
    """Lightning's trainer as configured, with our callbacks, loggers and checkpoint writer added.

    Raises ConfigError when Lightning refuses the settings.
    """
    options = dict(settings.trainer)
    for key, taken, why in _DECIDED:
        if (options.get(key) is False) if taken is False else options.get(key) is not None:
            raise ConfigError(f"trainer.{key} is {options[key]}, but {why}. Leave trainer.{key} away.")
    if isinstance(every := options.get("accumulate_grad_batches"), int) and every < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1; it is {every}.")
    given = options.pop("logger", None)
    given = [] if given in (None, True, False) else list(given) if isinstance(given, list | tuple) else [given]
    own = options.pop("callbacks", None) or []
    own = own if isinstance(own, list) else [own]
    plugins = options.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if options.get("enable_progress_bar") is None:
        options["enable_progress_bar"] = progress
    if options["enable_progress_bar"]:
        # a bar redrawn in place needs a terminal; in a log a line now and then is enough
        callbacks = [*callbacks, TQDMProgressBar(refresh_rate=10 if sys.stderr.isatty() else 100)]
    # the user's come first, so that a checkpoint holds what they have counted
    options |= {"logger": [*loggers, *given] or False, "callbacks": [*own, *callbacks]}
    options |= {"plugins": [*plugins, AtomicCheckpointIO()], "default_root_dir": str(folder.path)}
    defaults = inspect.signature(lightning.Trainer).parameters
    given = [f"trainer.{key}" for key, value in settings.trainer.items() if value != defaults[key].default]
    with _explained("The settings under trainer cannot be used here", f" Given are {cut_list(given)}."):
        return lightning.Trainer(**options)


@contextlib.contextmanager
def _explained(what: str, more: str = "") -> Iterator[None]:
    """Turn the errors by which Lightning and torch refuse a setting into ConfigError."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split()).rstrip('.')}.{more}") from error


def train(
    settings: RunConfig, folder: RunFolder, *, resume: bool, progress: bool, allow_changed_data: bool = False
) -> int:
    """Train, export the best weights, write results and pictures. Returns the exit code: 0, 1 for a run that diverged,
    130 for one that was interrupted.

    resume: go on with the run in the folder, wherever it was left: before its first checkpoint, on the way, or
        between its last step and its last picture.
    Raises UserError for anything the user has to mend, before the first step where that can be told.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed = settings.settings["seed"]
    lightning.seed_everything(seed, workers=False, verbose=False)
    if rank() == 0:
        remove_leftovers(folder.path, deep=True)
        remove_leftovers(cache_dir(settings.settings["data"].get("cache")) / "stores")
    data = settings.make_data()
    data.setup()
    record = record_of(settings, data)
    metrics = settings.make_metrics(data)
    monitor, mode = settings.best(metrics)
    model = _make_model(settings, data)
    task = Task(model, settings.optimizer(), metrics, settings.length_warmup(), seed)
    # made in every process; those of the first alone write
    loggers: list[Logger] = [
        RunLog(folder.path, name="logs", version=folder.next_version()),
        TensorBoardLogger(folder.path, name="tensorboard", version=""),
    ]
    guard = FiniteGuard()
    every = settings.settings["checkpoint"]["every_n_steps"]
    run = Run(
        folder=folder,
        data=data,
        datamodule=settings.make_datamodule(data),
        card=model_card(settings, data, model.spec or {}),
        task=task,
        throughput=Throughput(),
        checkpoints=RunCheckpoints(folder.last, folder.best, every, monitor, mode, record, guard),
    )
    callbacks: list[lightning.Callback] = [run.throughput, guard, run.checkpoints]
    begins = not folder.last.exists()
    if not begins:
        callbacks.append(_resumption(run, settings, record, allow_changed_data))
    trainer = make_trainer(settings, folder, callbacks, loggers, progress)
    if begins:
        if resume and trainer.is_global_zero:
            say(folder, "there is no checkpoint yet; the run begins at its first step")
        _begin(trainer, settings, run, record)
    elif (code := _rest(run, settings, trainer)) is not None:
        return code
    if trainer.is_global_zero:
        print(f"{folder.path}: {model.n_parameters():,} parameters", flush=True)
    return _fit(run, settings, trainer, begins)


def _resumption(run: Run, settings: RunConfig, record: DataRecord, allow_changed_data: bool) -> Resumption:
    """What a resumed run needs. Says what changed; raises DataError when the data did, and must not."""
    lines = check_changed_data(run.folder, record, allow_changed=allow_changed_data)
    lines += [
        f"{key} changed: {shown(former)} -> {shown(now)}"
        for key, (former, now) in changed_settings(run.folder, settings).items()
        if not key.startswith("data.")
    ]
    for line in lines if rank() == 0 else []:
        say(run.folder, line)
    former = read_record(run.folder)
    return Resumption(
        run.folder,
        settings.optimizer(),
        run.checkpoints,
        lambda: _go_on(settings, run, record),
        same_data=former is None or former.same_training(record),
    )


def _rest(run: Run, settings: RunConfig, trainer: lightning.Trainer) -> int | None:
    """Finish a run that has no step left to train: the exit code; None for one that trains on.

    Raises UserError when its checkpoint is not of this model, or settings are given that could have no effect.
    """
    folder = run.folder
    checkpoint = read_checkpoint(folder.last)
    load_weights(run.task.model, task_weights(checkpoint), folder.last)
    changed, step = changed_settings(folder, settings), checkpoint["global_step"]
    ended = not changed and checkpoint.get(KEY, {}).get("ended")  # by a callback, or because its time was over
    if not (key := is_over(checkpoint, trainer)) and not ended:
        return None
    refuse_without_effect(folder, changed, step)
    run.checkpoints.recall(trainer)
    if run.is_complete(step):
        if trainer.is_global_zero:
            reason = f"{key} is {getattr(trainer, key.partition('.')[2])}" if key else "it had ended there"
            more = key or "trainer.max_steps"
            print(
                f"{folder.path}: nothing to do, the run is at step {step} and {reason}. To train it "
                f"further: mambaseq fit --resume {folder.path} --{more} MORE"
            )
        return 0
    run.throughput.load_state_dict(checkpoint["callbacks"].get(run.throughput.state_key, {"tokens": 0, "seconds": 0.0}))
    run.finish(trainer, step)
    return 0


def _fit(run: Run, settings: RunConfig, trainer: lightning.Trainer, begins: bool) -> int:
    folder, checkpoints = run.folder, run.checkpoints
    first = trainer.is_global_zero
    try:
        trainer.fit(run.task, datamodule=run.datamodule, ckpt_path=None if begins else str(folder.last))
        checkpoints.ended = True
        trainer.save_checkpoint(folder.last)
    except Interrupted as error:
        return interrupted(folder.path, f"Interrupted after step {error.step}.") if first else 130
    except StoppedAtOnce:
        step = checkpoints.saved_step
        where = "there is no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
        return interrupted(folder.path, f"Stopped at once; {where}.") if first else 130
    except Diverged as error:
        return diverged(folder.path, error, checkpoints.saved_step) if first else 1
    except UserError:
        raise
    except Exception as error:
        asked = settings.settings["model"]["mixer"].get("backend")
        refused = asked is not None and f"backend {asked!r}" in str(error)
        if checkpoints.began and not refused:
            raise  # nobody's setting
        if not begins and not isinstance(error, MisconfigurationException):
            raise UserError(
                f"The run cannot go on from {folder.last} with these settings ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). The checkpoint is of another version or was changed, or a "
                f"setting that was given does not go with it."
            ) from error
        if not isinstance(error, MisconfigurationException | ValueError):
            raise
        with _explained("The run cannot begin with these settings"):
            raise
    run.finish(trainer, trainer.global_step)
    return 0


def _make_model(settings: RunConfig, data: SequenceData) -> SequenceModel:
    spec = settings.model_spec(data)
    with _explained("The settings under model cannot be used"):
        model = build_model(spec)
    check_data(model, data, repr(settings.settings["data"]["name"]), settings.make_metrics(data))
    return model


def _begin(trainer: lightning.Trainer, settings: RunConfig, run: Run, record: DataRecord) -> None:
    folder = run.folder
    if not trainer.is_global_zero:
        return
    for path in (folder.best, folder.results, folder.curves):  # of a run that ended before its first checkpoint
        _remove(path)
    write_record(folder, record)
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
    save_model(folder.model, None, run.card, run.data.tokenizer)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} is to be replaced and cannot be removed: {error.strerror}. Move it away.") from error


def _go_on(settings: RunConfig, run: Run, record: DataRecord) -> None:
    """What changes in the folder once a resumed run really trains: its settings are those of the resume, and what
    was exported at its former end is not its model any more (its weights are in the checkpoints too)."""
    folder = run.folder
    _remove(folder.results)
    if run.checkpoints.score is None:
        _remove(folder.best)  # of another metric, or other data, or the last weights are kept from now on
    save_model(folder.model, None, run.card, run.data.tokenizer)
    write_record(folder, record)
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
