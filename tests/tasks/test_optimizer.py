"""What each parameter is trained by, how fast, and in which shape over the steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.test_resume import CONFIG, fit

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model
from mambaseq.tasks.optimizer import MuonAdamW, OptimizerConfig, learning_rate_factor, make_optimizer, reapply


def make_model(mixer: str = "mamba", tie: bool = False) -> SequenceModel:
    return build_model(
        {
            "d_model": 8,
            "tie_embeddings": tie,
            "encoder": {"name": "tokens", "vocab_size": 7},
            "backbone": {"name": "residual", "n_layers": 1},
            "mixer": {"name": mixer},
            "head": {"name": "lm", "vocab_size": 7},
        }
    )


def groups_of(model: SequenceModel, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The group of each parameter, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("tie", [False, True])
def test_muon_is_for_the_matrices_of_hidden_layers_alone(tie: bool) -> None:
    model = make_model(tie=tie)
    optimizer, _ = make_optimizer(model, OptimizerConfig(name="muon"), 10)
    groups = groups_of(model, optimizer)
    assert groups.keys() == dict(model.named_parameters()).keys()
    layer = "backbone.layers.0.mixer"
    assert {name for name, group in groups.items() if group["muon"]} == {
        f"{layer}.{name}.weight" for name in ("in_proj", "x_proj", "out_proj")
    }
    decayed = {name for name, group in groups.items() if group["weight_decay"] and not group["muon"]}
    head = set() if tie else {"head.linear.weight"}
    assert decayed == {"encoder.embedding.weight", f"{layer}.conv1d.weight", f"{layer}.dt_proj.weight"} | head


def test_a_step_of_both_is_that_of_each() -> None:
    """By torch's own two optimizers, and over a saved state."""
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    config = OptimizerConfig(name="muon", lr=0.02, schedule="constant", momentum=0.9)
    optimizer, schedule = make_optimizer(model, config, 10)
    muon = {name for name, group in groups_of(model, optimizer).items() if group["muon"]}
    decayed = {name for name, group in groups_of(model, optimizer).items() if group["weight_decay"]}
    named = dict(other.named_parameters())
    adamw = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}
    apart = [
        torch.optim.Muon([named[n] for n in sorted(muon)], lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([named[n] for n in sorted(decayed - muon)], weight_decay=0.1, **adamw),
        torch.optim.AdamW([named[n] for n in sorted(named.keys() - decayed)], weight_decay=0.0, **adamw),
    ]
    tokens = torch.arange(20)[None] % 7
    for step in range(4):
        if step == 2:  # as a resumed run does
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                group |= {"momentum": 0.1, "weight_decay": 7.0}
            optimizer, schedule = make_optimizer(model, config, 10)
            optimizer.load_state_dict(state)
            reapply(optimizer, schedule)
        for one, optimizers in ((model, [optimizer]), (other, apart)):
            one(tokens[:, :-1], tokens[:, 1:]).loss.backward()
            for part in optimizers:
                part.step()
                part.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], msg=name)


def test_groups_that_others_add_are_trained() -> None:
    model, more = make_model(), torch.nn.Parameter(torch.ones(3))
    optimizer, schedule = make_optimizer(model, OptimizerConfig(name="muon"), 10)
    optimizer.add_param_group({"params": [more], "lr": 0.1})
    more.grad = torch.ones(3)
    optimizer.step()
    schedule.step()
    assert isinstance(optimizer, MuonAdamW)
    assert torch.all(more < 1)
    assert optimizer.param_groups[-1]["lr"] == 0.1


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="this model trains none"):
        make_optimizer(torch.nn.LayerNorm(3), OptimizerConfig(name="muon"), 10)  # type: ignore[arg-type]


