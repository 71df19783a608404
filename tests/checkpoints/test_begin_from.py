"""A model begins with the weights of another: by name, where they mean the same, and says what it did not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mambaseq.checkpoints import LoadedModel, ModelCard
from mambaseq.checkpoints.beginning import Beginning, begin_from, load_source
from mambaseq.checkpoints.export import weights
from mambaseq.checkpoints.upstream import to_upstream
from mambaseq.conditions import Condition
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model, causal_lm


class Letters(Tokenizer):
    def __init__(self, letters: str) -> None:
        self.letters, self.vocab_size = letters, len(letters)

    @property
    def options(self) -> dict[str, Any]:
        return {"letters": self.letters}

    def encode(self, raw: str) -> np.ndarray:
        return np.array([self.letters.index(letter) for letter in raw], dtype=np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.letters[int(i)] for i in ids)


class Filed(Letters):
    """One that has a file of its own."""

    def save_files(self, folder: Path) -> dict[str, Any]:
        (folder / "letters.txt").write_text(self.letters)
        return {}

    @classmethod
    def load_files(cls, folder: Path, options: dict[str, Any]) -> Filed:
        return cls((folder / "letters.txt").read_text())


def spec(vocabulary: int = 7, layers: int = 2, **parts: Any) -> dict[str, Any]:
    return {
        "d_model": 8,
        "tie_embeddings": False,
        "encoder": {"name": "tokens", "vocab_size": vocabulary},
        "backbone": {"name": "residual", "n_layers": layers},
        "mixer": {"name": "mamba", "d_state": 4},
        "head": {"name": "lm", "vocab_size": vocabulary},
        **parts,
    }


def begun(
    now: dict[str, Any],
    former: dict[str, Any],
    letters: tuple[str, str] = ("", ""),
    other_tokenizer: bool = False,
    **card: Any,
) -> tuple[SequenceModel, dict[str, torch.Tensor], SequenceModel, Beginning]:
    """The model, its tensors before, the source, and what was said."""
    source, model = build_model(former), build_model(now)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = (Letters(text) if text else None for text in letters)
    theirs = ModelCard(
        former,
        reader_options={"columns": ["a", "b"]},
        class_names=card.pop("former_classes", []),
        conditions=card.pop("former_conditions", []),
        task=card.pop("former_task", None),
    )
    loaded = LoadedModel(source, theirs, one, Path("x/model/model.safetensors"))
    found = begin_from(model, loaded, ModelCard(now, **card), other, other_tokenizer=other_tokenizer)
    return model, before, source, found


def test_an_equal_model_is_the_other() -> None:
    model, _, source, found = begun(spec(), spec())
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (found.new, found.left, found.notes) == ([], [], [])
    count = len(source.state_dict())
    assert found.told("runs/x") == f"{count} of {count} tensors come from runs/x"


CLASSIFIER = {"name": "classification", "n_classes": 7}


def test_a_head_of_another_kind_is_new_though_its_shape_fits() -> None:
    model, before, source, found = begun(spec(head=CLASSIFIER), spec())
    assert model.head.linear.weight.shape == source.head.linear.weight.shape
    assert torch.equal(model.head.linear.weight, before["head.linear.weight"])
    assert torch.equal(model.encoder.embedding.weight, source.encoder.embedding.weight)
    assert found.new == ["head.linear.weight", "head.linear.bias"]
    told = found.told("x")
    assert "the head differs, 'lm' -> 'classification'" in told
    assert "new: head.linear; not used: head.linear" in told


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "c"], ["a", "b", "c"]])
def test_a_head_goes_with_its_classes(classes: list[str]) -> None:
    former, now = ({"name": "classification", "n_classes": n} for n in (2, len(classes)))
    cards = {"former_classes": ["a", "b"], "class_names": classes}
    model, before, source, found = begun(spec(head=now), spec(head=former), **cards)
    same = classes == ["a", "b"]
    assert torch.equal(model.head.linear.weight, (source.state_dict() if same else before)["head.linear.weight"])
    assert ("the classes differ" in found.told("x")) == (not same)


@pytest.mark.parametrize("names", ["xy", "yx"])
def test_a_table_of_conditions_goes_with_their_names(names: str) -> None:
    numbers = {"condition_means": [0.0], "condition_stds": [1.0]}
    encoder = {"name": "tokens", "vocab_size": 7, "n_conditions": 3, "condition_sizes": [2, 1], **numbers}
    former, now = (
        [Condition("a", tuple(of)).plain(), Condition("b", ("z",)).plain(), Condition("c", std=1.0).plain()]
        for of in ("xy", names)
    )
    cards = {"former_conditions": former, "conditions": now}
    model, before, source, found = begun(spec(encoder=encoder), spec(encoder=encoder), **cards)
    taken = source.state_dict() if names == "xy" else before
    for name in ("weight", "slopes", "there"):
        assert torch.equal(model.state_dict()[f"encoder.condition.{name}"], taken[f"encoder.condition.{name}"])
    assert ("the conditions differ, a=x, a=y, b=z and 1 more -> a=y, a=x" in found.told("x")) == (names == "yx")


def test_a_vocabulary_grows() -> None:
    model, before, source, found = begun(spec(9), spec(7), ("abcdefg", "abcdefghi"))
    for name in ("encoder.embedding.weight", "head.linear.weight"):
        rows = model.state_dict()[name]
        assert torch.equal(rows[:7], source.state_dict()[name])
        assert torch.equal(rows[7:], before[name][7:])
    assert found.grown == ["encoder.embedding.weight", "head.linear.weight"]
    assert found.notes == ["the vocabulary grew from 7 to 9 ids; the new ones are initialised"]


def test_a_smaller_vocabulary_is_said() -> None:
    model, before, _, found = begun(spec(5), spec(7))
    assert torch.equal(model.encoder.embedding.weight, before["encoder.embedding.weight"])
    assert found.notes == ["the vocabulary has 5 ids, not 7"]


@pytest.mark.parametrize("size", [6, 7, 9])
def test_another_tokenizer_is_refused(size: int) -> None:
    with pytest.raises(ConfigError) as error:
        begun(spec(size), spec(7), ("abcdefg", "abcdegfhi"[:size]))
    told = str(error.value)
    assert told.startswith("finetune.init_from: the model at x/model was trained with the tokenizer Letters with")
    assert "{'letters': 'abcdefg'}, and these data have Letters with {'letters': 'abcdeg" in told
    assert (
        f"{min(2, size - 5)} ids mean something else, the first, 5, is 'f' there and 'g' here. Give data the settings"
        in told
    )
    assert "set finetune.other_tokenizer to true" in told


@pytest.mark.parametrize("size", [6, 7, 9])
def test_rows_of_another_tokenizer_are_taken_where_ids_mean_the_same(size: int) -> None:
    letters = "abcdefg", "abcdegfhi"[:size]
    model, before, source, found = begun(spec(size), spec(7), letters, other_tokenizer=True)
    for name in ("encoder.embedding.weight", "head.linear.weight"):
        rows = model.state_dict()[name]
        assert torch.equal(rows[:5], source.state_dict()[name][:5])
        assert torch.equal(rows[5:], before[name][5:])
    assert found.grown == ["encoder.embedding.weight", "head.linear.weight"]
    assert f"5 of {min(size, 7)} ids surely mean the same; what belongs to others is initialised" in found.notes
    model, before, _, found = begun(spec(7), spec(7), ("abcdeff", "gabcdff"), other_tokenizer=True)
    assert torch.equal(model.encoder.embedding.weight, before["encoder.embedding.weight"])
    assert found.new == ["encoder.embedding.weight", "head.linear.weight"]


def test_weights_of_all_ids_are_those_of_their_tokenizer() -> None:
    filters, letters = {"name": "dna/conv", "vocab_size": 7, "width": 3}, ("abcdefg", "abcdegf")
    parts = {"encoder": filters, "head": {"name": "classification", "n_classes": 2}}
    with pytest.raises(ConfigError, match=r"2 ids mean something else"):
        begun(spec(**parts), spec(**parts), letters)
    model, before, source, found = begun(spec(**parts), spec(**parts), letters, other_tokenizer=True)
    assert torch.equal(model.encoder.filters.weight, before["encoder.filters.weight"])
    assert torch.equal(model.head.linear.weight, source.state_dict()["head.linear.weight"])
    assert found.notes == ["5 of 7 ids surely mean the same; what belongs to others is initialised"]


def test_a_tokenizer_counts_only_where_weights_belong_to_ids() -> None:
    parts = {"head": {"name": "classification", "n_classes": 2}}
    filters = {"name": "dna/conv", "vocab_size": 7, "width": 3}
    _, _, _, found = begun(spec(encoder=filters, **parts), spec(**parts), ("abcdefg", "bcdefga"))
    assert found.notes == ["the encoder differs, 'tokens' -> 'dna/conv'"]


@pytest.mark.parametrize(
    ("former", "now", "shared", "mask"),
    [
        (("masked", 8), ("next_token", 9), 7, False),  # row 7 is the mask there, and a token here
        (("masked", 8), ("next_token", 8), 7, False),  # also where the shapes are equal
        (("masked", 8), ("next_token", 7), 7, False),
        (("masked", 8), ("masked", 10), 7, True),
        (("masked", 8), ("masked", 8), 7, True),
        (("next_token", 7), ("masked", 8), 7, False),
        (("next_token", 8), ("masked", 8), 0, False),  # a token there that is not here
    ],
)
def test_the_row_of_the_mask_is_that_of_the_mask_alone(former, now, shared: int, mask: bool) -> None:
    tasks = {"former_task": former[0], "task": now[0]}
    model, before, source, found = begun(spec(now[1]), spec(former[1]), **tasks)
    for name in ("encoder.embedding.weight", "head.linear.weight"):
        rows, theirs, initial = model.state_dict()[name], source.state_dict()[name], before[name]
        assert torch.equal(rows[:shared], theirs[:shared])
        last = len(rows) - mask
        assert torch.equal(rows[shared:last], initial[shared:last])
        assert torch.equal(rows[last:], theirs[-1:] if mask else initial[last:])
        group = found.new if not shared else found.grown if shared + mask < len(rows) else found.taken
        assert name in group
    assert any("ids, not 8" in note for note in found.notes) == (not shared)
    assert ("the mask token is initialised" in found.notes) == (former == ("next_token", 7))


WAVES = {"name": "forecast", "n_channels": 2, "horizon": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_channels": 1, "horizon": 2}, "mean_1, std_1, mean_2 and 1 more -> mean_1_ahead_1, std_1_ahead_1"),
        ({"loss": "quantile", "quantiles": [0.1, 0.9]}, "-> q0.1_1, q0.9_1"),
        ({}, ""),
    ],
)
def test_forecasts_of_one_shape_and_another_meaning_are_new(change: dict[str, Any], told: str) -> None:
    signal = {"encoder": {"name": "signal", "n_channels": 2}}
    model, before, source, found = begun(spec(head=WAVES | change, **signal), spec(head=WAVES, **signal))
    wanted = before if change else source.state_dict()
    assert model.head.linear.weight.shape == source.head.linear.weight.shape
    assert torch.equal(model.head.linear.weight, wanted["head.linear.weight"])
    assert told in "; ".join(found.notes)
    assert bool(found.notes) == bool(change)


def test_other_settings_of_what_fits_are_said() -> None:
    signal = {"encoder": {"name": "signal", "n_channels": 2}, "head": WAVES}
    _, _, _, found = begun(spec(**signal), spec(**signal), reader_options={"columns": ["a", "c"]})
    assert found.notes == ["the channels are others, a, b -> a, c"]
    bins = {"name": "token_regression", "n_outputs": 1, "stride": 2, "dropout": 0.1}
    _, _, _, found = begun(spec(head=bins | {"stride": 4, "dropout": 0.0}), spec(head=bins))
    assert found.notes == ["settings differ: head.stride 2 -> 4"]


def test_a_published_model(tmp_path: Path) -> None:
    """As mamba-ssm writes it: rows behind the last token fill the vocabulary up to a multiple of 8."""
    source = causal_lm(16, 8, 2, d_state=4)
    config = {"d_model": 8, "n_layer": 2, "vocab_size": 13, "ssm_cfg": {"d_state": 4}, "pad_vocab_size_multiple": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(to_upstream(source), tmp_path / "pytorch_model.bin")
    loaded, published = load_source(tmp_path, Letters("abcdefghijklm"))
    assert published
    model = build_model(spec(13, head=CLASSIFIER))
    own = ModelCard(model.spec or {}, task="classes")
    found = begin_from(model, loaded, own, Letters("abcdefghijklm"), published=published)
    assert torch.equal(model.encoder.embedding.weight, source.encoder.embedding.weight[:13])
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)
    told = found.told("x")
    assert "the head differs" in told
    assert "the vocabulary has 13 ids, not 16; there is no tokenizer of this run's kind next to its weights" in told
    grown = build_model(spec(20))
    found = begin_from(grown, loaded, ModelCard(grown.spec or {}, task="next_token"), published=published)
    assert torch.equal(grown.head.linear.weight[:16], source.encoder.embedding.weight)
    assert found.grown == ["encoder.embedding.weight", "head.linear.weight"]


def test_a_tokenizer_beside_published_weights_is_compared(tmp_path: Path) -> None:
    causal = {"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"d_state": 4}}
    (tmp_path / "config.json").write_text(json.dumps(causal))
    save_file(weights(causal_lm(8, 8, 1, d_state=4)), tmp_path / "model.safetensors")
    (tmp_path / "letters.txt").write_text("abdcefgh")
    model, own = build_model(spec(8, layers=1)), Filed("abcdefgh")
    loaded, published = load_source(tmp_path, own)
    with pytest.raises(ConfigError, match="2 ids mean something else, the first, 2, is 'd' there and 'c' here"):
        begin_from(model, loaded, ModelCard(model.spec or {}), own, published=published)


@pytest.mark.parametrize("tied", [(True, False), (False, True), (True, True)])
def test_tied_weights(tied: tuple[bool, bool]) -> None:
    model, _, source, found = begun(spec(9, tie_embeddings=tied[0]), spec(7, tie_embeddings=tied[1]))
    assert torch.equal(model.encoder.embedding.weight[:7], source.encoder.embedding.weight)
    if not tied[0]:
        assert torch.equal(model.head.linear.weight[:7], source.encoder.embedding.weight)
    assert found.left == (["head.linear.weight"] if tied == (True, False) else [])


def test_more_layers_are_new_and_fewer_are_left() -> None:
    model, before, source, found = begun(spec(layers=3), spec(layers=2))
    assert all(name.startswith("backbone.layers.2.") for name in found.new)
    assert torch.equal(model.backbone.layers[2].mixer.A_log, before["backbone.layers.2.mixer.A_log"])
    assert torch.equal(model.backbone.layers[1].mixer.in_proj.weight, source.backbone.layers[1].mixer.in_proj.weight)
    assert all(name.startswith("backbone.layers.1.") for name in begun(spec(layers=1), spec(layers=2))[3].left)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (spec(mixer={"name": "mamba", "d_state": 8}), "A_log is (16, 4) there and (16, 8) here"),
        (spec(backbone={"name": "unet", "n_layers": 1, "pool": [2]}), "nothing in the backbone"),
        (spec() | {"d_model": 16}, "has another backbone"),
    ],
)
def test_another_backbone_is_refused(now: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.init_from") as error:
        begun(now, spec())
    assert told in str(error.value)
    assert len(str(error.value)) < 1000


def test_another_backbone_is_told_by_its_settings() -> None:
    """Those that differ, and no others: defaults that are written out are defaults, and layers may be more."""
    backbone = {"name": "residual", "n_layers": 2, "norm": "layer", "norm_eps": 1e-5, "dropout": 0.1, "pattern": None}
    mixer = {"name": "mamba3", "d_state": 8, "head_dim": 8, "rank": 2, "expand": 2}
    theirs = spec(d_model=16, backbone=backbone, mixer=mixer)
    ours = spec(layers=3, mixer={"name": "gated_delta", "head_dim": 8})
    with pytest.raises(ConfigError) as error:
        begun(ours, theirs)
    words = str(error.value).partition("trained with (")[2].partition(")")[0]
    assert words == (
        "--model.d_model 16 --model.backbone.norm layer --model.mixer.name mamba3 --model.mixer.d_state 8 "
        "--model.mixer.head_dim 8 --model.mixer.rank 2"
    )
