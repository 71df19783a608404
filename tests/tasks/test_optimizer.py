"""What each parameter is trained by, how fast, and in which shape over the steps."""

from __future__ import annotations

import math

import pytest
import torch

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
