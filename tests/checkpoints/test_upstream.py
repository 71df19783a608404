"""The published Mamba: transformers' logits and names, both ways."""

from __future__ import annotations

import gc
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mambaseq.checkpoints import load_upstream
from mambaseq.checkpoints.export import weights
from mambaseq.checkpoints.upstream import described, from_upstream, options_from_config, to_upstream
from mambaseq.domain import catalog
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model, causal_lm

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


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_parts(tmp_path: Path, ending: str) -> None:
    source = causal_lm(**options_from_config(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: tensor.clone() for name, tensor in to_upstream(source).items()}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = {name: f"{stem}-{1 + place % 2:05}-of-00002.{ending}" for place, name in enumerate(tensors)}
    for part in set(names.values()):
        kept = {name: tensor for name, tensor in tensors.items() if names[name] == part}
        (save_file if ending == "safetensors" else torch.save)(kept, tmp_path / part)
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loaded = load_upstream(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.state_dict().items())
    for text, told in (
        ("{}", "must have a weight_map"),
        (json.dumps({"weight_map": {"a": "../x.bin"}}), "is no file beside it"),
        (json.dumps({"weight_map": {"a": "config.json", "b": 3}}), "must have a weight_map"),
        ("[", "is not valid JSON"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=told):
            load_upstream(tmp_path)


def peak_memory(run: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and by how many bytes this process grew at most meanwhile."""

    def status(key: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
        return 1024 * int(line.split()[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest from now on
    before = status("VmRSS")
    found = run()
    return found, status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak of a process' memory")
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_large_model_takes_its_own_memory_once(ending: str, tmp_path: Path) -> None:
    """64 MB in bf16, none of it in fp32, and neither the whole model nor its file twice."""
    config = {"d_model": 448, "n_layer": 24, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        names = to_upstream(causal_lm(**options_from_config(config)).state_dict())
    del names["lm_head.weight"]  # as tied weights are saved
    tensors = {name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in names.items()}
    path = tmp_path / ("model.safetensors" if ending == "safetensors" else "pytorch_model.bin")
    (save_file if ending == "safetensors" else torch.save)(tensors, path)
    del tensors
    (small := tmp_path / "small").mkdir()
    (small / "config.json").write_text(json.dumps(CONFIG))
    with_weights(small)  # what is imported at first use is no part of it
    model, peak = peak_memory(lambda: load_upstream(tmp_path, keep_dtype=True))
    assert peak <= 1.3 * path.stat().st_size, peak / path.stat().st_size
    assert model.head.linear.weight is model.encoder.embedding.weight
    assert all((p.dtype, p.device.type, p.requires_grad) == (torch.bfloat16, "cpu", True) for p in model.parameters())
    assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())


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


def with_weights(folder: Path) -> SequenceModel:
    """What the configuration in a folder describes, given the weights of `CONFIG`."""
    torch.save(to_upstream(causal_lm(**options_from_config(CONFIG))), folder / "pytorch_model.bin")
    return load_upstream(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a Mamba's configuration"),
        ("[1]", "no settings"),
        ("\xff", "not a Mamba's configuration"),
        (json.dumps({"hidden_size": 8, "vocab_size": 16}), "has no 'num_hidden_layers'"),
        (json.dumps({"d_model": 8}), "has no "),
        (json.dumps({**CONFIG, "vocab_size": "many"}), "vocab_size must be a whole number"),
        (json.dumps({**CONFIG, "d_model": "wide"}), "d_model must be a whole number"),
        (json.dumps({**CONFIG, "d_model": 8.0}), "d_model must be a whole number"),
        (json.dumps({**CONFIG, "n_layer": True}), "n_layer must be a whole number"),
        (json.dumps({**CONFIG, "vocab_size": -5}), "vocab_size must be a whole number"),
        (json.dumps({**CONFIG, "vocab_size": 10**12}), "vocab_size must be a whole number"),
        (json.dumps({**CONFIG, "n_layer": 1_000_000}), "MAMBASEQ_MAX_LAYERS"),
        (json.dumps({**CONFIG, "pad_vocab_size_multiple": 0}), "pad_vocab_size_multiple must be"),
        (json.dumps({**CONFIG, "tie_embeddings": "no"}), "tie_embeddings must be true or false"),
        (json.dumps({**CONFIG, "ssm_cfg": [1]}), "ssm_cfg must hold settings"),
        (json.dumps({**CONFIG, "ssm_cfg": {"dt_rank": "large"}}), "dt_rank must be"),
        (json.dumps({**CONFIG, "ssm_cfg": {"d_stat": 4}}), "d_stat"),
        ("[" * 100_000, "not a Mamba's configuration"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as told:
        with_weights(tmp_path)
    assert "config.json" in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 1000


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
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not a mapping"):
        load_upstream(tmp_path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (torch.Tensor.to_sparse, "A_log' is sparse or quantised"),
        (lambda tensor: torch.zeros(1, 1).expand_as(tensor), r"A_log' is \(16, 16\), but fewer numbers are there"),
        (lambda tensor: tensor.to(torch.complex64), "A_log holds complex numbers, unlike the model's"),
    ],
)
def test_tensors_of_another_kind_are_named(tmp_path: Path, change, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = to_upstream(causal_lm(**options_from_config(CONFIG)))
    name = "backbone.layers.0.mixer.A_log"
    torch.save(tensors | {name: change(tensors[name])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=told):
        load_upstream(tmp_path)


def test_a_configuration_that_asks_for_more_than_the_weights_have(tmp_path: Path) -> None:
    """It is not built: 64 GB here."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 2 * 10**9}))
    with pytest.raises(UserError, match=r"config\.json describes a model of 16,000,.* parameters, but .*\.bin has"):
        with_weights(tmp_path)


def test_weights_that_would_run_or_swell(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Runs(tmp_path / "pwned"), protocol=2))
    with pytest.raises(UserError, match=r"holds more than tensors, and asks for '\S+'\. No code .* is run") as told:
        load_upstream(tmp_path)
    assert "weights_only" not in str(told.value)  # PyTorch's advice to run it
    assert not (tmp_path / "pwned").exists()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(80 * 2**20))
    with pytest.raises(UserError, match="MAMBASEQ_MAX_UNPACKED_RATIO"):
        load_upstream(tmp_path)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("mixer", [entry.name for entry in catalog()["mixers"]])
def test_only_mamba_has_upstreams_names(mixer: str) -> None:
    model = causal_lm(vocab_size=8, d_model=16, n_layers=1, mixer=mixer, **{"hyena": {"l_max": 32}}.get(mixer, {}))
    for given in (model, weights(model)):
        if mixer in ("mamba", "mamba2"):
            assert load_names(to_upstream(given)) == weights(model).keys() | {"head.linear.weight"}
        else:
            with pytest.raises(UserError, match="cannot be written as a published Mamba"):
                to_upstream(given)


def load_names(theirs: dict[str, torch.Tensor]) -> set[str]:
    return set(from_upstream(theirs))


LM = {"name": "lm", "vocab_size": 8}
TOKENS = {"name": "tokens", "vocab_size": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": {"name": "mamba", "lti": True}}, "ssm"),
        ({"mixer": {"name": "mamba", "complex": True}}, "A_imag"),
        ({"mixer": {"name": "mamba", "selective_dt": False}}, "dt_"),
        ({"mixer": {"name": "mamba", "selective_B": False}}, "mixer.B"),
        ({"backbone": {"name": "residual", "n_layers": 2, "pattern": ["mamba", "mamba2"]}}, "layer 1"),
        ({"backbone": {"name": "residual", "n_layers": 2, "pattern": ["mamba*"]}}, "layer 1"),
        ({"backbone": {"name": "residual", "n_layers": 1, "mlp": True}}, "layer 1"),
        ({"backbone": {"name": "bidirectional", "n_layers": 1}}, "backbone|layer 0"),
        ({"backbone": {"name": "unet"}}, "backbone"),
        ({"head": {"name": "classification", "n_classes": 2}}, "head"),
        ({"head": {"name": "regression"}}, "head"),
        ({"encoder": {**TOKENS, "n_conditions": 2}}, "condition"),
        ({"encoder": {"name": "signal", "n_channels": 2}}, "encoder"),
    ],
)
def test_models_that_upstream_has_not(changes: dict, message: str) -> None:
    spec = {"d_model": 16, "encoder": TOKENS, "mixer": {"name": "mamba"}, "head": LM,
            "backbone": {"name": "residual", "n_layers": 1}, **changes}  # fmt: skip
    model = build_model(spec)
    for given in (model, weights(model)):
        with pytest.raises(UserError, match=rf"cannot be written as a published Mamba.*({message})"):
            to_upstream(given)


