"""The progress bar of training and evaluation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from mambaseq.tasks.later import Later


class Bar(TQDMProgressBar):
    """Lightning's bar on standard error. It moves by time, not by batches; its end is the run's, also of one that stops
    early; it says that the first step, or an evaluation's first batch, compiles kernels, whose time is no part of its
    speed. Where standard error is no terminal, a line now and then is enough. On a terminal a GPU is not waited for
    but at an epoch's end: the loss of its training is that of when the bar was drawn before."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._every = 0.2 if sys.stderr.isatty() else 30.0
        self._drawn = -1e9
        self._first = True
        self._loss: Later | None = None

    def _bar(self, description: str, row: int = 0, leave: bool = True) -> Tqdm:
        return Tqdm(
            desc=description,
            position=2 * self.process_position + row,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_train_tqdm(self) -> Tqdm:
        return self._bar(self.train_description)

    def init_sanity_tqdm(self) -> Tqdm:
        return self._bar(self.sanity_check_description, leave=False)

    def init_validation_tqdm(self) -> Tqdm:
        alone = self.trainer.state.fn == "validate"
        return self._bar(self.validation_description, row=0 if alone else 1, leave=alone)

    def init_test_tqdm(self) -> Tqdm:
        return self._bar(self.test_description)

    def init_predict_tqdm(self) -> Tqdm:
        return self._bar(self.predict_description)

    def _should_update(self, current: int, total: int | float | None) -> bool:
        now = time.monotonic()
        if self.is_disabled or (current != total and now - self._drawn < self._every):
            return False
        self._drawn = now
        return True

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the number of the log file
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            before, now = self._loss, Later(loss)
            self._loss = now
            told = before if before is not None and loss.is_cuda and self._every < 1 else now
            metrics["train/loss"] = told.read()
        return metrics

    def on_train_start(self, *arguments: Any) -> None:
        self._loss = None  # of a training before this one
        super().on_train_start(*arguments)

    def on_train_epoch_end(self, *arguments: Any) -> None:
        self._loss = None  # what stays in sight is the last
        super().on_train_epoch_end(*arguments)

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        # a resumed run goes on in the middle of an epoch; later the loop still tells of the epoch before
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready if self._first else 0
        done = done if done < trainer.num_training_batches else 0
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        total = min(trainer.num_training_batches, done + left if trainer.max_steps >= 0 else float("inf"))
        bar = self.train_progress_bar
        bar.reset(None if total == float("inf") else int(total))
        bar.n = bar.initial = done
        bar.set_description("First step (kernels are compiled)" if self._first else f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        with self._first_ends(self.train_progress_bar, f"Epoch {trainer.current_epoch}"):
            super().on_train_batch_end(trainer, *arguments)

    @contextlib.contextmanager
    def _first_ends(self, bar: Any, description: str) -> Iterator[None]:
        """After a process's first batch the bar says what it does again, and its speed begins: what compiling took is
        no part of it."""
        if not self._first:
            yield
            return
        self._first, self._drawn = False, -1e9
        bar.set_description(description, refresh=False)
        yield
        if not bar.disable:  # as it is in all processes of a run but one
            bar.initial, bar.start_t = bar.n, bar._time()
            bar.last_print_t = bar.start_t  # one that was last drawn before its start is closed without an end of line

    def on_validation_batch_start(self, trainer: lightning.Trainer, *arguments: Any, **options: Any) -> None:
        super().on_validation_batch_start(trainer, *arguments, **options)
        if self._first and trainer.state.fn == "validate":
            self.val_progress_bar.set_description("First batch (kernels are compiled)")

    def on_validation_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **options: Any) -> None:
        with self._first_ends(self.val_progress_bar, self.validation_description):
            super().on_validation_batch_end(trainer, *arguments, **options)

    def on_test_batch_start(self, *arguments: Any, **options: Any) -> None:
        super().on_test_batch_start(*arguments, **options)
        if self._first:
            self.test_progress_bar.set_description("First batch (kernels are compiled)")

    def on_test_batch_end(self, *arguments: Any, **options: Any) -> None:
        with self._first_ends(self.test_progress_bar, self.test_description):
            super().on_test_batch_end(*arguments, **options)

    def on_exception(self, *_: Any) -> None:
        """What is said of it begins a line."""
        for name in ("_val_progress_bar", "_train_progress_bar", "_test_progress_bar"):
            if (bar := getattr(self, name, None)) is not None:
                bar.close()

    def on_train_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        bar = self.train_progress_bar
        bar.total = bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.ready or bar.n
        super().on_train_end(trainer, *arguments)
