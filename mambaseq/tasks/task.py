"""Task: model, loss and metrics as a LightningModule. Nothing here knows a modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput, SequenceModel
from mambaseq.tasks.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass
class LengthWarmup:
    """Shorter sequences at first (HyenaDNA's sequence-length warm-up, arXiv:2306.15794).

    start: length at the first step; doubles every `steps_per_stage` steps until it reaches the data's own; 0 is off.
    Next-token batches are folded, so that tokens a step stay the same; labelled sequences are cut.
    """

    start: int = 0
    steps_per_stage: int = 100

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps_per_stage < 1:
            raise ConfigError(
                f"length_warmup.start must be at least 0 and length_warmup.steps_per_stage at least 1, not "
                f"{self.start} and {self.steps_per_stage}."
            )

    def length(self, step: int, full: int) -> int:
        """The length at an optimizer step."""
        if self.start == 0:
            return full
        return min(full, self.start << min(step // self.steps_per_stage, 62))


def shorten(batch: Batch, length: int) -> Batch:
    """The batch at a shorter length: folded into more sequences where every token has a target, else cut.

    Raises ConfigError for packed batches, whose sequences have lengths of their own.
    """
    full = batch.inputs.shape[1]
    if length >= full:
        return batch
    if batch.cu_seqlens is not None:
        raise ConfigError("length_warmup works on windows, not on packed batches; set length_warmup.start to 0.")
    per_token = batch.per_token
    folds = full // length if per_token else 1

    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dim() == 1:
            return tensor.repeat_interleave(folds)
        tensor = tensor[:, : folds * length]
        return tensor.reshape(tensor.shape[0] * folds, length, *tensor.shape[2:])

    targets = batch.targets
    return Batch(
        inputs=cut(batch.inputs),  # type: ignore[arg-type]
        targets=cut(targets) if per_token else targets,
        mask=cut(batch.mask),
        condition=cut(batch.condition),
    )


class Task(lightning.LightningModule):
    """Trains a model on batches of any modality.

    metrics: name to metric; logged as `val/NAME` and `test/NAME`, the tables among them kept in `tables`.
    seed: randomness of step k (dropout) depends on (seed, k) alone, so that a resumed run repeats it.
    """

    def __init__(
        self,
        model: SequenceModel,
        optimizer: OptimizerConfig | None = None,
        metrics: Mapping[str, Metric] | None = None,
        length_warmup: LengthWarmup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer or OptimizerConfig()
        self.length_warmup = length_warmup or LengthWarmup()
        self.seed = seed
        self.stages = nn.ModuleDict(
            {stage: nn.ModuleDict({k: m.clone() for k, m in (metrics or {}).items()}) for stage in ("val_", "test_")}
        )
        self.tables: dict[str, list] = {}
        self.results: dict[str, float] = {}

    def run_model(self, batch: Batch, return_logits: bool | None = None) -> ModelOutput:
        return self.model(
            batch.inputs,
            batch.targets,
            mask=batch.mask,
            condition=batch.condition,
            cu_seqlens=batch.cu_seqlens,
            return_logits=return_logits,
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.datamodule.batches_done  # type: ignore[attr-defined]
        torch.manual_seed(hash((self.seed, step, self.global_rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = shorten(batch, self.length_warmup.length(self.global_step, batch.inputs.shape[1]))
        output = self.run_model(batch)
        assert output.loss is not None
        self.trainer.datamodule.batches_done += 1  # type: ignore[attr-defined]
        self.log("train/loss", output.loss, prog_bar=True, batch_size=batch.inputs.shape[0])
        return output.loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        metrics: list[Metric] = list(self.stages[f"{stage}_"].values())  # type: ignore[operator]
        output = self.run_model(batch, return_logits=any(metric.needs_logits for metric in metrics) or None)
        assert output.loss is not None
        self.log(f"{stage}/loss", output.loss, prog_bar=True, batch_size=batch.inputs.shape[0], sync_dist=True)
        for metric in metrics:
            metric.update(output, batch)

    def _finish(self, stage: str) -> None:
        for name, metric in self.stages[f"{stage}_"].items():  # type: ignore[operator]
            value = metric.compute()
            metric.reset()
            if metric.scalar:
                self.results[f"{stage}/{name}"] = float(value)
                # the same on every process: the metric has gathered itself
                self.log(f"{stage}/{name}", value.float(), prog_bar=True, sync_dist=True)
            else:
                self.tables[f"{stage}/{name}"] = value.tolist()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning leaves the norm of sharded gradients to FSDP itself."""
        model = self.trainer.strategy.model
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and isinstance(self.trainer.strategy, FSDPStrategy):
            model.clip_grad_norm_(gradient_clip_val)  # type: ignore[union-attr, operator]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer, schedule = make_optimizer(self.model, self.optimizer_config, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