def test_options_that_do_not_show_in_names() -> None:
    model = causal_lm(vocab_size=8, d_model=16, n_layers=1, norm_eps=1e-3)
    to_upstream(model, transformers=True)  # where it is a setting
    with pytest.raises(UserError, match="epsilons"):
        to_upstream(model)
    falcon = causal_lm(vocab_size=8, d_model=16, n_layers=1, selective_norm_eps=1e-6)
    assert described(falcon)["model_type"] == "falcon_mamba"
    with pytest.raises(UserError, match="norms of dt, B and C"):
        to_upstream(falcon)
    for options in ({"norm_before_gate": True}, {"eps": 1e-3}):
        with pytest.raises(UserError, match=r"norm_before_gate|epsilons"):
            to_upstream(causal_lm(vocab_size=8, d_model=16, n_layers=1, mixer="mamba2", **options), transformers=True)


def test_padded_vocabulary_of_the_published_models() -> None:
    config = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    assert options_from_config(config) == {
        "vocab_size": 50280,
        "d_model": 768,
        "n_layers": 24,
        "tie_embeddings": True,
    }


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="falcon_h1"):
        options_from_config({"hidden_size": 8, "model_type": "falcon_h1"})
    with pytest.raises(UserError, match="hidden_act"):
        options_from_config({"hidden_size": 8, "hidden_act": "gelu"})
    for other, told in (
        ({"ssm_cfg": {"layer": "Mamba0"}}, r"\(ssm_cfg\.layer 'Mamba0'\)"),
        ({"attn_layer_idx": [1]}, r"\(attn_layer_idx \[1\]\)"),
    ):
        with pytest.raises(UserError, match=f"pure Mamba-1, Mamba-2 or Mamba-3 model {told}"):
            options_from_config({"d_model": 8, "n_layer": 1, "vocab_size": 8, **other})
    for config, again in (
        ({"hidden_size": 8, "model_type": "jamba"}, False),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 8, "attn_layer_idx": [1]}, False),
        ({"d_model": 8, "n_layer": 1, "vocab_size": -8}, True),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"config\.json cannot be used") as refused:
            load_upstream(tmp_path)
        assert ("Download it again" in str(refused.value)) == again  # no remedy where the files are whole
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_upstream(tmp_path)
