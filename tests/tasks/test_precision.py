"""Lightning's precisions on a CPU, through training, accumulation, clipping and validation, and a callback of its own
that knows a task's backbone by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from tasks.ragged import HEADS, Ragged, expected, model_of, train
from tiny import TinyTokens

from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import pad_collate
from mambaseq.domain import catalog
from mambaseq.metrics.likelihood import BitsPerToken
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq.tasks.task import Task

LENGTHS = [5, 40, 3, 17]
BACKBONES: list[dict[str, Any]] = [
    {"name": "residual", "n_layers": 1},
    {"name": "unet", "n_layers": 1, "pool": [2]},
    {"name": "bidirectional", "n_layers": 1},
]


@pytest.mark.parametrize(("precision", "eps"), [("bf16-true", 2**-8), ("16-true", 2**-11), ("bf16-mixed", 2**-8)])
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda options: options["name"])
def test_precisions_on_a_cpu(backbone: dict[str, Any], precision: str, eps: float) -> None:
    for head in HEADS if backbone["name"] != "bidirectional" else ("classification", "regression"):
        data = Ragged(head, LENGTHS, [7, 2])
        model = model_of(head, backbone)
        task, trainer = train(
            data, head, loader={"batch_size": 2}, model=model, accumulate_grad_batches=2, precision=precision
        )
        assert trainer.callback_metrics["val/loss"].isfinite()
        wanted = expected(model_of(head, backbone), pad_collate(data.train()))
        found = task.seen[0]
        assert {g.dtype for g in found.values()} == {next(model.parameters()).dtype}
        whole = torch.stack([g.norm() for g in wanted.values()]).norm()
        for name, gradient in wanted.items():
            assert (found[name].float() - gradient).norm() <= 16 * eps * whole, name


def test_metrics_add_up_in_their_own_dtype() -> None:
    """In eight bits a sum of many batches stands still."""
    names = catalog()["metrics"]
    metrics: dict[str, Any] = {entry.name: names.get(entry.name)(class_names=("a", "b")) for entry in names}
    kinds = {
        name: {key: getattr(getattr(one, key), "dtype", None) for key in one._defaults} for name, one in metrics.items()
    }
    torch.nn.ModuleDict(metrics).to(torch.bfloat16)
    for name, metric in metrics.items():
        metric.reset()
        assert {key: getattr(getattr(metric, key), "dtype", None) for key in metric._defaults} == kinds[name], name
    data, model = Ragged("lm", LENGTHS, [9] * 300), model_of("lm")  # which learns nothing
    _, trainer = train(data, "lm", loader={"batch_size": 1}, model=model, precision="bf16-true")
    batches = data.validation() or []
    with torch.no_grad():
        losses = [float(model.eval()(batch.inputs, batch.targets).loss) * int(batch.n_targets) for batch in batches]
    whole = sum(losses) / sum(int(batch.n_targets) for batch in batches)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(whole, rel=1e-4)


def test_a_backbone_is_thawed_by_lightnings_callback() -> None:
    import lightning

    model = model_of("lm")
    frozen = [p.detach().clone() for p in model.backbone.parameters()]
    task = Task(model, OptimizerConfig(lr=1e-2), {"bits_per_token": BitsPerToken()})
    seen: list[bool] = []

    class Look(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(all(torch.equal(p, q) for p, q in zip(model.backbone.parameters(), frozen, strict=True)))

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2), Look()],
    )
    trainer.fit(task, datamodule=SequenceDataModule(TinyTokens(size=8), batch_size=4))
    assert task.backbone is model.backbone
    assert seen == [True, True, False, False]
    assert trainer.callback_metrics["val/bits_per_token"].isfinite()