def test_factors_of_the_learning_rate() -> None:
    model = make_model()
    factors = {"backbone": 0.5, "backbone.layers.0.mixer.A_log": 0.0, "*.bias": 2.0}
    optimizer, schedule = make_optimizer(model, OptimizerConfig(lr=0.1, schedule="linear"), 10, factors=factors)
    rates = {name: group["lr"] for name, group in groups_of(model, optimizer).items()}
    layer = "backbone.layers.0.mixer"
    assert rates["encoder.embedding.weight"] == 0.1
    assert rates[f"{layer}.in_proj.weight"] == rates[f"{layer}.dt_proj.bias"] == 0.05  # the longest pattern counts
    assert rates[f"{layer}.A_log"] == 0.0
    optimizer.step()
    schedule.step()
    assert groups_of(model, optimizer)[f"{layer}.in_proj.weight"]["lr"] == pytest.approx(0.05 * 0.91)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("wsd", [0.5, 1, 1, 1, 0.55, 0.1]),
        ("linear", [0.5, 1, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.5, 1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=2, decay_share=0.4, min_lr_ratio=0.1)  # type: ignore[arg-type]
    factor = learning_rate_factor(config, 10)
    assert [factor(step) for step in (0, 2, 4, 6, 8, 10)] == pytest.approx(expected)


def stepped(fused: bool, steps: int) -> tuple[SequenceModel, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = make_model()
    optimizer, schedule = make_optimizer(model, OptimizerConfig(lr=0.01, schedule="constant"), 10, fused=fused)
    for step in range(steps):
        step_of(model, optimizer, schedule, step)
    return model, optimizer, schedule


def step_of(model: SequenceModel, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> None:
    tokens = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:].contiguous()).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    schedule.step()


def test_a_fused_step_is_the_same_step() -> None:
    one, usual, _ = stepped(False, 4)
    other, fused, _ = stepped(True, 4)
    assert [group["fused"] for group in usual.param_groups] == [None, None]
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_complex_weights_are_stepped_as_usual() -> None:
    """A fused step refuses them."""
    model = torch.nn.Linear(2, 2)
    model.turned = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer, _ = make_optimizer(model, OptimizerConfig(schedule="constant"), 10, fused=True)
    assert not any(group["fused"] for group in optimizer.param_groups)
    (model(torch.ones(1, 2)).sum() + (model.turned * 1j).real.sum()).backward()
    optimizer.step()
    assert (model.turned != 1).all()


@pytest.mark.parametrize("before", [False, True])
def test_a_restored_step_is_of_the_kind_of_now(before: bool) -> None:
    """A fused one counts on the device, another on the CPU; both go on from a checkpoint of the other."""
    model, optimizer, schedule = stepped(before, 3)
    if not before:  # as a training in float64 counts; a kernel reads float32
        for state in optimizer.state.values():
            state["step"] = state["step"].double()
    again, other, plan = stepped(not before, 0)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan.load_state_dict(schedule.state_dict())
    reapply(other, plan)
    assert all(bool(group["fused"]) is not before for group in other.param_groups)
    for of, made, lr in ((model, optimizer, schedule), (again, other, plan)):
        step_of(of, made, lr, 3)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert other.state[q]["step"] == 4
        assert other.state[q]["step"].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("before", ["cpu", "gpu"])
def test_a_run_goes_on_with_a_fused_step_and_without(cuda: torch.device, tmp_path: Path, before: str) -> None:
    path, steps = tmp_path / "run.yaml", "--trainer.max_steps=4"
    path.write_text(CONFIG)
    first = (steps, f"--trainer.accelerator={before}", "--trainer.devices=1")
    fit(path, tmp_path / "one", "--model.backbone.dropout=0", *first)
    after = "gpu" if before == "cpu" else "cpu"
    more = ["--trainer.max_steps=8", f"--trainer.accelerator={after}", "--trainer.devices=1"]
    assert main(["fit", "--resume", str(tmp_path / "one"), *more]) == 0
    states = read_checkpoint(tmp_path / "one" / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert all(bool(group["fused"]) is (after == "gpu") for group in states["param_groups"])
    assert all(float(state["step"]) == 8 for state in states["state"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_fused_step_is_clipped_in_any_precision(cuda: torch.device, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    on_gpu = ("--trainer.accelerator=gpu", "--trainer.devices=1", f"--trainer.precision={precision}")
    how = (*on_gpu, "--model.backbone.dropout=0", "--trainer.max_steps=4")
    clipped, whole = (fit(path, tmp_path / v, *how, f"--trainer.gradient_clip_val={v}") for v in ("1e-6", "0"))
    assert all(tensor.isfinite().all() for tensor in clipped.values())
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in clipped.items())
