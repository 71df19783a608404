"""What `mambaseq fit --resume` checks before it continues: what changed, and what is left to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import lightning
import torch

from mambaseq.atomic import atomic_file, json_text
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError, DataError, UserError, cut_list, cut_path, shown
from mambaseq.plain import flatten, parse_yaml, read_json, read_yaml
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.config import RunConfig
from mambaseq.runs.parsing import parse_config
from mambaseq.tasks.callbacks import RunCheckpoints
from mambaseq.tasks.optimizer import OptimizerConfig, reapply
from mambaseq.tasks.record import KEY, DataRecord

LIMITS = {"max_steps": "trainer.max_steps", "max_epochs": "trainer.max_epochs"}


def say(folder: RunFolder, text: str) -> None:
    """Tell the user something about a run."""
    print(f"{folder.path}: {text}", file=sys.stderr, flush=True)


def record_of(settings: RunConfig, data: SequenceData) -> DataRecord:
    """The record of the data of these settings as they are now. `data` has been set up."""
    return DataRecord.of(flatten(parse_yaml(settings.yaml, "the configuration")), data.sources())


def read_record(folder: RunFolder) -> DataRecord | None:
    """The record of a run's data when it was last started or resumed; None if there is none."""
    try:
        return DataRecord.read(read_json(folder.data))
    except UserError:
        return None


def write_record(folder: RunFolder, record: DataRecord) -> None:
    """Write what a run's data are, atomically."""
    with atomic_file(folder.data, "w", encoding="utf-8") as file:
        file.write(json_text(record.plain(), indent=2, ensure_ascii=False) + "\n")


