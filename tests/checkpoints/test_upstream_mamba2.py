"""The published Mamba-2: transformers' logits and names, both ways."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from mambaseq.checkpoints import load_upstream
from mambaseq.checkpoints.export import weights
from mambaseq.checkpoints.upstream import from_upstream, options_from_config, to_upstream
from mambaseq.errors import UserError
from mambaseq.models import causal_lm

transformers = pytest.importorskip("transformers")


def made(**changes):  # type: ignore[no-untyped-def]
    options = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "state_size": 16,
        "head_dim": 8,
        "num_heads": 12,
        "n_groups": 1,
        "chunk_size": 32,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(3)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind an initial value
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_groups": 3, "use_bias": True, "use_conv_bias": False}, {"layer_norm_epsilon": 1e-2, "conv_kernel": 3}],
    ids=["as published", "groups, biases", "epsilon, kernel"],
)
def test_logits_of_transformers(changes: dict) -> None:
    norm = inspect.signature(transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated)
    if "n_groups" in changes and "group_size" not in norm.parameters:
        pytest.skip("this transformers norms all groups of heads as one, which mamba-ssm and later ones do not")
    theirs = made(**changes)
    ours = causal_lm(**options_from_config(theirs.config.to_dict()))
    ours.load_state_dict(from_upstream(theirs.state_dict()))
    ids = torch.randint(0, 101, (2, 70))
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) <= 1e-5


def test_and_back() -> None:
    theirs = made()
    ours = causal_lm(**options_from_config(theirs.config.to_dict()))
    names = to_upstream(weights(ours), transformers=True)
    assert names.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(names)
    ids = torch.randint(0, 101, (1, 33))
    with torch.no_grad():
        assert relative(theirs(ids).logits, ours(ids).logits) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_folders_of_both_houses(tmp_path: Path, tied: bool) -> None:
    if tied and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers before 5 cannot save a Mamba-2 whose weights are tied")
    theirs = made(tie_word_embeddings=tied)
    ids = torch.randint(0, 101, (1, 20))
    with torch.no_grad():
        expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_upstream(tmp_path / "hf")
    assert ours.tie_embeddings == tied
    with torch.no_grad():
        assert relative(ours(ids).logits, expected) <= 1e-5
    folder = tmp_path / "state-spaces"
    folder.mkdir()
    ssm = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "chunk_size": 256, "rmsnorm": True}
    config = {"d_model": 48, "n_layer": 3, "vocab_size": 101, "ssm_cfg": ssm, "pad_vocab_size_multiple": 1}
    (folder / "config.json").write_text(json.dumps({**config, "d_intermediate": 0, "tie_embeddings": tied}))
    torch.save(to_upstream(weights(ours)), folder / "pytorch_model.bin")
    with torch.no_grad():
        assert relative(load_upstream(folder)(ids).logits, expected) <= 1e-5


def test_configuration_of_the_published_models() -> None:
    """state-spaces/mamba2-130m, whose ssm_cfg leaves everything at its default."""
    config = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    options = options_from_config(config)
    assert options == {
        "mixer": "mamba2",
        "vocab_size": 50288,
        "d_model": 768,
        "n_layers": 24,
        "tie_embeddings": True,
        "d_state": 128,
        "head_dim": 64,
    }
    with torch.device("meta"):
        model = causal_lm(**{**options, "n_layers": 1, "vocab_size": 8})
    assert model.backbone.layers[0].mixer.in_proj.weight.shape == (3352, 768)


def test_configuration_of_codestral() -> None:
    """mistralai/Mamba-Codestral-7B-v0.1, where an older transformers wrote what it does not use."""
    text = """{"architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 4096, "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 8,
        "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "rms_norm": true, "state_size": 128,
        "tie_word_embeddings": false, "time_step_limit": [0.0, Infinity], "torch_dtype": "bfloat16", "use_bias": false,
        "use_conv_bias": true, "vocab_size": 32768}"""
    options = options_from_config(json.loads(text))
    with torch.device("meta"):
        model = causal_lm(**{**options, "n_layers": 1})
    layer, outside = model.backbone.layers[0], 2 * 32768 * 4096 + 4096
    assert layer.mixer.n_groups == 8
    assert layer.mixer.norm.group_size == 1024
    assert 64 * (model.n_parameters() - outside) + outside == 7_285_403_648  # as its publishers say


@pytest.mark.parametrize(
    ("ssm", "message"),
    [({"rmsnorm": False}, "rmsnorm"), ({"dt_limit": [0.0, 1.0]}, "dt_limit"), ({"d_ssm": 8}, "d_ssm")],
)
def test_what_cannot_be_loaded_is_named(ssm: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options_from_config({"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba2", **ssm}})
    with pytest.raises(UserError, match="time_step_limit"):
        options_from_config({**made().config.to_dict(), "time_step_limit": (0.0, 0.5)})
