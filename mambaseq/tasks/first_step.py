"""What the time until a run's first step went into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from tqdm import tqdm

from mambaseq.atomic import atomic_file, json_text
from mambaseq.waiting import Phases

FILE = "first_step.json"


class FirstStep(lightning.Callback):
    """Ends the phases until a process's first training batch is done, and tells their seconds.

    They are, after those that ended before: "processes" (Lightning's trainer is made; others are started and met, which
    import for themselves), "placing" (the model is moved to its device, wrapped and given an optimizer), "first batch"
    (it is read) and "first step" (forward, backward, optimizer; kernels are compiled). To be behind the callbacks that
    wait for the GPU at a batch's end.

    phases: since the command, or the call, that starts the run. folder: for `first_step.json`, written by the first
    process. run: what the line that it prints begins with.
    """

    def __init__(self, phases: Phases, folder: Path, run: str) -> None:
        self._phases, self._folder, self._run = phases, folder, run
        self._waits = True

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._waits and stage == "fit":
            self._phases.end("processes")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._waits:
            self._phases.end("placing")

    def on_train_batch_start(self, *_: Any) -> None:
        if self._waits:
            self._phases.end("first batch")

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not self._waits:
            return
        self._waits = False
        self._phases.end("first step")
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder / FILE, "w", encoding="utf-8") as file:
            file.write(json_text(self._phases.plain(), indent=1) + "\n")
        tqdm.write(f"{self._run}: first step after {self._phases.told()}")  # bars move out of its way
