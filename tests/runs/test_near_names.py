"""Names with commas, spaces and accents, and names that are nearly right."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambaseq.errors import ConfigError
from mambaseq.runs.known import condition_ids
from mambaseq.runs.parsing import parse_config

NAMES = ["7, Nicolas", "7, Théo", "8, Théo", "rock, pop", "rock", "Ålesund", "a b"]


def loaded(names: list[str]) -> Any:
    card = SimpleNamespace(spec={"encoder": {"n_conditions": len(names)}}, condition_names=names, conditions=[])
    return SimpleNamespace(card=card, source=Path("model.safetensors"))


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("7, Nicolas", [0]),
        ("rock, pop", [3]),
        ("rock, pop,rock", [3, 4]),
        ("rock,rock, pop", [4, 3]),
        ("rock, 8, Théo", [4, 2]),
        (["rock", "a b"], [4, 6]),
        (" a b , rock ", [6, 4]),
        (unicodedata.normalize("NFD", "8, Théo"), [2]),
        (unicodedata.normalize("NFD", "Ålesund"), [5]),
    ],
)
def test_conditions(given: Any, ids: list[int]) -> None:
    assert condition_ids(loaded(NAMES), given) == ids
    assert condition_ids(loaded([unicodedata.normalize("NFD", name) for name in NAMES]), given) == ids


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("seven", ["7, Nicolas", "7, Théo"]),
        ("7", ["7, Nicolas", "7, Théo"]),
        ("nicolas", ["7, Nicolas"]),
        ("Rock", ["rock"]),
        ("alesund", ["Ålesund"]),
        ("Theo", ["7, Théo", "8, Théo"]),
        ("rok", ["rock"]),
        ("a  b", ["a b"]),
    ],
)
def test_conditions_that_are_near(given: str, near: list[str]) -> None:
    with pytest.raises(ConfigError, match="Did you mean") as told:
        condition_ids(loaded(NAMES), given)
    hint = str(told.value).partition("Did you mean")[2].partition("?")[0]
    assert all(name in hint for name in near), told.value


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--data.name=text/corpsu", "text/corpus"),
        ("--data.name=Text/Corpus", "text/corpus"),
        ("--data.name=corpus", "text/corpus"),
        ("--data.name=tëxt/corpus", "text/corpus"),
        ("--data.name=text/corpus, others", "text/corpus"),
        ("--model.mixer.name=mambda", "mamba"),
        ("--model.mixer.name=Mamba", "mamba"),
        ("--model.mixer.name=mamba 2", "mamba2"),
        ("--model.mixer.name=MAMBA2", "mamba2"),
        ("--model.head.name=classifier", "classification"),
        ("--model.head.name=LM", "lm"),
        ("--model.backbone.name=residuàl", "residual"),
        ("--model.encoder.name=kmer", "dna/kmer"),
        ('--metrics=["Accuracy"]', "accuracy"),
    ],
)
def test_parts_that_are_near(option: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'\\?"):
        parse_config("text/demo", [option])


@pytest.mark.parametrize("given", ["text/deom", "Text/Demo", "text demo", "text/demo, other", "téxt/demo"])
def test_configurations_that_are_near(given: str) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'text/demo'\?"):
        parse_config(given, [])
