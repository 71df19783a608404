"""Law 6: save, load, same output bit for bit; and what can go wrong with files."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.lightning_plugin import AtomicCheckpointIO
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.models.building import for_any_machine


def small(**options) -> SequenceModel:
    return causal_lm(vocab_size=13, d_model=8, n_layers=2, **options)


def card(model: SequenceModel) -> ModelCard:
    assert model.spec is not None
    return ModelCard(spec=model.spec, length=4)


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": False}, {"mixer": "s4d"}, {"lti": True}, {"n_conditions": 3}]
)
def test_saved_and_loaded_gives_the_same_bits(tmp_path: Path, options: dict) -> None:
    model = small(**options).eval()
    save_model(tmp_path / "m", model, card(model))
    loaded = load_model(tmp_path / "m")
    ids = torch.randint(0, 13, (2, 9))
    condition = torch.tensor([0, 2]) if "n_conditions" in options else None
    with torch.no_grad():
        assert torch.equal(loaded.model(ids, condition=condition).logits, model(ids, condition=condition).logits)
    assert loaded.card.length == 4


def test_a_model_that_names_a_backend_is_saved_for_any_machine(tmp_path: Path) -> None:
    """One trained by kernels of GPUs is read where there are none; the model in memory keeps its own."""
    options = {"pattern": ["kda", "gated_delta"], "mixers": {"gated_delta": {"backend": "triton", "d_conv": 3}}}
    model = small(mixer="kda", backend="fla", **options)
    save_model(tmp_path / "m", model, card(model))
    loaded = load_model(tmp_path / "m")
    assert loaded.card.spec["mixer"] == {"name": "kda"}
    assert loaded.card.spec["mixers"] == {"gated_delta": {"d_conv": 3}}
    assert loaded.model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert model.spec is not None
    assert model.spec["mixer"]["backend"] == "fla"


def test_a_backend_of_a_plugin_that_is_not_there_stays() -> None:
    spec = small().spec
    assert spec is not None
    gone = spec | {"mixer": {"name": "of_a_plugin", "backend": "own"}}
    assert for_any_machine(gone) == gone


def test_another_shape_is_named(tmp_path: Path) -> None:
    model = small()
    save_model(tmp_path / "m", model, card(model))
    path = tmp_path / "m" / "model.json"
    text = json.loads(path.read_text())
    text["spec"]["d_model"] = 12
    path.write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"model\.safetensors do not fit.*backbone.*\(.*the model has"):
        load_model(tmp_path / "m")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_model(tmp_path)
    model = small()
    save_model(tmp_path / "m", model, card(model))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path / "m")
    description = tmp_path / "m" / "model.json"
    for spec, said in (
        ({}, "has no d_model"),
        ({"d_model": 8}, "has no encoder"),
        ([], "spec cannot be"),
        ({**(model.spec or {}), "head": None}, "head must hold settings"),
    ):
        description.write_text(json.dumps({"format": 1, "spec": spec}))
        with pytest.raises(UserError, match=rf"model\.json.*{said}"):
            load_model(tmp_path / "m")
    for text, said in (
        ("{", "line 1"),
        ("3", "holds one int"),
        ("[]", "holds one list"),
        ('{"format": 1}', "has no spec"),
    ):
        description.write_text(text)
        with pytest.raises(UserError, match=rf"model\.json.*{said}"):
            load_model(tmp_path / "m")


def test_checkpoints_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "evil": Path("x")}, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match=r"c\.ckpt cannot be read"):
        read_checkpoint(tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "d.ckpt")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes: what a full disk or quota does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"weights": torch.ones(10)}, "global_step": 1}, path)
    with full_disk(100_000), pytest.raises(UserError, match=r"last\.ckpt(.|\n)*Free some space"):
        io.save_checkpoint({"state_dict": {"weights": torch.ones(1_000_000)}, "global_step": 2}, path)
    assert read_checkpoint(path)["state_dict"]["weights"].shape == (10,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_atomic_writer_replaces(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    for value in (1, 2):
        io.save_checkpoint({"state_dict": {}, "global_step": value}, tmp_path / "a" / "c.ckpt")
    assert io.load_checkpoint(tmp_path / "a" / "c.ckpt") == {"state_dict": {}, "global_step": 2}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_unknown_parts_and_options_are_refused() -> None:
    from mambaseq.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'mamba'"):
        small(mixer="mambo")
    with pytest.raises(ConfigError, match="d_stat"):
        small(d_stat=3)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        build_model(
            {
                "d_model": 8,
                "tie_embeddings": True,
                "encoder": {"name": "signal", "n_channels": 1},
                "backbone": {"name": "residual", "n_layers": 1},
                "mixer": {"name": "mamba"},
                "head": {"name": "classification", "n_classes": 2},
            }
        )


@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_one_flipped_bit_is_refused(tmp_path: Path, where: float) -> None:
    model = small()
    save_model(tmp_path / "m", model, card(model))
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*SHA-256"):
        load_model(tmp_path / "m")


def test_a_model_without_checksums_is_loaded(tmp_path: Path) -> None:
    model = small()
    save_model(tmp_path / "m", model, card(model))
    path = tmp_path / "m" / "model.json"
    fields = json.loads(path.read_text())
    assert fields.pop("sha256").keys() == {"model.safetensors"}
    path.write_text(json.dumps(fields))
    load_model(tmp_path / "m")


def test_files_of_a_tokenizer_are_checked(tmp_path: Path) -> None:
    class WithFile(ByteTokenizer):
        def save_files(self, folder: Path) -> dict:
            (folder / "words.txt").write_text("a b")
            return self.options

    model = small()
    described = dataclasses.replace(card(model), tokenizer={"name": "text/bytes", "options": {}})
    save_model(tmp_path / "m", model, described, WithFile())
    load_model(tmp_path / "m")
    (tmp_path / "m" / "words.txt").write_text("a c")
    with pytest.raises(UserError, match=r"words\.txt is damaged"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "words.txt").unlink()
    with pytest.raises(UserError, match=r"words\.txt is missing"):
        load_model(tmp_path / "m")


def test_equal_models_are_described_by_equal_bytes(tmp_path: Path) -> None:
    texts = []
    for number, turn in enumerate((list, reversed)):
        model = small(d_state=3)
        spec = {
            key: dict(turn(list(value.items()))) if isinstance(value, dict) else value
            for key, value in turn(list((model.spec or {}).items()))
        }
        save_model(
            tmp_path / str(number), model, ModelCard(spec=spec, generation=dict(turn([("top_k", 1), ("top_p", 1)])))
        )
        fields = json.loads((tmp_path / str(number) / "model.json").read_text())
        fields.pop("sha256")  # of other weights
        texts.append(json.dumps(fields))
    assert texts[0] == texts[1]


def test_a_model_much_larger_than_its_weights_is_not_built(tmp_path: Path) -> None:
    """64 GB here."""
    model = small()
    save_model(tmp_path / "m", model, card(model))
    path = tmp_path / "m" / "model.json"
    fields = json.loads(path.read_text())
    for part in ("encoder", "head"):
        fields["spec"][part]["vocab_size"] = 2 * 10**9
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"model\.json.*asks for 16,000,.* parameters, but .*model\.safetensors has"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_with_the_files_name(tmp_path: Path, value: float) -> None:
    model = small()
    name, parameter = list(model.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[3] = value
    save_model(tmp_path / "m", model, card(model))
    with pytest.raises(
        UserError, match=rf"model\.safetensors hold values that are not finite.*\(in {name}\).*diverged"
    ):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tokenizer",), "text/bytes"),
        (("tokenizer",), {"name": 3, "options": {}}),
        (("tokenizer",), {"name": "text/bytes", "options": []}),
        (("writer",), ["text/text"]),
        (("reader_options",), "field"),
        (("generation",), [1]),
        (("generation",), {"temperature": -1}),
        (("generation",), {"top_p": "NaN"}),
        (("spec", "backbone", "norm_eps"), -1e-5),
        (("spec", "backbone", "n_layers"), 10**6),
        (("spec", "d_model"), 10**9),
        (("spec", "mixer", "d_state"), 10**9),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_at_once(tmp_path: Path, keys: tuple[str, ...], value) -> None:
    model = small()
    save_model(tmp_path / "m", model, card(model))
    path = tmp_path / "m" / "model.json"
    fields = json.loads(path.read_text())
    inner = fields
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(fields))
    start = time.process_time()
    with pytest.raises(UserError, match=r"model\.json") as refusal:
        load_model(tmp_path / "m")
    assert time.process_time() - start < 1
    assert len(str(refusal.value)) < 1000
