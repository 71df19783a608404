"""Stops training when numbers stop being finite: nothing that is not finite is saved, validated or exported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

LARGEST = 1e18  # the square of a larger weight overflows fp32, and so does its norm


class Diverged(Exception):
    """The loss or a weight is not finite.

    step: the optimizer step after which it was seen. what: "loss", or the name of a weight.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} is not finite after step {step}")
        self.step, self.what = step, what


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's part of a sharded parameter


def largest(tensors: Iterable[Tensor]) -> Tensor | None:
    """The largest absolute value (NaN if there is a NaN), on the tensors' device; None without tensors."""
    found = [tensor.detach() for tensor in tensors if tensor.numel()]
    return torch.nn.utils.get_total_norm(found, torch.inf).float() if found else None


def first_wrong(model: nn.Module) -> str:
    """The name of the first parameter that is not finite; "" if all are."""
    for name, parameter in model.named_parameters():
        value = largest([_local(parameter)]) if parameter.is_floating_point() or parameter.is_complex() else None
        if value is not None and not float(value) <= LARGEST:
            return name
    return ""


class FiniteGuard(lightning.Callback):
    """Raises `Diverged` at the first loss or weight that is not finite.

    On a CPU every step is checked. On a GPU that would make the host wait: there the first bad step is kept on the
    device, and read with the weights every `log_every_n_steps` steps and before anything is saved or validated.
    """

    def __init__(self) -> None:
        self._step = 0
        self._bad: Tensor | None = None  # the first step whose loss was not finite, 0 for none

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            wrong = ~torch.isfinite(loss.detach()).all()
            seen = torch.zeros((), dtype=torch.int64, device=loss.device) if self._bad is None else self._bad
            self._bad = torch.where(wrong & (seen == 0), self._step, seen)
        every = self.every_n_steps(trainer, pl_module)
        if every and self._step % every == 0:
            self.check(trainer, pl_module)

    def every_n_steps(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
        """How often the numbers are read."""
        return 1 if pl_module.device.type == "cpu" else trainer.log_every_n_steps  # type: ignore[attr-defined]

    def check(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raise `Diverged` in all processes if one of them has seen something."""
        found = self._found(pl_module)
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            raise found or Diverged(self._step, "the loss or a weight of another process")
        if found is not None:
            raise found

    def _found(self, pl_module: lightning.LightningModule) -> Diverged | None:
        if self._bad is not None and (step := int(self._bad)):
            return Diverged(step, "the loss")
        parameters = [_local(p) for p in pl_module.parameters() if p.is_floating_point() or p.is_complex()]
        value = largest(parameters)
        if value is not None and not float(value) <= LARGEST:
            return Diverged(self._step, first_wrong(pl_module) or "a weight")
        return None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.check(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Finite weights may be so large that their outputs are not finite."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            loss = trainer.callback_metrics.get("val/loss")
            # the loss of a set without targets is NaN for any weights
            if loss is not None and not torch.isfinite(loss) and not pl_module.losses["val_"].empty:  # type: ignore[index, union-attr]
                raise Diverged(trainer.global_step, "val/loss")

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (found := self._found(pl_module)) is not None:  # of this process: others may not be saving
            raise found
