"""What a run needs beside Lightning's own callbacks."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.errors import UserError
from mambaseq.tasks.finite import FiniteGuard
from mambaseq.tasks.record import KEY, DataRecord


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} resumes it")
        self.step, self.checkpoint = step, checkpoint


class StoppedAtOnce(BaseException):
    """The run was asked a second time to stop, and stopped in the middle of what it did."""


class RunCheckpoints(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on, and `best.ckpt`, and stops the run when it is asked to.

    last: every so many optimizer steps, once all of the step is over. Where a validation is due after the step it is
        saved after that: a run that is killed in between validates again, and knows the score.
    best: after a validation that scored better than the one on disk, whose score is read from the file itself, so that
        no resumed run can put worse weights in its place. A score that was measured on other data is none, and so is
        NaN.
    stop: Ctrl-C or SIGTERM finish the step at hand with its validation, save and raise `Interrupted`; a second one
        raises `StoppedAtOnce`. Stopping in the middle of a step would leave weights and moments of two different steps.

    monitor: the logged metric that `best` goes by ("" keeps none), mode: "min" or "max" of it.
    data: what is trained and validated on; written into every checkpoint. guard: see `FiniteGuard`.
    score, results: of `best`: its monitored value, None before the first, and all of its validation metrics.
    forgotten: why a score on disk does not count, "" where it does. saved_step: of `last`, None before the first.
    validated_step: the optimizer step after which the last validation ran. began: whether training has.
    ended: set when training is over, so that `last` says it.
    """

    def __init__(
        self,
        last: Path,
        best: Path,
        every_n_steps: int,
        monitor: str = "",
        mode: str = "min",
        data: DataRecord | None = None,
        guard: FiniteGuard | None = None,
    ) -> None:
        self.last, self.best = last, best
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.data, self.guard = data, guard or FiniteGuard()
        self.score: float | None = None
        self.results: dict[str, float] = {}
        self.forgotten = ""
        self.validated_step: int | None = None
        self.saved_step: int | None = None
        self.began = self.ended = self._flush = False
        self._due = self._stopping = self._asked = False
        self._previous: dict[int, Any] = {}

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.monitor}, {self.mode})"  # another metric's score is no score

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "results": self.results}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[KEY] = {
            "data": None if self.data is None else self.data.plain(),
            "batch_size": getattr(datamodule, "batch_size", None),
            "world_size": trainer.world_size,
            "ended": self.ended,
        }

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.recall(trainer)

    def recall(self, trainer: lightning.Trainer) -> None:
        """Read score and results of `best`, where they are of this metric and of these data."""
        found: tuple[Any, str] = None, ""
        if trainer.is_global_zero and self.monitor and self.best.is_file():
            checkpoint = read_checkpoint(self.best)
            try:
                state = checkpoint["callbacks"].get(self.state_key)
                former = DataRecord.read(checkpoint.get(KEY, {}).get("data"))
                score = None if state is None or state["score"] is None else float(state["score"])
                if state is not None:
                    state = {"score": score, "results": {**state["results"]}}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"The checkpoint {self.best} does not say what its score is ({type(error).__name__}: "
                    f"{str(error)[:200]}). Remove it, or copy it again; the run then finds its best weights anew."
                ) from error
            if state is None:
                found = None, "it was measured by another metric"
            elif former is not None and self.data is not None and not former.same(self.data):
                found = None, f"{score:.4g} at step {checkpoint['global_step']} was measured on other data"
            elif score is not None and math.isfinite(score):
                found = state, ""
        found = trainer.strategy.broadcast(found)  # all processes have to decide alike, whatever disks they see
        state, self.forgotten = found
        if state is not None:
            self.score, self.results = state["score"], state["results"]

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise StoppedAtOnce
        self._asked = True
        with contextlib.suppress(OSError):  # print is not safe here: the signal may have come in the middle of one
            os.write(2, b"\nStopping after this step; once more stops at once.\n")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.began = True
        self.saved_step = trainer.global_step if self.last.is_file() else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._flush:  # only now has the step that was saved been logged as well
            self._save_logs(trainer)
            self._flush = False
        if self._stopping:
            raise Interrupted(trainer.global_step, self.last)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        stepped = not loop._should_accumulate()  # gradients so far are in no checkpoint
        if stepped and _is_last(trainer):
            trainer.should_stop = True  # Lightning then validates this step as well, whatever the interval
        self._due = stepped and trainer.global_step % self.every_n_steps == 0
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        validates = sum(trainer.num_val_batches) > 0 and loop._should_check_val_fx(fetcher)
        if not validates:
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if self.monitor:
            score = float(trainer.callback_metrics[self.monitor])
            if self._is_better(score):
                self.guard.check(trainer, pl_module)
                self.score = score
                self.results = dict(pl_module.results)  # type: ignore[arg-type]
                trainer.save_checkpoint(self.best)
        self._save_last(trainer, pl_module)

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score) or self.score is None:
            return math.isfinite(score)
        return score < self.score if self.mode == "min" else score > self.score

    def _save_last(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if trainer.fit_loop.epoch_loop._should_accumulate() or not (self._due or asked):
            return
        self.guard.check(trainer, pl_module)
        self._save_logs(trainer)  # a resumed run does not log again what lies before its checkpoint
        trainer.save_checkpoint(self.last)
        self.saved_step = trainer.global_step
        self._due, self._stopping, self._flush = False, asked, True

    def _save_logs(self, trainer: lightning.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()


def _is_last(trainer: lightning.Trainer) -> bool:
    """Whether the optimizer step that is over is the run's last by its number of steps or epochs."""
    loop = trainer.fit_loop
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    last_epoch = 0 <= epochs <= trainer.current_epoch + 1 and loop.epoch_loop.batch_progress.is_last_batch
    return 0 <= trainer.max_steps <= trainer.global_step or last_epoch


class Throughput(lightning.Callback):
    """Tokens a second of training alone (validation and saving excluded), over the whole run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = int(state_dict["tokens"]), float(state_dict["seconds"])

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda" and batch_idx % 10 == 0:
            torch.cuda.synchronize(pl_module.device)
        self.seconds += time.perf_counter() - self._started
        self.tokens += batch.inputs.shape[0] * batch.inputs.shape[1] * trainer.world_size
        if batch_idx % 10 == 0 and self.seconds > 0:
            pl_module.log("train/tokens_per_second", self.tokens / self.seconds)
