"""A model begins with the weights of another: by name, where they mean the same, and says what it did not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambaseq.checkpoints import LoadedModel, ModelCard
from mambaseq.checkpoints.beginning import Beginning, begin_from
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model


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
    now: dict[str, Any], former: dict[str, Any], letters: tuple[str, str] = ("", ""), **card: Any
) -> tuple[SequenceModel, dict[str, torch.Tensor], SequenceModel, Beginning]:
    """The model, its tensors before, the source, and what was said."""
    source, model = build_model(former), build_model(now)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = (Letters(text) if text else None for text in letters)
    class_names = card.pop("former_classes", [])
    loaded = LoadedModel(source, ModelCard(former, class_names=class_names), one, Path("x/model/model.safetensors"))
    return model, before, source, begin_from(model, loaded, ModelCard(now, **card), other)


def test_an_equal_model_is_the_other() -> None:
    model, _, source, found = begun(spec(), spec())
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (found.new, found.left, found.notes) == ([], [], [])
    count = len(source.state_dict())
    assert found.told("runs/x") == f"{count} of {count} tensors are those of runs/x"


CLASSIFIER = {"name": "classification", "n_classes": 7}


def test_a_head_of_another_kind_is_new_though_its_shape_fits() -> None:
    model, before, source, found = begun(spec(head=CLASSIFIER), spec())
    assert model.head.linear.weight.shape == source.head.linear.weight.shape
    assert torch.equal(model.head.linear.weight, before["head.linear.weight"])
    assert torch.equal(model.encoder.embedding.weight, source.encoder.embedding.weight)
    assert found.new == ["head.linear.weight", "head.linear.bias"]
    told = found.told("x")
    assert "the head is another, 'lm' -> 'classification'" in told
    assert "new: head.linear; not used: head.linear" in told


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "c"], ["a", "b", "c"]])
def test_a_head_goes_with_its_classes(classes: list[str]) -> None:
    former, now = ({"name": "classification", "n_classes": n} for n in (2, len(classes)))
    cards = {"former_classes": ["a", "b"], "class_names": classes}
    model, before, source, found = begun(spec(head=now), spec(head=former), **cards)
    same = classes == ["a", "b"]
    assert torch.equal(model.head.linear.weight, (source.state_dict() if same else before)["head.linear.weight"])
    assert ("the classes are others" in found.told("x")) == (not same)


def test_a_vocabulary_grows() -> None:
    model, before, source, found = begun(spec(9), spec(7), ("abcdefg", "abcdefghi"))
    for name in ("encoder.embedding.weight", "head.linear.weight"):
        rows = model.state_dict()[name]
        assert torch.equal(rows[:7], source.state_dict()[name])
        assert torch.equal(rows[7:], before[name][7:])
    assert found.grown == ["encoder.embedding.weight", "head.linear.weight"]
    assert found.notes == ["the vocabulary grew from 7 to 9 ids, of which the new ones are as initialised"]


def test_other_tokenizers_and_smaller_vocabularies_are_said() -> None:
    _, _, _, found = begun(spec(9), spec(7), ("abcdefg", "abcdegfhi"))
    assert "the tokenizers differ: 2 of 7 ids stand for something else (the first is 5), and rows go by the id" in (
        found.notes
    )
    model, before, _, found = begun(spec(5), spec(7))
    assert torch.equal(model.encoder.embedding.weight, before["encoder.embedding.weight"])
    assert found.notes == ["the vocabulary has 5 ids, not 7"]


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
        (spec(backbone={"name": "unet", "n_layers": 1, "pool": [2]}), "nothing of the backbone"),
        (spec() | {"d_model": 16}, "has a backbone that is not this one"),
    ],
)
def test_another_backbone_is_refused(now: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.init_from") as error:
        begun(now, spec())
    assert told in str(error.value)
    assert len(str(error.value)) < 1000
