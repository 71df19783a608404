"""Decisions that all processes of a trainer take alike."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor


class Agreement:
    """Whether any process of a trainer says yes; all ask after each batch.

    On GPUs the answer is that to the batch before: for one of now the host would wait for all work of this batch, and
    the GPU then for the host to begin the next.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, trainer: lightning.Trainer, yes: bool) -> bool:
        if trainer.world_size == 1:
            return yes
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return trainer.strategy.reduce_boolean_decision(yes, all=False)
        before, self._before = self._before, _asked(yes, device)
        if before is None:
            return False
        answer, there = before
        there.synchronize()
        return bool(answer)


def _asked(yes: bool, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """The answer, on the host, and when it is there."""
    said = torch.full((), int(yes), dtype=torch.int32, device=device)  # waits for nothing, as a copy from the host does
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
    answer = torch.empty((), dtype=torch.int32, pin_memory=True)
    answer.copy_(said, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(device))
    return answer, there


def leave_signals_to_us(trainer: lightning.Trainer) -> None:
    """Lightning's processes ask each other before every batch whether one was told to end, and wait for the GPU to say
    so. A run's checkpoints have that signal instead."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):  # not in all of its versions
        loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass
