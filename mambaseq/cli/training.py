"""The work of `mambaseq fit`, apart so that the command line stays quick."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints.export import ModelCard, load_weights, save_model, task_weights
from mambaseq.checkpoints.lightning_io import AtomicCheckpointIO, read_checkpoint
from mambaseq.cli.config import RunConfig
from mambaseq.data.module import SequenceData
from mambaseq.data.purpose import task_of
from mambaseq.errors import ConfigError, UserError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reporting.pictures import learning_curves, save_png
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.callbacks import Interrupted, RunCheckpoints, Throughput
from mambaseq.tasks.fitting import check_data
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
    with _explained("The settings under trainer cannot be used here"):
        return lightning.Trainer(**options)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the errors by which Lightning and torch refuse a setting into ConfigError."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error


def train(settings: RunConfig, folder: RunFolder, *, resume: bool, progress: bool) -> int:
    """Train, export the best weights, write results and pictures. Returns the exit code.

    Raises UserError for anything the user has to mend, before the first step where that can be told.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed = settings.settings["seed"]
    lightning.seed_everything(seed, workers=False, verbose=False)
    data = settings.make_data()
    data.setup()
    datamodule = settings.make_datamodule(data)
    metrics = settings.make_metrics(data)
    monitor, mode = settings.best(metrics)
    model = _make_model(settings, data)
    card = model_card(settings, data, model.spec or {})
    task = Task(model, settings.optimizer(), metrics, settings.length_warmup(), seed)
    # made in every process; those of the first alone write
    loggers: list[Logger] = [
        CSVLogger(folder.path, name="logs", version=folder.next_version()),
        TensorBoardLogger(folder.path, name="tensorboard", version=""),
    ]
    throughput = Throughput()
    every = settings.settings["checkpoint"]["every_n_steps"]
    checkpoints = RunCheckpoints(folder.last, folder.best, every, monitor, mode)
    callbacks: list[lightning.Callback] = [throughput, checkpoints]
    if resume:
        callbacks.append(
            LambdaCallback(on_train_start=lambda trainer, _: _go_on(trainer, settings, folder, data, card))
        )
    trainer = make_trainer(settings, folder, callbacks, loggers, progress)
    if resume and (reason := _nothing_to_do(folder, model, trainer)):
        if trainer.is_global_zero:
            print(reason)
        return 0
    if trainer.is_global_zero:
        if not resume:
            _begin(settings, folder, data, card)
        print(f"{folder.path}: {model.n_parameters():,} parameters", flush=True)
    try:
        trainer.fit(task, datamodule=datamodule, ckpt_path=str(folder.last) if resume else None)
    except Interrupted as error:
        from mambaseq.cli.fit import interrupted

        return interrupted(folder.path, error) if trainer.is_global_zero else 130
    except (MisconfigurationException, ValueError) as error:
        asked = settings.settings["model"]["mixer"].get("backend")
        refused = asked is not None and f"backend {asked!r}" in str(error)
        if checkpoints.began and not refused:
            raise  # nobody's setting
        with _explained("The run cannot begin with these settings"):
            raise
    trainer.save_checkpoint(folder.last)
    if checkpoints.score is not None:
        exported, results = folder.best, checkpoints.results
    else:
        exported = folder.last
        if checkpoints.validated_step != trainer.global_step and _validates(trainer, data):
            trainer.validate(task, datamodule=datamodule, verbose=False)
        results = task.results
    if trainer.is_global_zero:
        device = str(torch.cuda.get_device_name()) if trainer.strategy.root_device.type == "cuda" else "cpu"
        _finish(folder, data, card, exported, throughput, steps=trainer.global_step, device=device, **results)
    return 0


def _make_model(settings: RunConfig, data: SequenceData) -> SequenceModel:
    spec = settings.model_spec(data)
    with _explained("The settings under model cannot be used"):
        model = build_model(spec)
    check_data(model, data, repr(settings.settings["data"]["name"]), settings.make_metrics(data))
    return model


def _validates(trainer: lightning.Trainer, data: SequenceData) -> bool:
    return trainer.limit_val_batches != 0 and data.validation() is not None


def _begin(settings: RunConfig, folder: RunFolder, data: SequenceData, card: ModelCard) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder.path} cannot be made: {error.strerror}. Choose another --out.") from error
    folder.best.unlink(missing_ok=True)  # of a run that ended before there was anything to resume
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
    save_model(folder.model, None, card, data.tokenizer)


def _go_on(
    trainer: lightning.Trainer, settings: RunConfig, folder: RunFolder, data: SequenceData, card: ModelCard
) -> None:
    """What changes in the folder once a resumed run really trains: its settings are those of the resume, and what
    was exported at its former end is not its model any more (its weights are in the checkpoints too)."""
    if not trainer.is_global_zero:
        return
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
    if not settings.settings["checkpoint"]["monitor"]:
        folder.best.unlink(missing_ok=True)  # from now on the last weights are kept
    save_model(folder.model, None, card, data.tokenizer)
    folder.results.unlink(missing_ok=True)


def _nothing_to_do(folder: RunFolder, model: SequenceModel, trainer: lightning.Trainer) -> str:
    """Why a run need not go on; empty when it has to train, or to export.

    Raises UserError when its checkpoint is not of this model.
    """
    checkpoint = read_checkpoint(folder.last)
    load_weights(model, task_weights(checkpoint), folder.last)
    step, epochs = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    for key, limit, done in (("max_steps", trainer.max_steps, step), ("max_epochs", trainer.max_epochs, epochs)):
        if limit is not None and 0 <= limit <= done and folder.weights.is_file():
            return (
                f"{folder.path}: nothing to do, the run is at step {step} and trainer.{key} is {limit}. To train it "
                f"further: mambaseq fit --resume {folder.path} --trainer.{key} MORE"
            )
    return ""


def _finish(
    folder: RunFolder, data: SequenceData, card: ModelCard, exported: Path, throughput: Throughput, **results: Any
) -> None:
    """Export the weights of a checkpoint, with the results of these weights and no others.

    They are read from the file: strategies that shard a model leave no process with all of it.
    """
    checkpoint = read_checkpoint(exported)
    model = build_model(card.spec)
    load_weights(model, task_weights(checkpoint), exported)
    save_model(folder.model, model, dataclasses.replace(card, step=checkpoint["global_step"]), data.tokenizer)
    folder.results.unlink(missing_ok=True)  # metrics of weights that were exported before
    folder.update_results(
        parameters=model.n_parameters(),
        exported_step=checkpoint["global_step"],
        train_tokens=throughput.tokens,
        train_seconds=round(throughput.seconds, 2),
        tokens_per_second=round(throughput.tokens / max(throughput.seconds, 1e-9)),
        **results,
    )
    scale, unit = (1 / math.log(2), "bits a token") if model.head.per_token else (1.0, "loss (nats)")
    save_png(folder.path / "curves.png", learning_curves(folder, scale, unit))
    step, of = checkpoint["global_step"], results["steps"]
    scalars = {key: value for key, value in results.items() if key.startswith("val/") and isinstance(value, float)}
    found = [f"{key} {value:.4f}" for key, value in scalars.items()]
    best = "" if step == of else f" (the best of {of})"
    print(f"{folder.path}: the weights of step {step}{best} are in {folder.model}", *found, sep=", ", flush=True)
