"""Law 6 for a configuration: a short run, and the same run killed and resumed, end with the same weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from mambaseq.atomic import json_text
from mambaseq.checking.laws import LawBroken
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.registry import allow_imports
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.finishing import Outcome
from mambaseq.runs.training import fit

STEPS, KILLED_AFTER = 4, 2


class Killed(Exception):
    """Stands for a kill: the run cannot handle it."""


class Kill(lightning.Callback):
    """Ends a run within a step, like a crash: nothing is saved."""

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_step == KILLED_AFTER + 1:
            raise Killed


def check_training(config: str, overrides: list[str], folder: Path, callbacks: Sequence[Any] = ()) -> RunFolder:
    """Train for four steps; killed after the third and gone on with from the checkpoint of the second, the weights are
    the same. callbacks: those of the configuration, as they are written. Returns the finished run. Raises LawBroken,
    and what training raises."""
    whole, killed = RunFolder(folder / "whole"), RunFolder(folder / "killed")
    _done(whole, config, overrides)
    kill = {"class_path": f"{__name__}.Kill", "init_args": {}}
    with allow_imports(__name__):
        try:
            _fit(config, killed, [*overrides, f"--trainer.callbacks={json_text([*callbacks, kill])}"])
        except Killed:
            pass
        else:
            raise LawBroken(f"the run ended before step {STEPS}.")
        _done(killed, str(killed.config), [f"--trainer.callbacks={json_text([*callbacks])}"], resume=True)
    one, other = (read_checkpoint(run.last)["state_dict"] for run in (whole, killed))
    wrong = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    if wrong or one.keys() != other.keys():
        raise LawBroken(
            f"a killed and resumed run ends with other weights than one that was not ({wrong[:1] or 'names'}): "
            "something that it depends on is not in its checkpoint."
        )
    return whole


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Runs the block without output, since the user did not ask for these runs."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _fit(config: str, run: RunFolder, overrides: list[str], resume: bool = False) -> Outcome:
    with unsaid():
        return fit(config, run, overrides, resume=resume, progress=False)


def _done(run: RunFolder, config: str, overrides: list[str], resume: bool = False) -> None:
    outcome = _fit(config, run, overrides, resume)
    if outcome.status != "finished":
        raise LawBroken(outcome.message)
