"""Reading both ways: against the definition, packed, padded, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.stand_ins import TinyMLP

from mambaseq.backbones.bidirectional import BidirectionalStack
from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.generation import generate
from mambaseq.mixers.base import Mixer
from mambaseq.models import SequenceModel, build_model
from mambaseq.ops.sequences import reversal
from mambaseq.runs.parsing import parse_config

D_MODEL = 12
NAMES = ["mamba", "s4d", "mamba3", "gated_delta", "kda", "gla"]


def stack(name: str = "mamba", **options: Any) -> BidirectionalStack:
    torch.manual_seed(0)
    kind = catalog()["mixers"].get(name)

    def make(layer: int, name: str | None = None) -> Mixer:
        return TinyMLP(D_MODEL) if name == "mlp" else kind(D_MODEL)

    return BidirectionalStack(make, **{"n_layers": 2, **options})


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_directions_with_one_projection_are_multiplied() -> None:
    backbone = stack(tie_projections=True, combine="multiply", norm="layer", mlp=True)
    x = torch.randn(2, 21, D_MODEL)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        stream = x
        for layer in backbone.layers:
            mean = stream.mean(-1, keepdim=True)
            std = ((stream - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
            y = (stream - mean) / std * layer.norm.weight + layer.norm.bias
            if layer.back is None:
                stream = stream + layer.ahead(y)
                continue
            assert layer.back.in_proj.weight is layer.ahead.in_proj.weight
            assert layer.back.out_proj.weight is layer.ahead.out_proj.weight
            assert layer.back.x_proj.weight is not layer.ahead.x_proj.weight
            stream = stream + layer.ahead(y) * layer.back(y.flip(1)).flip(1)
        close(backbone(x), backbone.norm_f(stream))
    for options, told in (
        ({"tie_projections": True, "shared": True}, "nothing to tie"),
        ({"combine": "both"}, "add or multiply, not 'both'"),
        ({"norm": "batch"}, "rms or layer, not 'batch'"),
    ):
        with pytest.raises(ConfigError, match=told):
            stack(**options)
    with pytest.raises(
        ConfigError, match=r"needs mixers with in_proj and out_proj; S4D has not\. Leave it out, or take mamba"
    ):
        stack("s4d", tie_projections=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_adds_both_directions(name: str, shared: bool) -> None:
    backbone = stack(name, shared=shared, mlp=True)
    assert len(backbone.layers) == 4
    x = torch.randn(2, 21, D_MODEL)
    with torch.no_grad():
        stream = x
        for layer in backbone.layers:
            y = layer.norm(stream)
            if isinstance(layer.ahead, TinyMLP):
                assert layer.back is None
                stream = stream + layer.ahead(y)
            else:
                assert (layer.back is None) == shared
                back = layer.back or layer.ahead
                stream = stream + layer.ahead(y) + back(y.flip(1)).flip(1)
        close(backbone(x), backbone.norm_f(stream))
        if shared:
            close(backbone(x.flip(1)), backbone(x).flip(1))
        changed = x.clone()
        changed[:, 15] += 3
        assert (backbone(changed) - backbone(x))[:, :10].abs().max() > 1e-4


def test_the_reversal_is_its_own_inverse_and_stays_in_bounds() -> None:
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    order = reversal(1, 7, bounds)
    assert order is not None
    assert order.tolist() == [2, 1, 0, 6, 5, 4, 3]
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    order = reversal(3, 3, None, mask)
    assert order is not None
    assert order.tolist() == [1, 0, 2, 5, 4, 3, 6, 7, 8]
    assert reversal(2, 5) is None


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded_sequences_are_as_by_themselves(name: str) -> None:
    backbone = stack(name)
    parts = [torch.randn(1, n, D_MODEL) for n in (9, 1, 14)]
    with torch.no_grad():
        alone = [backbone(part) for part in parts]
        bounds = torch.tensor([0, 9, 9, 10, 24], dtype=torch.int32)
        close(backbone(torch.cat(parts, 1), cu_seqlens=bounds), torch.cat(alone, 1))
        padded = torch.full((3, 14, D_MODEL), 7.0)
        mask = torch.zeros(3, 14, dtype=torch.bool)
        for row, part in enumerate(parts):
            padded[row, : part.shape[1]] = part
            mask[row, : part.shape[1]] = True
        close(backbone(padded, mask=mask)[mask], torch.cat(alone, 1)[0])


def test_recomputed_layers_have_the_same_gradients() -> None:
    usual, other = stack(mlp=True), stack(mlp=True, checkpoint=True)
    x = torch.randn(2, 9, D_MODEL)
    for backbone in (usual, other):
        backbone(x).square().sum().backward()
    for one, expected in zip(other.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(one.grad, expected.grad)


def classifier(**backbone: Any) -> SequenceModel:
    torch.manual_seed(0)
    return build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 5},
            "backbone": {"name": "bidirectional", "n_layers": 3, **backbone},
            "mixer": {"name": "mamba", "d_state": 2},
            "head": {"name": "classification", "n_classes": 3},
        }
    ).eval()


@pytest.mark.parametrize(
    "backbone", [{}, {"shared": True}, {"pattern": ["mamba", "s4d*"]}, {"tie_projections": True, "norm": "layer"}]
)
def test_a_classifier_is_saved_and_not_moved_by_padding(tmp_path: Path, backbone: dict[str, Any]) -> None:
    model = classifier(**backbone)
    save_model(tmp_path / "m", model, ModelCard(spec=model.spec))
    loaded = load_model(tmp_path / "m").model
    ids = torch.randint(0, 5, (2, 11))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        longer = torch.nn.functional.pad(ids, (0, 6), value=3)
        padded = model(longer, mask=torch.nn.functional.pad(mask, (0, 6))).logits
        close(padded, model(ids).logits)
        bounds = torch.tensor([0, 11, 22], dtype=torch.int32)
        close(model(ids.reshape(1, -1), cu_seqlens=bounds).logits, model(ids).logits)


def test_states_are_refused() -> None:
    backbone, x = stack(), torch.randn(1, 4, D_MODEL)
    assert not backbone.causal
    for wrong in (
        lambda: backbone(x, return_state=True),
        lambda: backbone(x, state=[]),
        lambda: backbone.init_state(2),
        lambda: backbone.step_(x[:, :1], []),
    ):
        with pytest.raises(ConfigError, match=r"keeps no state.*causal backbone"):
            wrong()
    spec = copy.deepcopy(classifier().spec)
    assert spec is not None
    spec["head"] = {"name": "lm", "vocab_size": 5}
    with pytest.raises(ConfigError, match="Only a causal model"):
        generate(build_model(spec), torch.zeros(1, 3, dtype=torch.long), 2)


def test_a_configuration(tmp_path: Path) -> None:
    run = parse_config("dna/demo", ["--model.backbone.name=bidirectional", "--model.backbone.shared=true"])
    assert run.settings["model"]["backbone"]["shared"] is True
    assert "chunk_length" not in run.settings["model"]["backbone"]
    with pytest.raises(ConfigError, match=r"no key 'model\.backbone\.chunk_length'"):
        parse_config("dna/demo", ["--model.backbone.name=bidirectional", "--model.backbone.chunk_length=8"])
