"""Decisions that all processes of a trainer take alike."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from mambaseq.tasks.later import Later


class _Asks:
    """Asks all processes of a trainer for a whole number."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def _ask(self, trainer: lightning.Trainer, number: int, how: Any) -> _Answer:
        device = trainer.strategy.root_device
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return _Answer(number, how, device, self._stream)


class Agreement(_Asks):
    """Whether any process of a trainer says yes; all ask after each batch.

    On GPUs the answer is that to the batch before: for one of now the host would wait for all work of this batch, and
    the GPU then for the host to begin the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: _Answer | None = None

    def __call__(self, trainer: lightning.Trainer, yes: bool) -> bool:
        if trainer.world_size == 1:
            return yes
        if trainer.strategy.root_device.type != "cuda":
            return trainer.strategy.reduce_boolean_decision(yes, all=False)
        before, self._before = self._before, self._ask(trainer, int(yes), torch.distributed.ReduceOp.MAX)
        return before is not None and bool(before.wait())


class Sum(_Asks):
    """The sum over all processes of a trainer of what each has in a batch; all begin it before the batch, and read it
    after that. So a GPU is waited for no longer than `Agreement` does: until it has done the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: _Answer | int = 0

    def begin(self, trainer: lightning.Trainer, number: int) -> None:
        alone = trainer.world_size == 1
        self._begun = number if alone else self._ask(trainer, number, torch.distributed.ReduceOp.SUM)

    def read(self) -> int:
        return self._begun if isinstance(self._begun, int) else self._begun.wait()


class _Answer:
    """Of the processes that ask now. The GPU's next batch does not wait for it: it comes by a stream of its own."""

    def __init__(self, number: int, how: Any, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._number = torch.full((), number, dtype=torch.int64, device=device)  # does not wait, unlike a copy
        self._work = torch.distributed.all_reduce(self._number, op=how, async_op=True)
        self._later: Later | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                self._work.wait()
                self._later = Later(self._number)

    def wait(self) -> int:
        if self._later is not None:
            return int(self._later.read())
        self._work.wait()
        return int(self._number)


def leave_signals_to_us(trainer: lightning.Trainer) -> None:
    """Lightning's processes ask each other before every batch whether one was told to end, and wait for the GPU to say
    so. A run's checkpoints have that signal instead."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):  # not in all of its versions
        loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass
