"""Recipes on text: models of equal size, sizes of states, trials that tables share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mambaseq_text.recipes import ablations, mixers
from mambaseq_text.recipes.mixers import MIXERS, N_LAYERS, PARAMETERS, Contender, state_size
from mambaseq_text.recipes.shakespeare import Text, bits_per_byte

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import Context

CPU = torch.device("cpu")


def test_every_mixer_of_the_core_is_in_it() -> None:
    core = {entry.name for entry in catalog()["mixers"] if "/" not in entry.name}
    along = {name for name in core if not catalog()["mixers"].get(name).position_wise}
    assert {mixer for mixer, _ in MIXERS.values()} == along


@pytest.mark.parametrize("name", MIXERS)
def test_models_have_a_million_parameters(name: str) -> None:
    contender = Contender.of(name, N_LAYERS, PARAMETERS)
    model = contender.make(1024, CPU)
    assert abs(model.n_parameters() / PARAMETERS - 1) <= 0.05, contender.d_model
    assert len([mixer for mixer in model.backbone.mixers() if not mixer.position_wise]) == N_LAYERS


def test_sizes_of_states() -> None:
    tokens = torch.zeros(64, dtype=torch.uint8)

    def sizes(name: str, options: dict) -> dict[str, float]:
        return state_size(Contender(name, name, options, 32, 2), tokens)

    # d_inner 64: three inputs of the convolution and five states, in fp32
    assert sizes("mamba", {"d_state": 5}) == {"bytes": 2 * 64 * (3 + 5) * 4, "bytes_per_token": 0}
    assert sizes("s4d", {"d_state": 5}) == {"bytes": 2 * 32 * 5 * 8, "bytes_per_token": 0}
    grown = sizes("attention", {})  # keys and values in fp32, and the length
    assert grown == {"bytes": 2 * (64 * 2 * 32 * 4 + 8), "bytes_per_token": 2 * 2 * 32 * 4}


def test_bits_per_byte_predicts_every_byte_but_the_first_once() -> None:
    text = Text.load(CPU)
    assert len(text.test) == 111_540
    torch.manual_seed(0)
    model = causal_lm(256, 8, 1, "s4d").eval()
    some = text.test[:38].long()
    with torch.no_grad():
        logits = torch.cat([model(piece[None]).logits[0] for piece in some[:-1].split(16)])
    expected = torch.nn.functional.cross_entropy(logits, some[1:]) / math.log(2)
    assert bits_per_byte(model, text.test[:38], 16, 2) == pytest.approx(float(expected), rel=1e-5)


def test_a_model_without_room_is_noted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Contender.make

    def without_room(contender: Contender, *args: Any) -> SequenceModel:
        if contender.name == "s5":
            raise torch.OutOfMemoryError
        return make(contender, *args)

    monkeypatch.setattr(Contender, "make", without_room)
    monkeypatch.setattr(mixers, "width", lambda *_: 8)
    losses, costs = mixers.run(Context(CPU, "tiny", [0], tmp_path, ["s5", "attention"]))
    broken, whole = losses.lines
    assert broken.note == "out of memory"
    assert "bits" not in broken.values
    assert "bits" in whole.values
    assert not whole.note
    broken, whole = costs.lines
    assert "at 32: out of memory" in broken.note
    assert not broken.values
    assert whole.note.startswith("the state grows by")
    assert set(whole.values) == {"tokens_per_s at 16", "tokens_per_s at 32", "state_bytes"}


def test_a_model_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "s5", ("s5", {"blocks": 7}))
    monkeypatch.setattr(mixers, "width", lambda *_: 8)
    with pytest.raises(ConfigError, match="blocks"):
        mixers.run(Context(CPU, "tiny", [0], tmp_path, ["s5"]))


def test_tables_share_the_baseline(tmp_path: Path) -> None:
    only = ["Mamba with S6", "dt, B and C", "rank 8", "N = 16, B and C selective"]
    tables = ablations.run(Context(CPU, "tiny", [0], tmp_path, only))
    assert [table.title[:8].strip(":") for table in tables] == ["Table 6", "Table 7", "Table 9", "Table 10"]
    assert all(line.values["difference"] == [0.0] for table in tables for line in table.lines)
    assert len(list((tmp_path / "trials").iterdir())) == 1
