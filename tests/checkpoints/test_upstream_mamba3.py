"""Language models of Mamba-3 by state-spaces' names, with the MLPs that stand between its layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.checkpoints import load_upstream
from mambaseq.checkpoints.upstream import options_from_config
from mambaseq.errors import UserError
from mambaseq.mixers.mamba3 import Mamba3

CONFIG = {"d_model": 16, "d_intermediate": 100, "n_layer": 2, "vocab_size": 29, "tie_embeddings": True}
SSM = {"layer": "Mamba3", "d_state": 8, "headdim": 8, "chunk_size": 16}


def described(ssm: dict, **changes: object) -> dict:
    return {**CONFIG, "ssm_cfg": {**SSM, **ssm}, **changes}


def logits(weights: dict[str, Tensor], mixers: list[Mamba3], ids: Tensor) -> Tensor:
    """Of the blocks as state-spaces has them: a norm and a mixer, a norm and an MLP whose gate is its second half."""
    residual = weights["backbone.embedding.weight"][ids]
    for number, mixer in enumerate(mixers):
        own = f"backbone.layers.{number}."
        residual = residual + mixer(F.rms_norm(residual, (16,), weights[f"{own}norm.weight"], 1e-5))
        if f"{own}norm2.weight" in weights:
            hidden = F.rms_norm(residual, (16,), weights[f"{own}norm2.weight"], 1e-5)
            up, gate = (hidden @ weights[f"{own}mlp.fc1.weight"].T).chunk(2, -1)
            residual = residual + (up * F.silu(gate)) @ weights[f"{own}mlp.fc2.weight"].T
    return F.rms_norm(residual, (16,), weights["backbone.norm_f.weight"], 1e-5) @ weights["lm_head.weight"].T


@pytest.mark.parametrize(
    ("ssm", "inner", "options"),
    [
        ({}, 0, {}),
        (
            {"ngroups": 2, "rope_fraction": 1.0, "A_floor": 0.1},
            100,
            {"n_groups": 2, "rope_fraction": 1.0, "A_floor": 0.1},
        ),
        ({"is_mimo": True, "is_outproj_norm": True, "mimo_rank": 2}, 130, {"rank": 2, "out_norm": True}),
    ],
)
def test_logits_are_those_of_its_blocks(tmp_path: Path, ssm: dict, inner: int, options: dict) -> None:
    torch.manual_seed(0)
    mixers = [Mamba3(16, d_state=8, head_dim=8, **options) for _ in range(2)]
    weights = {"backbone.embedding.weight": torch.randn(32, 16), "backbone.norm_f.weight": 1 + torch.rand(16)}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    hidden = {0: 0, 100: 128, 130: 256}[inner]  # as theirs rounds it
    for number, mixer in enumerate(mixers):
        own = f"backbone.layers.{number}."
        weights |= {f"{own}mixer.{name}": value for name, value in mixer.state_dict().items()}
        weights[f"{own}norm.weight"] = 1 + torch.rand(16)
        if inner:
            weights[f"{own}norm2.weight"] = 1 + torch.rand(16)
            weights[f"{own}mlp.fc1.weight"] = torch.randn(2 * hidden, 16) / 4
            weights[f"{own}mlp.fc2.weight"] = torch.randn(16, hidden) / 16
    (tmp_path / "config.json").write_text(json.dumps(described(ssm, d_intermediate=inner)))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_upstream(tmp_path)
    ids = torch.randint(0, 29, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits(weights, mixers, ids), rtol=1e-4, atol=1e-4)


def test_what_a_configuration_leaves_out() -> None:
    assert options_from_config(described({"is_mimo": True}, d_intermediate=0, pad_vocab_size_multiple=1)) == {
        "mixer": "mamba3",
        "vocab_size": 29,
        "d_model": 16,
        "n_layers": 2,
        "tie_embeddings": True,
        "d_state": 8,
        "head_dim": 8,
        "rank": 4,
    }
    assert options_from_config({**CONFIG, "ssm_cfg": {"layer": "Mamba3"}})["rank"] is None
    plain = options_from_config({**CONFIG, "ssm_cfg": {}})
    assert (plain["mlp"], plain["mixers"]) == (True, {"mlp": {"hidden": 128}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_intermediate": -1}, "d_intermediate must be a whole number from 0 to 2,147,483,647, not -1"),
        ({"ssm_cfg": {**SSM, "mimo_rank": 0}}, "mimo_rank must be a whole number from 1"),
        ({"ssm_cfg": {**SSM, "is_mimo": "yes"}}, "is_mimo must be true or false, not 'yes'"),
        ({"ssm_cfg": {"layer": "Mamba4"}}, r"Mamba-3 model \(ssm_cfg.layer 'Mamba4'\)"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options_from_config({**CONFIG, **change})
