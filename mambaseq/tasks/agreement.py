"""Decisions that all processes of a trainer take alike."""

from __future__ import annotations

import lightning
import torch

from mambaseq.tasks.later import Later


class Agreement:
    """Whether any process of a trainer says yes; all ask after each batch.

    On GPUs the answer is that to the batch before: for one of now the host would wait for all work of this batch, and
    the GPU then for the host to begin the next.
    """

    def __init__(self) -> None:
        self._before: _Answer | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, trainer: lightning.Trainer, yes: bool) -> bool:
        if trainer.world_size == 1:
            return yes
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return trainer.strategy.reduce_boolean_decision(yes, all=False)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        before, self._before = self._before, _Answer(yes, device, self._stream)
        return before is not None and before.wait()


class _Answer:
    """Of the processes that ask now. The GPU's next batch does not wait for it: it comes by a stream of its own."""

    def __init__(self, yes: bool, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._said = torch.full((), int(yes), dtype=torch.int32, device=device)  # does not wait, unlike a copy
        work = torch.distributed.all_reduce(self._said, op=torch.distributed.ReduceOp.MAX, async_op=True)
        with torch.cuda.stream(stream):
            work.wait()
            self._answer = Later(self._said)

    def wait(self) -> bool:
        return bool(self._answer.read())


def leave_signals_to_us(trainer: lightning.Trainer) -> None:
    """Lightning's processes ask each other before every batch whether one was told to end, and wait for the GPU to say
    so. A run's checkpoints have that signal instead."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):  # not in all of its versions
        loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass
