"""An exponential moving average of the weights, validated and exported instead of the last ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mambaseq.checkpoints.lightning_io import AVERAGE
from mambaseq.errors import ConfigError


@dataclasses.dataclass
class EmaConfig:
    """An exponential moving average of the weights, validated and exported in their place.

    Args:
        decay: share of the average that each optimizer step keeps, such as 0.999; 0 is off. Early steps keep at most (1
            + step) / (10 + step), so the first weights are soon forgotten.
    """

    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay must be at least 0 and below 1; it is {self.decay}.")


class WeightAverage(lightning.Callback):
    """Keeps the average of a model's parameters, in fp32. Puts it into the model for each validation, and the weights
    back afterwards. It depends only on weights and steps, and every checkpoint holds it next to the weights.

    model: the model whose parameters are averaged. decay: see `EmaConfig`. Must come before the callback that saves
        checkpoints.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._kept: list[Tensor] = []  # the weights, while the average is in their place

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.is_floating_point() or p.is_complex()}

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """Raise ConfigError where no process has whole weights."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                "ema.decay averages whole weights, which every process has on one device and under trainer.strategy "
                "ddp, but not under the one that is set. Set ema.decay to 0, or trainer.strategy to ddp."
            )

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.check_strategy(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        with torch.no_grad():
            self.average = {
                name: torch.empty_like(p, dtype=_wide(p)).copy_(self.average.get(name, p))
                for name, p in self._parameters().items()
            }

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        weights = [p.detach().to(_wide(p)) for p in self._parameters().values()]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), weights, self._step)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._end()

    def _begin(self) -> None:
        if self.average and not self._kept:
            own = self._parameters()
            self._kept = [p.detach().clone() for p in own.values()]
            self._put({name: self.average[name] for name in own})

    def _end(self) -> None:
        if self._kept:
            self._put(dict(zip(self._parameters(), self._kept, strict=True)))
            self._kept = []

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The average is in the model during the block, as it is for a validation."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters().items():
            parameter.copy_(values[name])

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average under all names of a state dict; names that share a tensor share its average."""
        names = {id(p): name for name, p in self._parameters().items()}
        checkpoint[AVERAGE] = {
            name: self.average[names[id(p)]]
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if id(p) in names and self.average
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.average = dict(checkpoint.get(AVERAGE, {}))


def _wide(tensor: Tensor) -> torch.dtype:
    """A dtype wide enough for small steps."""
    return torch.promote_types(tensor.dtype, torch.float32)
