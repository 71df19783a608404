"""Sequences of different lengths and what is learned of them, for tests of how batches weigh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch

from mambaseq.batch import Batch
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import SequenceData
from mambaseq.metrics.likelihood import BitsPerToken
from mambaseq.models import SequenceModel, build_model
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq.tasks.replicated import Replicated
from mambaseq.tasks.task import LengthWarmup, Task

NAN = float("nan")
HEADS: dict[str, dict[str, Any]] = {
    "lm": {"name": "lm", "vocab_size": 7},
    "classification": {"name": "classification", "n_classes": 3, "pooling": "last"},
    "regression": {"name": "regression", "n_outputs": 2},
    "multilabel": {"name": "multilabel", "n_classes": 3, "positive_weights": [2.0, 1.0, 0.5], "focal_gamma": 1.5},
    "token_classification": {
        "name": "token_classification",
        "n_classes": 3,
        "class_weights": [0.5, 1.0, 3.0],
        "label_smoothing": 0.1,
        "focal_gamma": 0.5,
    },
    "token_regression": {"name": "token_regression", "n_outputs": 2, "stride": 3},
    "forecast": {"name": "forecast", "n_channels": 2, "horizon": 3, "loss": "quantile"},
}


def clip(number: int, length: int, head: str) -> Batch:
    """A sequence of this length; some of its targets are not known."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 7, (1, length + 1), generator=draw)
    if head == "lm":
        unknown = torch.rand(1, length, generator=draw) < number / 8
        return Batch(inputs=ids[:, :-1], targets=ids[:, 1:].masked_fill(unknown, -100))
    if head == "token_classification":
        labels = torch.randint(0, 3, ids.shape, generator=draw)
        return Batch(inputs=ids, targets=labels.masked_fill(torch.rand(ids.shape, generator=draw) < 0.3, -100))
    if head == "multilabel":
        several = torch.randint(0, 2, (1, 3), generator=draw)
        several[0, number % 3] = -100
        return Batch(inputs=ids, targets=several, target_of="sequence")
    if head == "forecast":
        values = torch.randn(1, length + 1, 2, generator=draw)
        return Batch(inputs=ids, targets=values.masked_fill(values > 1, NAN))
    if head == "token_regression":
        values = torch.randn(1, -(-(length + 1) // 3), 2, generator=draw)
        return Batch(inputs=ids, targets=values.masked_fill(values > 1, NAN), stride=3)
    if head == "classification":
        return Batch(inputs=ids, targets=torch.tensor([-100 if number == 1 else number % 3]))
    return Batch(inputs=ids, targets=torch.tensor([[number / 2, NAN if number % 3 else 1.5]]))


class Ragged(SequenceData):
    vocab_size = 7

    def __init__(self, head: str, lengths: list[int], validation: list[int] | None = None) -> None:
        self.head, self.lengths, self.validation_lengths = head, lengths, validation or []

    def setup(self) -> None:
        pass

    def train(self) -> list[Batch]:
        return [clip(number, length, self.head) for number, length in enumerate(self.lengths)]

    def validation(self) -> list[Batch] | None:
        found = [clip(number, length, self.head) for number, length in enumerate(self.validation_lengths)]
        return found or None


class Watched(Task):
    """Keeps the gradients that an optimizer step is made of, as they are clipped."""

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        seen = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.__dict__.setdefault("seen", []).append(seen)


def model_of(head: str, backbone: dict[str, Any] | None = None) -> SequenceModel:
    torch.manual_seed(0)
    return build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 7},
            "backbone": {"name": "residual", "n_layers": 1} if backbone is None else backbone,
            "mixer": {"name": "mamba", "d_state": 4},
            "head": HEADS[head],
        }
    )


def expected(model: SequenceModel, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients of one batch in training."""
    loss = model.train()(batch.inputs, batch.targets, mask=batch.mask, cu_seqlens=batch.cu_seqlens).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))


def train(
    data: SequenceData,
    head: str,
    *,
    warmup: LengthWarmup | None = None,
    loader: dict[str, Any],
    model: SequenceModel | None = None,
    **options: Any,
) -> Any:
    """A task after its training, and the trainer."""
    metrics = {"bits_per_token": BitsPerToken()} if head == "lm" else {}
    # weights that do not move: the gradients of every step are those of the same model
    task = Watched(model or model_of(head), OptimizerConfig(lr=0.0, eps=1e-4), metrics, warmup)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(task, datamodule=SequenceDataModule(data, **loader))
    return task, trainer


def step_on_two_processes(out: Path) -> None:
    """What one of them calls; the first writes to `out` what both have found."""
    lightning.pytorch.utilities.disable_possible_user_warnings()
    task, trainer = train(
        Ragged("lm", [5, 40, 3, 17], [2, 30, 9, 1, 14]),
        "lm",
        loader={"batch_size": 1},
        devices=2,
        strategy=Replicated(),
        accumulate_grad_batches=2,
        max_epochs=2,  # after its first step DDP sums in other places
    )
    if trainer.is_global_zero:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"gradients": task.seen, "logged": logged}, out)
