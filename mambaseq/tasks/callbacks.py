"""What a run needs beside Lightning's own callbacks."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} resumes it")
        self.step, self.checkpoint = step, checkpoint


class StopAfterStep(lightning.Callback):
    """Ctrl-C or SIGTERM: finish the step at hand, save a checkpoint, stop. A second one stops at once.

    Stopping in the middle of an optimizer step would leave weights and moments of two different steps.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._asked = False
        self._previous: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulating = trainer.fit_loop.epoch_loop._should_accumulate()  # gradients so far are in no checkpoint
        asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if asked and not accumulating:
            trainer.save_checkpoint(self.checkpoint)
            raise Interrupted(trainer.global_step, self.checkpoint)

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
