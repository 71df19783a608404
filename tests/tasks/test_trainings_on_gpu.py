"""What a training learns and how, on a GPU: the weights that the CPU gives, and the same ones again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.test_resume import CONFIG, assert_equal, fit
from test_combinations import PARTS, build, sequences_of

from mambaseq.checkpoints import load_model
from mambaseq.data.module import pad_collate
from mambaseq.errors import ConfigError
from mambaseq.tasks.finite import FiniteGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WAYS = {
    "adamw": (),
    "muon": ("--optimizer.name=muon",),
    "ema": ("--ema.decay=0.5",),
    "frozen": ("--finetune.freeze=[encoder, backbone]", '--finetune.unfreeze={"backbone.layers.0.mixer": 2}'),
    "wsd, accumulated, clipped": (
        "--optimizer.schedule=wsd",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=1",
    ),
}
COMMON = ("--model.backbone.dropout=0", "--trainer.max_steps=6")


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_a_cpu_and_again_bit_for_bit(tmp_path: Path, way: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    on_gpu = ("--trainer.accelerator=gpu", "--trainer.devices=1")
    there, again = (fit(path, tmp_path / name, *COMMON, *WAYS[way], *on_gpu) for name in ("one", "two"))
    assert_equal(there, again)
    here = fit(path, tmp_path / "cpu", *COMMON, *WAYS[way])
    for name, tensor in here.items():
        torch.testing.assert_close(there[name].cpu(), tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_host_goes_on_while_a_step_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for the GPU but those that are logged: otherwise it would wait for the host at the next one."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    begin, strict = FiniteGuard.on_train_batch_start, []

    def watched(self: FiniteGuard, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        begin(self, trainer, module, batch, batch_idx)
        step = trainer.global_step
        torch.cuda.set_sync_debug_mode("error" if 3 <= step < 6 else "default")
        strict.append(3 <= step < 6)

    monkeypatch.setattr(FiniteGuard, "on_train_batch_start", watched)
    on_gpu = ("--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.log_every_n_steps=100")
    undisturbed = ("--data.size=400", "--checkpoint.every_n_steps=100", "--trainer.max_steps=8")
    try:
        fit(path, tmp_path / "one", *on_gpu, *undisturbed, "--model.backbone.dropout=0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict == [False, False, False, True, True, True, False, False]


def test_adapters_are_trained_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    fit(path, tmp_path / "first", *COMMON)
    more = ("--init-from=first", "--lora.rank=2", *COMMON)
    fit(path, tmp_path / "cpu", *more)
    fit(path, tmp_path / "gpu", *more, "--trainer.accelerator=gpu", "--trainer.devices=1")
    here, there = (load_model(tmp_path / name).model.state_dict() for name in ("cpu", "gpu"))
    for name, tensor in here.items():
        torch.testing.assert_close(there[name].cpu(), tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("head", PARTS[2], ids=lambda part: part[0])
@pytest.mark.parametrize("encoder", PARTS[0], ids=lambda part: part[0] + str(part[1].get("stride", "")))
def test_every_head_learns_the_same_as_on_a_cpu(encoder: tuple, head: tuple) -> None:
    for backbone in PARTS[1]:
        try:
            model = build(encoder, backbone, head)
        except ConfigError:  # does not fit, as tests/test_combinations.py holds
            continue
        batch = pad_collate(sequences_of(model))
        found = {}
        for device in ("cpu", "cuda"):
            model.to(device).zero_grad()
            moved = batch.to(device)
            outcome = model(
                moved.inputs,
                moved.targets,
                mask=moved.mask,
                condition=moved.condition,
            )
            outcome.loss.backward()
            found[device] = [
                outcome.loss.detach().cpu().clone(),
                *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None),
            ]
        assert len(found["cpu"]) == len(found["cuda"]) > 1
        for here, there in zip(*found.values(), strict=True):
            torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-4)
