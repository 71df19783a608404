"""The work of `mambaseq fit`, apart so that the command line stays quick."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from mambaseq.checkpoints.export import ModelCard, load_weights, save_model, task_weights
from mambaseq.checkpoints.lightning_io import AtomicCheckpointIO, read_checkpoint
from mambaseq.cli.config import RunConfig
from mambaseq.data.atomic import atomic_file
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq.models import build_model
from mambaseq.reporting.pictures import learning_curves, save_png
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.callbacks import Interrupted, StopAfterStep, Throughput
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
    )


def make_trainer(
    settings: RunConfig,
    folder: RunFolder,
    callbacks: list[lightning.Callback],
    loggers: list[Logger],
    progress: bool,
) -> lightning.Trainer:
    """Lightning's trainer as configured, with our callbacks, loggers and checkpoint writer added."""
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
    options |= {"logger": [*loggers, *given] or False, "callbacks": [*callbacks, *own]}
    options |= {"plugins": [*plugins, AtomicCheckpointIO()], "default_root_dir": str(folder.path)}
    return lightning.Trainer(**options)


def _checkpoints(settings: RunConfig, folder: RunFolder) -> list[lightning.Callback]:
    chosen = settings.settings["checkpoint"]
    where = str(folder.last.parent)
    callbacks: list[lightning.Callback] = [
        ModelCheckpoint(
            dirpath=where,
            filename="last",
            every_n_train_steps=chosen["every_n_steps"],
            save_top_k=1,
            enable_version_counter=False,
        ),
        StopAfterStep(folder.last),
    ]
    if chosen["monitor"]:
        callbacks.append(
            ModelCheckpoint(
                dirpath=where,
                filename="best",
                monitor=chosen["monitor"],
                mode=chosen["mode"],
                save_top_k=1,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            )
        )
    return callbacks


def train(settings: RunConfig, folder: RunFolder, *, resume: bool, main_process: bool, progress: bool) -> int:
    """Train, export the best weights, write results and pictures. Returns the exit code."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed = settings.settings["seed"]
    lightning.seed_everything(seed, workers=False, verbose=False)
    data = settings.make_data()
    data.setup()
    spec = settings.model_spec(data)
    model = build_model(spec)
    card = model_card(settings, data, spec)
    task = Task(model, settings.optimizer(), settings.make_metrics(data), settings.length_warmup(), seed)
    loggers: list[Logger] = []
    if main_process:
        if not resume:
            with atomic_file(folder.config, "w", encoding="utf-8") as file:
                file.write(settings.yaml)
            save_model(folder.model, None, card, data.tokenizer)
        loggers = [
            CSVLogger(folder.path, name="logs", version=folder.next_version()),
            TensorBoardLogger(folder.path, name="tensorboard", version=""),
        ]
    throughput = Throughput()
    callbacks = [throughput, *_checkpoints(settings, folder)]  # stopping comes last, so that nothing is uncounted
    trainer = make_trainer(settings, folder, callbacks, loggers, progress)
    print(f"{folder.path}: {model.n_parameters():,} parameters", flush=True)
    try:
        trainer.fit(task, datamodule=settings.make_datamodule(data), ckpt_path=str(folder.last) if resume else None)
    except Interrupted as error:
        from mambaseq.cli.fit import interrupted

        return interrupted(folder.path, error)
    trainer.save_checkpoint(folder.last)
    if main_process:
        _finish(settings, folder, data, card, task, throughput, trainer.global_step)
    return 0


def _finish(
    settings: RunConfig,
    folder: RunFolder,
    data: SequenceData,
    card: ModelCard,
    task: Task,
    throughput: Throughput,
    steps: int,
) -> None:
    if folder.best.exists():
        load_weights(task.model, task_weights(read_checkpoint(folder.best)), folder.best)
    save_model(folder.model, task.model, card, data.tokenizer)
    folder.update_results(
        parameters=task.model.n_parameters(),
        steps=steps,
        train_tokens=throughput.tokens,
        train_seconds=round(throughput.seconds, 2),
        tokens_per_second=round(throughput.tokens / max(throughput.seconds, 1e-9)),
        device=str(torch.cuda.get_device_name()) if task.device.type == "cuda" else "cpu",
        **task.results,
    )
    bits = task.model.head.per_token
    scale, unit = (1 / math.log(2), "bits a token") if bits else (1.0, "loss (nats)")
    save_png(folder.path / "curves.png", learning_curves(folder, scale, unit))
