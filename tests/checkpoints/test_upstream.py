"""The published Mamba: transformers' logits and names, both ways."""

from __future__ import annotations

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


@pytest.fixture
def theirs():
    config = transformers.MambaConfig(vocab_size=101, hidden_size=48, num_hidden_layers=3, state_size=16)
    torch.manual_seed(3)
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind an initial value
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_logits_of_transformers(theirs) -> None:
    ours = causal_lm(**options_from_config(theirs.config.to_dict()))
    ours.load_state_dict(from_upstream(theirs.state_dict()))
    ids = torch.randint(0, 101, (2, 70))
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) <= 1e-5


def test_and_back(theirs) -> None:
    ours = causal_lm(**options_from_config(theirs.config.to_dict()))
    names = to_upstream(weights(ours), transformers=True)
    assert names.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(names)
    ids = torch.randint(0, 101, (1, 33))
    with torch.no_grad():
        assert relative(theirs(ids).logits, ours(ids).logits) <= 1e-5


def test_folders_of_both_houses(theirs, tmp_path: Path) -> None:
    ids = torch.randint(0, 101, (1, 20))
    with torch.no_grad():
        expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert relative(load_upstream(tmp_path / "hf")(ids).logits, expected) <= 1e-5
    folder = tmp_path / "state-spaces"
    folder.mkdir()
    config = {"d_model": 48, "n_layer": 3, "vocab_size": 101, "ssm_cfg": {}, "pad_vocab_size_multiple": 1}
    (folder / "config.json").write_text(json.dumps(config))
    ours = from_upstream(theirs.state_dict())
    torch.save(to_upstream(ours), folder / "pytorch_model.bin")
    with torch.no_grad():
        assert relative(load_upstream(folder)(ids).logits, expected) <= 1e-5


def test_untied_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.MambaConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, state_size=16, tie_word_embeddings=False
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        theirs.lm_head.weight.normal_()
        expected = theirs(ids := torch.randint(0, 101, (2, 20))).logits
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_upstream(tmp_path / "hf")
    assert not ours.tie_embeddings
    folder = tmp_path / "state-spaces"
    folder.mkdir()
    named = {"d_model": 48, "n_layer": 2, "vocab_size": 101, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    (folder / "config.json").write_text(json.dumps(named))
    torch.save(to_upstream(weights(ours)), folder / "pytorch_model.bin")
    theirs.load_state_dict(to_upstream(weights(ours), transformers=True))
    with torch.no_grad():
        assert relative(ours(ids).logits, expected) <= 1e-5
        assert relative(load_upstream(folder)(ids).logits, expected) <= 1e-5
        assert relative(theirs(ids).logits, expected) <= 1e-5
    (folder / "config.json").write_text(json.dumps({**named, "tie_embeddings": True}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin.* differ.*tie_embeddings to false"):
        load_upstream(folder)


CONFIG = {"d_model": 8, "n_layer": 1, "vocab_size": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a Mamba's configuration"),
        ("[1]", "no settings"),
        ("\xff", "not a Mamba's configuration"),
        (json.dumps({"hidden_size": 8, "vocab_size": 16}), "has no 'num_hidden_layers'"),
        (json.dumps({"d_model": 8}), "has no "),
        (json.dumps({**CONFIG, "vocab_size": "many"}), "not a Mamba's configuration"),
        (json.dumps({**CONFIG, "d_model": "wide"}), "no model that can be built"),
        (json.dumps({**CONFIG, "pad_vocab_size_multiple": 0}), "not a Mamba's configuration"),
        (json.dumps({**CONFIG, "ssm_cfg": {"d_stat": 4}}), "d_stat"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as told:
        load_upstream(tmp_path)
    assert "config.json" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, -1])
def test_damaged_weights_are_named(tmp_path: Path, kept: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "pytorch_model.bin"
    model = causal_lm(**options_from_config(CONFIG))
    torch.save(to_upstream(weights(model)), path)
    load_upstream(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read.*Download it again") as told:
        load_upstream(tmp_path)
    assert "\n" not in str(told.value)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds no mapping"):
        load_upstream(tmp_path)


def test_padded_vocabulary_of_the_published_models() -> None:
    config = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    assert options_from_config(config) == {
        "vocab_size": 50280,
        "d_model": 768,
        "n_layers": 24,
        "tie_embeddings": True,
    }


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="falcon_mamba"):
        options_from_config({"hidden_size": 8, "model_type": "falcon_mamba"})
    with pytest.raises(UserError, match="hidden_act"):
        options_from_config({"hidden_size": 8, "hidden_act": "gelu"})
    for other in ({"ssm_cfg": {"layer": "Mamba3"}}, {"attn_layer_idx": [1]}, {"d_intermediate": 16}):
        with pytest.raises(UserError, match="pure Mamba-1 or Mamba-2"):
            options_from_config({"d_model": 8, "n_layer": 1, "vocab_size": 8, **other})
    with pytest.raises(UserError, match=r"config\.json"):
        load_upstream(tmp_path)
