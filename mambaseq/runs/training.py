"""Training: starts, resumes and finishes a run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambaseq.atomic import atomic_file, json_text, remove_leftovers
from mambaseq.checkpoints.beginning import begin_from, load_source
from mambaseq.checkpoints.export import ModelCard, load_weights, raw_weights, save_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.parts import remove_parts, remove_unnamed
from mambaseq.data.module import SequenceData, classes_told, named_sets
from mambaseq.data.purpose import task_of
from mambaseq.errors import ConfigError, UserError, shown, under_key
from mambaseq.models import SequenceModel, build_model
from mambaseq.reporting.runs import RunFolder, rank
from mambaseq.resources import cache_dir
from mambaseq.runs.config import RunConfig
from mambaseq.runs.finishing import Facts, Outcome, Training, diverged, interrupted
from mambaseq.runs.lost import by_first_alone, told_if_lost, watch_processes
from mambaseq.runs.parsing import changed_model_settings, parse_config
from mambaseq.runs.processes import check_devices
from mambaseq.runs.report import write_report
from mambaseq.runs.resuming import (
    Resumption,
    changed_settings,
    check_changed_data,
    is_over,
    read_record,
    record_of,
    refuse_fixed,
    refuse_without_effect,
    say,
    write_record,
)
from mambaseq.runs.trainer import explained, make_trainer, quiet
from mambaseq.specs import NOT_IN_WEIGHTS
from mambaseq.stopping import lent_to_lightning, told_of_sigterm
from mambaseq.tasks.averaging import WeightAverage
from mambaseq.tasks.callbacks import (
    Interrupted,
    Often,
    RunCheckpoints,
    StoppedAtOnce,
    Throughput,
    abandons_saving,
    finish_saving,
)
from mambaseq.tasks.contexts import check_processes
from mambaseq.tasks.finetuning import FinetuneConfig, Freezing
from mambaseq.tasks.finite import Diverged, FiniteGuard
from mambaseq.tasks.first_step import FirstStep
from mambaseq.tasks.fitting import check_data, check_shares
from mambaseq.tasks.logs import RunLog
from mambaseq.tasks.lora import AdapterRecord, add_adapters
from mambaseq.tasks.parts import StepParts
from mambaseq.tasks.record import KEY, DataRecord
from mambaseq.tasks.task import Task
from mambaseq.waiting import Phases

_ACCUMULATED = "trainer.accumulate_grad_batches"


def model_card(settings: RunConfig, data: SequenceData, spec: dict[str, Any]) -> ModelCard:
    """The description that is saved with the weights. spec: see `mambaseq.models.build_model`. Raises ConfigError for a
    dataset whose tokenizer has no name."""
    tokenizer = None
    if data.tokenizer is not None:
        if data.tokenizer_name is None:
            raise ConfigError(
                f"The dataset {shown(settings.settings['data']['name'])} has a tokenizer without tokenizer_name."
            )
        tokenizer = {"name": data.tokenizer_name, "options": data.tokenizer.options}
    return ModelCard(
        spec=spec,
        tokenizer=tokenizer,
        class_names=list(data.class_names),
        condition_names=list(data.condition_names),
        conditions=[one.plain() for one in data.conditions],
        strand_classes=[int(number) for number in data.strand_classes or ()],
        length=data.length,
        start_ids=list(data.start_ids),
        reader=data.reader,
        writer=data.writer,
        reader_options=data.reader_options(),
        writer_options=data.writer_options(),
        generation=settings.settings["generation"],
        task=task_of(data),
    )


def fit(
    config: str,
    folder: RunFolder,
    overrides: list[str],
    *,
    resume: bool = False,
    progress: bool = True,
    allow_changed_data: bool = False,
    phases: Phases | None = None,
) -> Outcome:
    """Train, export the best weights, write results and pictures.

    The run's folder is locked while it trains.

    config: a registered name or a YAML file. overrides: `--key value`, over it.
    resume: continue the run in the folder, wherever it stopped: before its first checkpoint, in the middle, or between
        its last step and its last picture.
    allow_changed_data: resume although files of the data changed.
    phases: what the wait for the first step was for so far; its beginning is this call without.
    Raises UserError for anything that the user has to mend, before the first step where possible.
    """
    phases = phases or Phases()
    folder.check_place(begins=not resume)
    settings = parse_config(config, overrides)  # a refused run leaves no folder behind
    settings.check_model()
    check_devices(settings.trainer)

    def ended() -> str:
        if folder.last.is_file() or resume:
            return f"{folder.path}: ended by SIGTERM. Resume with: mambaseq fit --resume {folder.path}"
        return f"{folder.path}: ended by SIGTERM. There is no checkpoint yet; the same command begins again."

    with folder.locked(), told_of_sigterm(ended if rank() == 0 else str):
        if not resume:
            folder.check_new()
        changed = changed_model_settings(config, settings.settings) if resume and overrides else []
        if changed := [key for key in changed if key.rpartition(".")[2] not in NOT_IN_WEIGHTS]:
            raise ConfigError(
                f"The model of a run cannot change, and {', '.join(changed)} would change that of {folder.path}. Leave "
                f"it out, or start another run: mambaseq fit --config {folder.config} --out ANOTHER --key value."
            )
        with quiet():
            phases.end("settings")
            outcome = _train(settings, folder, resume, progress, allow_changed_data, phases)
    if rank() != 0 or outcome.facts is None:
        return outcome
    # whose other processes wait for nothing where it has not finished. The lock is free: a report may evaluate the run
    with by_first_alone() if outcome.status == "finished" else contextlib.nullcontext():
        report = write_report(folder, settings, outcome)
    return outcome._replace(message=f"{outcome.message}\n{report}") if report else outcome


def _train(
    settings: RunConfig, folder: RunFolder, resume: bool, progress: bool, allow_changed_data: bool, phases: Phases
) -> Outcome:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # which say there what they have measured
    seed = settings.settings["seed"]
    lightning.seed_everything(seed, workers=False, verbose=False)
    if rank() == 0:
        remove_leftovers(folder.path, deep=True)
        for path in (folder.last, folder.best):
            remove_unnamed(path)
        remove_leftovers(cache_dir(settings.settings["data"].get("cache")) / "stores")
    data = settings.make_data(setup=True, left_out=folder.left_out)
    record = record_of(settings, data)
    metrics = settings.make_metrics(data)
    monitor, mode = settings.best(metrics, filter(None, named_sets(data.validation())))
    phases.end("data")
    model = _make_model(settings, data)
    finetune, lora = settings.finetune(), settings.lora()
    task = Task(model, settings.optimizer(), metrics, settings.length_warmup(), seed, finetune)
    chosen, throughput = settings.settings["checkpoint"], Throughput()
    # made in every process; only those of the first write
    log = RunLog(folder.path, name="logs", version=folder.next_version(), throughput=throughput)
    loggers: list[Logger] = [
        log,
        TensorBoardLogger(folder.path, name="tensorboard", version=""),
    ]
    guard = FiniteGuard()
    often = Often(chosen["every_n_steps"], chosen["every_n_tokens"], chosen["val_every_n_tokens"], throughput)
    run = Training(
        folder=folder,
        data=data,
        datamodule=settings.make_datamodule(data),
        card=model_card(settings, data, model.spec or {}),
        task=task,
        lora=lora,
        throughput=throughput,
        checkpoints=RunCheckpoints(folder.last, folder.best, often, monitor, mode, record, guard),
    )
    average = [WeightAverage(model, ema.decay)] if (ema := settings.ema()).decay else []
    first = FirstStep(phases, Path(log.log_dir), str(folder.path))
    callbacks: list[lightning.Callback] = [throughput, first, *average, guard, run.checkpoints]
    begins = not folder.last.exists()
    if not begins:
        callbacks.append(_resumption(run, settings, record, allow_changed_data))
    elif finetune.init_from:
        _begin_from(finetune, run)
    elif lora.rank:
        raise ConfigError(
            "lora.rank trains adapters beside frozen weights; finetune.init_from must name the run with those weights "
            "(fit --init-from RUN)."
        )
    if lora.rank:
        add_adapters(model, lora)
        callbacks.append(AdapterRecord(lora))
    finetune.check(model)
    freezing = [Freezing(model, finetune)] if finetune.freeze else []
    phases.end("model")
    trainer = make_trainer(settings, folder, [*callbacks, *freezing], loggers, progress)
    # before other processes are started, each of which would say it, too
    needing: list[Any] = [task, *average, *freezing]
    for one in needing:
        one.check_strategy(trainer)
    shared = getattr(model.backbone, "context_parallel", 1)
    check_processes(shared, trainer.world_size)
    if shared > 1:
        model.check_splits_time()
        loader, warmup = settings.settings["loader"], settings.length_warmup()
        in_a_row = loader["batch_size"] if loader["pack"] else 1
        check_shares(shared, data, repr(settings.settings["data"]["name"]), in_a_row, warmup.start)
    if isinstance(trainer.profiler, StepParts):  # type: ignore[attr-defined]
        trainer.profiler.watch(task)  # type: ignore[attr-defined]
    with _undone_if_refused(folder, trainer) if begins and not resume else contextlib.nullcontext():
        return _run(run, settings, trainer, record, begins, resume)


def _run(
    run: Training, settings: RunConfig, trainer: lightning.Trainer, record: DataRecord, begins: bool, resume: bool
) -> Outcome:
    folder, data, model = run.folder, run.data, run.task.model
    if begins:
        if resume and trainer.is_global_zero:
            say(folder, "there is no checkpoint yet; the run starts at its first step")
        _begin(trainer, settings, run, record)
    elif (ended := _rest(run, settings, trainer)) is not None:
        return ended._replace(facts=Facts.of(model, data))
    if trainer.is_global_zero:
        kept = settings.finetune().frozen(model, 0)
        still = sum(p.numel() for name, p in model.named_parameters() if name in kept or not p.requires_grad)
        more = f", {still:,} of them frozen at first" if still else ""
        print(f"{folder.path}: {model.n_parameters():,} parameters{more}", flush=True)
        lacks = "" if named_sets(data.validation()) else "there is no validation set: the last weights are kept"
        for told in filter(None, (data.splits_told(), lacks, classes_told(data), _left_out_told(data, folder))):
            print(f"{folder.path}: {told}", flush=True)
    with watch_processes(trainer):
        return _trained(run, trainer, begins)._replace(facts=Facts.of(model, data, not begins))


@contextlib.contextmanager
def _undone_if_refused(folder: RunFolder, trainer: lightning.Trainer) -> Iterator[None]:
    """A new run that is refused before its first step, by a callback or for its data, leaves nothing in its folder."""
    if not trainer.is_global_zero:  # the first process makes the folder, perhaps later than this one looks
        yield
        return
    before = set(folder.path.iterdir())
    try:
        yield
    except UserError:
        if trainer.global_step == 0 and not folder.last.exists():
            for path in set(folder.path.iterdir()) - before:
                _remove_all(path)
        raise


def _remove_all(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _left_out_told(data: SequenceData, folder: RunFolder) -> str:
    """List the rows that were left out in the run's folder; one line for people, "" where there are none."""
    if not (rows := data.left_out()):
        return ""
    with atomic_file(folder.left_out, "w", encoding="utf-8") as file:
        file.writelines(json_text(row) + "\n" for row in rows)
    return f"{len(rows):,} rows that cannot be used are left out; they are listed in {folder.left_out.name}"


