"""What a run needs beside Lightning's own callbacks."""

from __future__ import annotations

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from mambaseq.checkpoints.lightning_io import read_checkpoint


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} resumes it")
        self.step, self.checkpoint = step, checkpoint


class RunCheckpoints(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on, and `best.ckpt`, and stops the run when it is asked to.

    last: every so many optimizer steps, once all of the step is over. Where a validation is due after the step it is
        saved after that: a run that is killed in between validates again, and knows the score.
    best: after a validation that scored better than the one on disk, whose score is read from the file itself, so that
        no resumed run can put worse weights in its place. NaN is worse than any number.
    stop: Ctrl-C or SIGTERM finish the step at hand with its validation, save and raise `Interrupted`; a second one
        stops at once. Stopping in the middle of a step would leave weights and moments of two different steps.

    monitor: the logged metric that `best` goes by ("" keeps none), mode: "min" or "max" of it.
    score, results: of `best`: its monitored value, None before the first, and all of its validation metrics.
    validated_step: the optimizer step after which the last validation ran. began: whether training has.
    """

    def __init__(self, last: Path, best: Path, every_n_steps: int, monitor: str = "", mode: str = "min") -> None:
        self.last, self.best = last, best
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.score: float | None = None
        self.results: dict[str, float] = {}
        self.validated_step: int | None = None
        self.began = False
        self._due = self._stopping = self._asked = False
        self._previous: dict[int, Any] = {}

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.monitor}, {self.mode})"  # another metric's score is no score

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "results": self.results}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        state = None
        if trainer.is_global_zero and self.monitor and self.best.is_file():
            state = read_checkpoint(self.best)["callbacks"].get(self.state_key)
        state = trainer.strategy.broadcast(state)  # all processes have to decide alike, whatever disks they see
        if state is not None:
            self.score, self.results = state["score"], state["results"]

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.began = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stopping:  # only now has the step that was saved been logged as well
            raise Interrupted(trainer.global_step, self.last)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        stepped = not loop._should_accumulate()  # gradients so far are in no checkpoint
        self._due = stepped and trainer.global_step % self.every_n_steps == 0
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        validates = sum(trainer.num_val_batches) > 0 and loop._should_check_val_fx(fetcher)
        if not validates:
            self._save_last(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if self.monitor:
            score = float(trainer.callback_metrics[self.monitor])
            if self._is_better(score):
                self.score = score
                self.results = dict(pl_module.results)  # type: ignore[arg-type]
                trainer.save_checkpoint(self.best)
        self._save_last(trainer)

    def _is_better(self, score: float) -> bool:
        if self.score is None:
            return True
        if math.isnan(score) or math.isnan(self.score):
            return not math.isnan(score)
        return score < self.score if self.mode == "min" else score > self.score

    def _save_last(self, trainer: lightning.Trainer) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if trainer.fit_loop.epoch_loop._should_accumulate() or not (self._due or asked):
            return
        trainer.save_checkpoint(self.last)
        self._due, self._stopping = False, asked

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


class Throughput(lightning.Callback):
    """Tokens a second of training alone (validation and saving excluded), over the whole run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

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
