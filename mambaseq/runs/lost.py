"""Runs of several processes of which one is lost: the others stop, each with a reason, and the run can go on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch.distributed as dist

from mambaseq.errors import UserError, paragraph
from mambaseq.started import STARTED_BY, end_with
from mambaseq.tasks.callbacks import RunCheckpoints

T = TypeVar("T")

_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
# the logger of what Lightning says before it kills the processes that are left of those that it started
_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"
_ALONE = "_by_first_alone"  # of an error: the others do not know of it


class ProcessLost(UserError):
    """Another process of the run has ended or does not answer. The message says how the run goes on."""


@contextlib.contextmanager
def told_if_lost(trainer: lightning.Trainer, folder: Path, checkpoints: RunCheckpoints) -> Iterator[None]:
    """Turn errors of the messages between processes into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size == 1 or not _is_about_others(error):
            raise
        told = _message(" ".join(str(error).split()), type(error).__name__, trainer, folder, checkpoints.saved_step)
        raise ProcessLost(told) from error


def _is_about_others(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)


def _message(text: str, kind: str, trainer: lightning.Trainer, folder: Path, saved: int | None) -> str:
    late = "imed out" in text or "imeout" in text
    text = re.sub(r"\[[^\]]*\.cc:\d+\] ?", "", text).partition(" This is typically")[0][:160].rstrip(".")
    why = "did not answer in time" if late else "has ended"
    remedy = (
        "All have to be there; one that only needs longer is given more time by trainer.strategy {class_path: "
        "DDPStrategy, init_args: {timeout: '1:00:00'}}."
        if late
        else "What it said itself, or the system's log of memory, says why."
    )
    step = "There is no checkpoint yet" if saved is None else f"The last checkpoint is of step {saved}"
    return (
        f"{folder}: process {trainer.global_rank} of {trainer.world_size} stops, because another one {why} ({kind}: "
        f"{text}). {remedy} {step}; resume with: mambaseq fit --resume {folder}"
    )


@contextlib.contextmanager
def by_first_alone() -> Iterator[None]:
    """Around what the first process does while the others go on to `from_first`: an error is theirs as well. One
    outside, where all work together, is no message that they wait for."""
    try:
        yield
    except Exception as error:
        setattr(error, _ALONE, True)
        raise


def from_first(make: Callable[[], T], folder: Path) -> T:
    """In all processes that have trained together, what this gives in the first one, which writes what a run leaves
    behind and may need longer: the others wait. Alone, what it gives.

    Raises what `make` raises; in all processes alike, as a UserError in the others, what the first one's raises in
    `by_first_alone`; ProcessLost when the first process ends before.
    """
    failed: Exception | None = None
    shared: list[Any] = [None, None]  # a value, and why there is none
    try:
        shared[0] = make()
    except Exception as error:
        if not hasattr(error, _ALONE):
            raise
        failed, shared[1] = error, error
        if not isinstance(error, UserError):
            why = paragraph(f"{type(error).__name__}: {error}", 300)
            shared[1] = UserError(f"{folder}: the first process failed ({why}). What it said itself says where.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        try:
            dist.broadcast_object_list(shared, src=0)
        except RuntimeError as error:
            if not _is_about_others(error):
                raise
            raise ProcessLost(
                f"{folder}: process {dist.get_rank()} of {dist.get_world_size()} stops, because the first one has "
                "ended before its results were written. What it said itself says why."
            ) from error
    if (told := failed or shared[1]) is not None:
        raise told
    return shared[0]


@contextlib.contextmanager
def watch_processes(trainer: lightning.Trainer) -> Iterator[None]:
    """While training. A process that Lightning has started ends with the one that started it, and says so: on GPUs it
    could wait half an hour for its messages. Before Lightning kills the first process because another one has ended, it
    says that, and how the run goes on.

    The first process of each machine tells those that it starts by a variable of the environment who it is. It is there
    for the length of the run only: another run that this process starts later is none of them.
    """
    if trainer.world_size == 1:
        yield
        return
    given = os.environ.get(STARTED_BY)
    if trainer.local_rank:  # on every machine, process 0 starts the others
        if given == str(os.getppid()):
            threading.Thread(target=end_with, args=(int(given),), daemon=True, name="parent-observer").start()
        yield
        return

    def told(record: logging.LogRecord) -> bool:
        bar = "\n" if trainer.progress_bar_callback is not None else ""  # whose line has not ended
        record.msg = f"{bar}{record.getMessage()}\n{trainer.default_root_dir}: process {trainer.global_rank} of "
        record.msg += f"{trainer.world_size} stops, too."
        record.msg += f" Resume with: mambaseq fit --resume {trainer.default_root_dir}"
        record.args = ()
        return True

    os.environ[STARTED_BY] = str(os.getpid())
    observer = logging.getLogger(_OBSERVER)
    observer.setLevel(logging.INFO)
    observer.addFilter(told)
    try:
        yield
    finally:
        observer.removeFilter(told)
        os.environ.pop(STARTED_BY, None)