def changed_settings(folder: RunFolder, settings: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values changed since the run was last started or resumed, each with both values. A key that an earlier
    version did not save had the value that is now the default."""
    former = flatten(read_yaml(folder.config))
    now = flatten(parse_yaml(settings.yaml, "the configuration"))
    if any(not _holds(former, key) for key in now):
        today = flatten(parse_yaml(parse_config(str(folder.config), []).yaml, "the configuration"))
        former |= {key: value for key, value in today.items() if not _holds(former, key)}
    return {
        key: (former.get(key), now.get(key))
        for key in sorted(former.keys() | now.keys())
        if former.get(key) != now.get(key)
    }


def _holds(settings: dict[str, Any], key: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in settings)


def _told(value: Any) -> str:
    """A setting for a message; of paths only the ends, where they differ."""
    if isinstance(value, list | tuple) and value:
        return f"[{cut_list(map(_told, value), 3)}]"
    return cut_path(value, 120) if isinstance(value, str) and "/" in value else shown(value)


def check_changed_data(folder: RunFolder, record: DataRecord, *, allow_changed: bool) -> list[str]:
    """Messages about what changed in the data since the run was last started or resumed.

    Raises DataError when files changed and that is not allowed.
    """
    former = read_record(folder)
    if former is None:
        return ["an earlier version did not record its data, so changes cannot be noticed"]
    lines = [
        f"{key} changed: {_told(former.settings.get(key))} -> {_told(record.settings.get(key))}"
        for key in former.changed_settings(record)
        if key.startswith("data.")
    ]
    if files := former.changed_files(record):
        told = cut_list(files, 5, separator="; ")
        if not allow_changed:
            raise DataError(
                f"The data of {folder.path} changed since it was trained: {told}. Restore the files, or continue with "
                "the new ones by --allow-changed-data; earlier scores then do not count."
            )
        lines += [f"the data changed: {told}"]
    return lines


def is_over(checkpoint: dict[str, Any], trainer: lightning.Trainer) -> str:
    """The setting by which the run is over at its checkpoint ("trainer.max_steps"); "" if it is not over. Raises
    UserError for a checkpoint that does not say how many epochs are done."""
    try:
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The run cannot be resumed from checkpoints/last.ckpt of {trainer.default_root_dir}: the number of "
            f"finished epochs is missing ({error}). The file is from another version or was changed; use another "
            "checkpoint."
        ) from error
    done = {"max_steps": checkpoint["global_step"], "max_epochs": epochs}
    for name, key in LIMITS.items():
        limit = getattr(trainer, name)
        if limit is not None and 0 <= limit <= done[name]:
            return key
    return ""


def refuse_without_effect(folder: RunFolder, changed: dict[str, tuple[Any, Any]], step: int) -> None:
    """Raise ConfigError for settings that would have no effect because the run is over."""
    idle = [key for key in changed if key not in LIMITS.values()]
    if idle:
        raise ConfigError(
            f"{cut_list(idle)} would have no effect: the run at {folder.path} is over, at step {step}. Leave it out, "
            "or train further: --trainer.max_steps MORE."
        )


def other_steps(former: tuple[int, int, int], now: tuple[int, int, int]) -> str:
    """A warning about steps that take other numbers of sequences than before, with what keeps them; "" for the same.

    former, now: sequences in a batch of each process, processes (or groups of them that share sequences), and batches
    that are accumulated for a step.
    """
    (batch, groups, accumulated), (before, after) = now, map(math.prod, (former, now))
    if before == after:
        return ""
    ways = []
    if before % (groups * accumulated) == 0:
        ways.append(f"--loader.batch_size {before // (groups * accumulated)}")
    if before % (groups * batch) == 0:  # in the memory that a batch takes
        ways.append(f"--trainer.accumulate_grad_batches {before // (groups * batch)}")
    keeps = f" {' or '.join(ways)} keeps it." if ways else ""
    return (
        f"warning: a step takes {after:,} sequences now, {before:,} before: {' * '.join(map(str, now))}, not "
        f"{' * '.join(map(str, former))} (batch size, processes with sequences of their own, batches of a step).{keeps}"
    )


FIXED = {
    "finetune.init_from": "initial weights are loaded before the first step",
    "finetune.other_tokenizer": "initial weights are loaded before the first step",
    "optimizer.name": "the state of one optimizer is of no use to another",
    "optimizer.options": "the optimizer's state depends on them",
    "lora.rank": "its adapters are part of the model",
    "lora.alpha": "its adapters are part of the model",
    "lora.targets": "its adapters are part of the model",
    "finetune.lr_of": "only its factors can: the patterns group the optimizer's state",
}


def refuse_fixed(folder: RunFolder, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError for settings that cannot change once a run has begun."""
    for key, why in FIXED.items():
        found = [values for name, values in changed.items() if name == key or name.startswith(f"{key}.")]
        if any(key != "finetune.lr_of" or {type(value) for value in values} - {int, float} for values in found):
            raise ConfigError(
                f"{key} cannot change in a run that has begun: {why}. Leave it out, or start another run: mambaseq fit "
                f"--config {folder.config} --out ANOTHER --key value."
            )


class Resumption(lightning.Callback):
    """Makes a resumed run use the given settings instead of those in the checkpoint: the optimizer's, and the place in
    the data if the batch size or the number of processes changed. Where by the latter a step is of another number of
    sequences, it says so.

    go_on: called when training really begins, in the first process. same_data: the training data are those of the
        checkpoint, so a place in them means the same. accumulated: batches of a step before.
    """

    def __init__(
        self,
        folder: RunFolder,
        optimizer: OptimizerConfig,
        checkpoints: RunCheckpoints,
        go_on: Callable[[], None],
        *,
        same_data: bool,
        accumulated: int = 1,
    ) -> None:
        self.folder, self.optimizer, self.checkpoints, self.go_on = folder, optimizer, checkpoints, go_on
        self.same_data, self.accumulated = same_data, accumulated
        self._is_first = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_first:  # by it logs count steps; Lightning's is one ahead after a run that had ended
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._is_first = False

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ours, module = checkpoint.get(KEY, {}), trainer.datamodule  # type: ignore[attr-defined]
        if not ours.get("batch_size"):
            return
        groups = trainer.world_size // module.sharing
        if groups != ours["world_size"] and trainer.is_global_zero:
            before = ours["batch_size"], ours["world_size"], self.accumulated
            if told := other_steps(before, (module.batch_size, groups, trainer.accumulate_grad_batches)):
                say(self.folder, told)
        if not self.same_data:
            return
        former, now = ours["batch_size"] * ours["world_size"], module.batch_size * groups
        if former == now:
            return
        size = getattr(module.data.train(), "__len__", lambda: 0)()
        module.batches_done = moved(module.batches_done, size, former, now)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if size >= max(former, now):
            behind = progress["ready"] - progress["completed"]
            ready = size // now if progress["ready"] >= size // former else moved(progress["ready"], size, former, now)
            progress |= {"ready": ready, "started": ready, "processed": ready, "completed": ready - behind}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._check_moments(optimizer)
        for optimizer, config in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=False):
            before, now = reapply(optimizer, config.scheduler)  # type: ignore[arg-type]
            if before != now and trainer.is_global_zero:
                say(
                    self.folder,
                    f"the learning rate continues at {now:.3g}; without the change it would be {before:.3g} "
                    f"({self.optimizer.schedule} to step {trainer.estimated_stepping_batches:,.0f})",
                )
        if trainer.is_global_zero:
            if self.checkpoints.forgotten:
                say(self.folder, f"the best score so far no longer counts: {self.checkpoints.forgotten}")
            self.go_on()
            say(self.folder, f"goes on from step {trainer.global_step:,}")

    def _check_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for optimizer moments that do not have the shape of their weights. They would fail, or be
        broadcast, in the first step."""
        for parameter, state in optimizer.state.items():
            missing: list[list[str]] = [sorted(needed - state.keys()) for needed in _STATES]
            least = min(missing, key=len)
            ours = self.optimizer.name in ("adamw", "muon")
            if ours and state and least:  # a frozen weight has none
                raise UserError(
                    f"The checkpoint {self.folder.last} lacks an optimizer's {cut_list(least)} for "
                    f"{tuple(parameter.shape)} weights. It was changed; use another one."
                )
            for name, value in state.items():
                if (
                    ours
                    and name in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                    and not (
                        isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.isfinite().all()
                    )
                ):
                    raise UserError(
                        f"The checkpoint {self.folder.last} has an optimizer's {name} that is not a finite number for "
                        f"each of {tuple(parameter.shape)} weights. It was changed; use another one."
                    )


_STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})  # of a weight: those of AdamW and of Muon


def moved(batches: int, size: int, former: int, now: int) -> int:
    """The number of batches that a run has done after the sequences of a step changed: the place in the data stays in
    the same epoch, and no sequence of it is seen twice. size: sequences an epoch, 0 for a stream.

    >>> moved(7, 20, 4, 2)  # one epoch and 8 of 20 sequences
    14
    >>> moved(7, 20, 4, 10)  # 8 of 20: the second of two batches of 10
    3
    """
    if size < max(former, now):
        return -(-batches * former // now)
    epoch, place = divmod(batches, size // former)
    return epoch * (size // now) + min(-(-place * former // now), size // now)
