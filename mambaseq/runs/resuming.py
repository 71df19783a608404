"""What `mambaseq fit --resume` looks at before it goes on: what changed, and what is left to do."""

from __future__ import annotations

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
    print(f"{folder.path}: {text}", file=sys.stderr, flush=True)


def record_of(settings: RunConfig, data: SequenceData) -> DataRecord:
    """What the data of these settings are now; `data` is set up."""
    return DataRecord.of(flatten(parse_yaml(settings.yaml, "the configuration")), data.sources())


def read_record(folder: RunFolder) -> DataRecord | None:
    """What the data of a run were when it was begun, or gone on with, last; None where nobody wrote it down."""
    try:
        return DataRecord.read(read_json(folder.data))
    except UserError:
        return None


def write_record(folder: RunFolder, record: DataRecord) -> None:
    with atomic_file(folder.data, "w", encoding="utf-8") as file:
        file.write(json_text(record.plain(), indent=2, ensure_ascii=False) + "\n")


def changed_settings(folder: RunFolder, settings: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values are not those that the run was last gone on with, each with both. What an earlier version did
    not write down had the value that is now the default."""
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
    """A setting for a message; of paths the ends, in which they differ."""
    if isinstance(value, list | tuple) and value:
        return f"[{cut_list(map(_told, value), 3)}]"
    return cut_path(value, 120) if isinstance(value, str) and "/" in value else shown(value)


def check_changed_data(folder: RunFolder, record: DataRecord, *, allow_changed: bool) -> list[str]:
    """Lines that say what of the data changed since the run was last gone on with.

    Raises DataError when files hold something else than they did and that is not allowed.
    """
    former = read_record(folder)
    if former is None:
        return ["what its data were was not written down (by an earlier version), so no change of them can be told"]
    lines = [
        f"{key} changed: {_told(former.settings.get(key))} -> {_told(record.settings.get(key))}"
        for key in former.changed_settings(record)
        if key.startswith("data.")
    ]
    if files := former.changed_files(record):
        told = cut_list(files, 5, separator="; ")
        if not allow_changed:
            raise DataError(
                f"The data of {folder.path} changed since it was trained: {told}. Bring back what was there, "
                f"or go on with what is there now by --allow-changed-data; scores from before then do not count."
            )
        lines += [f"the data changed: {told}"]
    return lines


def is_over(checkpoint: dict[str, Any], trainer: lightning.Trainer) -> str:
    """The setting that ends the run where the checkpoint is ("trainer.max_steps"); "" when none does."""
    try:
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The run cannot go on from checkpoints/last.ckpt of {trainer.default_root_dir}: it does not say how many "
            f"epochs are done ({error}). It is of another version or was changed; use another one."
        ) from error
    done = {"max_steps": checkpoint["global_step"], "max_epochs": epochs}
    for name, key in LIMITS.items():
        limit = getattr(trainer, name)
        if limit is not None and 0 <= limit <= done[name]:
            return key
    return ""


def refuse_without_effect(folder: RunFolder, changed: dict[str, tuple[Any, Any]], step: int) -> None:
    """Raise ConfigError for settings that a run which is over would not use."""
    idle = [key for key in changed if key not in LIMITS.values()]
    if idle:
        raise ConfigError(
            f"{cut_list(idle)} would have no effect: the run at {folder.path} is over, at step {step}. Leave it away, "
            f"or train further with it: --trainer.max_steps MORE."
        )


FIXED = {
    "finetune.init_from": "a run takes the weights that it begins with before its first step",
    "optimizer.name": "what one optimizer has gathered of the gradients is nothing to the other",
    "optimizer.options": "what the optimizer has gathered was by them",
    "lora.rank": "its adapters are part of the model",
    "lora.alpha": "its adapters are part of the model",
    "lora.targets": "its adapters are part of the model",
    "finetune.lr_of": "only the factors of its patterns can, which sort what the optimizer has gathered",
}


def refuse_fixed(folder: RunFolder, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError for settings that a run which has begun cannot change."""
    for key, why in FIXED.items():
        found = [values for name, values in changed.items() if name == key or name.startswith(f"{key}.")]
        if any(key != "finetune.lr_of" or {type(value) for value in values} - {int, float} for values in found):
            raise ConfigError(
                f"{key} cannot change in a run that has begun: {why}. Leave it away, or begin another run: "
                f"mambaseq fit --config {folder.config} --out ANOTHER --key value."
            )


class Resumption(lightning.Callback):
    """Lets a resumed run use the settings that it is given, where a checkpoint brings its own: the optimizer's, and the
    place in the data where the size of a batch, or the number of processes, changed.

    go_on: called once training really begins, in the first process. same_data: whether the training data are those of
        the checkpoint, so that a place in them means the same.
    """

    def __init__(
        self,
        folder: RunFolder,
        optimizer: OptimizerConfig,
        checkpoints: RunCheckpoints,
        go_on: Callable[[], None],
        *,
        same_data: bool,
    ) -> None:
        self.folder, self.optimizer, self.checkpoints, self.go_on = folder, optimizer, checkpoints, go_on
        self.same_data = same_data
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
        if not (ours.get("batch_size") and self.same_data):
            return
        former = ours["batch_size"] * ours["world_size"]
        now = module.batch_size * trainer.world_size
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
                    f"the learning rate goes on at {now:.3g}; as it was, it would have been {before:.3g} "
                    f"({self.optimizer.schedule} to step {trainer.estimated_stepping_batches:,.0f})",
                )
        if trainer.is_global_zero:
            if self.checkpoints.forgotten:
                say(self.folder, f"the best score so far does not count any more: {self.checkpoints.forgotten}")
            self.go_on()

    def _check_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for moments that are not of the weights that they are for: they would fail, or be spread over
        them, in the first step."""
        for parameter, state in optimizer.state.items():
            missing: list[list[str]] = [sorted(needed - state.keys()) for needed in _STATES]
            least = min(missing, key=len)
            ours = self.optimizer.name in ("adamw", "muon")
            if ours and state and least:  # a weight that was frozen has none
                raise UserError(
                    f"The checkpoint {self.folder.last} lacks an optimizer's {cut_list(least)} for "
                    f"{tuple(parameter.shape)} weights. It was changed; use another one."
                )
            for name, value in state.items():
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer") and not (
                    isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.isfinite().all()
                ):
                    raise UserError(
                        f"The checkpoint {self.folder.last} has an optimizer's {name} that is not a finite number for "
                        f"each of {tuple(parameter.shape)} weights. It was changed; use another one."
                    )


_STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})  # of a weight, by AdamW and by Muon


def moved(batches: int, size: int, former: int, now: int) -> int:
    """Where a run that has done so many batches is in the same data when a step takes another number of sequences: in
    the same epoch, none of whose sequences is seen twice. size: sequences an epoch, 0 for a stream.

    >>> moved(7, 20, 4, 2)  # one epoch and 8 of 20 sequences
    14
    >>> moved(7, 20, 4, 10)  # 8 of 20: the second of two batches of 10
    3
    """
    if size < max(former, now):
        return -(-batches * former // now)
    epoch, place = divmod(batches, size // former)
    return epoch * (size // now) + min(-(-place * former // now), size // now)