def _resumption(run: Training, settings: RunConfig, record: DataRecord, allow_changed_data: bool) -> Resumption:
    """What a resumed run needs. Prints what changed. Raises DataError for changed data that are not allowed,
    ConfigError for a changed setting that is fixed."""
    changed = changed_settings(run.folder, settings)
    refuse_fixed(run.folder, changed)
    lines = check_changed_data(run.folder, record, allow_changed=allow_changed_data)
    lines += [
        f"{key} changed: {shown(former)} -> {shown(now)}"
        for key, (former, now) in changed.items()
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
        accumulated=changed.get(_ACCUMULATED, [settings.trainer.get("accumulate_grad_batches", 1)])[0],
    )


def _rest(run: Training, settings: RunConfig, trainer: lightning.Trainer) -> Outcome | None:
    """Finish a run that has no step left to train; returns None if it has.

    Raises UserError when its checkpoint is of another model, or given settings would have no effect.
    """
    folder = run.folder
    checkpoint = read_checkpoint(folder.last, tensors="weights")
    load_weights(run.task.model, raw_weights(checkpoint), folder.last)
    changed, step = changed_settings(folder, settings), checkpoint["global_step"]
    ended = not changed and checkpoint.get(KEY, {}).get("ended")  # by a callback, or because its time was up
    if not (key := is_over(checkpoint, trainer)) and not ended:
        return None
    refuse_without_effect(folder, changed, step)
    run.checkpoints.recall(trainer, trainer.world_size // run.task.shares()[1])
    if run.is_complete(step):
        reason = f"{key} is {getattr(trainer, key.partition('.')[2])}" if key else "it had ended there"
        return Outcome(
            "finished",
            f"{folder.path}: nothing to do, the run is at step {step} and {reason}. To train it further: mambaseq fit "
            f"--resume {folder.path} --{key or 'trainer.max_steps'} MORE",
        )
    run.throughput.load_state_dict(checkpoint["callbacks"].get(run.throughput.state_key, {"tokens": 0, "seconds": 0.0}))
    return Outcome("finished", run.finish(trainer, step))


def _trained(run: Training, trainer: lightning.Trainer, begins: bool) -> Outcome:
    folder, checkpoints = run.folder, run.checkpoints
    try:
        with told_if_lost(trainer, folder.path, checkpoints), abandons_saving(trainer):
            with lent_to_lightning(trainer):
                trainer.fit(run.task, datamodule=run.datamodule, ckpt_path=None if begins else str(folder.last))
            checkpoints.ended = True
            checkpoints.guard.check(trainer, run.task)  # in all processes alike, before some wait for the others
            trainer.save_checkpoint(folder.last)
    except Interrupted as error:
        return interrupted(folder.path, f"Interrupted after step {error.step}.")
    except StoppedAtOnce:
        step = checkpoints.saved_step
        where = "there is no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
        return interrupted(folder.path, f"Stopped at once; {where}.")
    except Diverged as error:
        with abandons_saving(trainer):
            finish_saving(trainer)
        return diverged(folder.path, error, checkpoints.saved_step)
    except UserError:
        raise
    except Exception as error:
        if checkpoints.began:
            raise  # nobody's setting
        if not begins and not isinstance(error, MisconfigurationException):
            raise UserError(
                f"The run cannot be resumed from {folder.last} with these settings ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). The checkpoint is from another version or was changed, or a "
                "given setting does not fit it."
            ) from error
        if not isinstance(error, MisconfigurationException | ValueError):
            raise
        with explained("The run cannot start with these settings"):
            raise
    with told_if_lost(trainer, folder.path, checkpoints):
        return Outcome("finished", run.finish(trainer, trainer.global_step))


def _make_model(settings: RunConfig, data: SequenceData) -> SequenceModel:
    spec = settings.model_spec(data)
    with explained("The settings under model cannot be used"):
        model = build_model(spec)
    check_data(model, data, repr(settings.settings["data"]["name"]), settings.make_metrics(data))
    return model


def _begin_from(finetune: FinetuneConfig, run: Training) -> None:
    """Load the weights of another run or of a published model into the new model, and print which."""
    source, tokenizer = finetune.init_from, run.data.tokenizer
    with under_key("finetune.init_from", {}):
        loaded, published = load_source(source, tokenizer)
    found = begin_from(
        run.task.model, loaded, run.card, tokenizer, published=published, other_tokenizer=finetune.other_tokenizer
    )
    if rank() == 0:
        step = "" if loaded.card.step is None else f" (step {loaded.card.step})"
        say(run.folder, found.told(f"{source}{step}"))


def _begin(trainer: lightning.Trainer, settings: RunConfig, run: Training, record: DataRecord) -> None:
    folder = run.folder
    if not trainer.is_global_zero:
        return
    # of a run that ended before its first checkpoint
    for path in (folder.best, folder.results, folder.evaluation, folder.curves, folder.report, folder.left_out):
        _remove(path)
    write_record(folder, record)
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
    save_model(folder.model, None, run.card, run.data.tokenizer)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} has to be replaced, but cannot be removed: {error.strerror}. Move it away.") from error
    if path.suffix == ".ckpt":
        remove_parts(path)


def _go_on(settings: RunConfig, run: Training, record: DataRecord) -> None:
    """Change the folder once a resumed run really trains: save the new settings, and remove what was exported at its
    former end (those weights are in the checkpoints too)."""
    folder = run.folder
    for path in (folder.results, folder.evaluation, folder.report):
        _remove(path)
    if run.checkpoints.score is None:
        _remove(folder.best)  # by another metric, on other data, or because the last weights are kept from now on
    save_model(folder.model, None, run.card, run.data.tokenizer)
    write_record(folder, record)
    with atomic_file(folder.config, "w", encoding="utf-8") as file:
        file.write(settings.yaml)
