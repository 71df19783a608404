"""Wrong values of a model's options are told before data are read, each with its key; right ones are not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import TinyTokens

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.models import build_model, causal_lm
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.sweep import sweep


class Unread(TinyTokens):
    """Data that a refused run must not read."""

    def setup(self) -> None:
        raise AssertionError("the data were read")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text('data: {name: "runs.test_model_values:Unread"}\nmodel: {d_model: 64}\n')
    return path


def of(mixer: str, **options: object) -> list[str]:
    return [f"--model.mixer.name={mixer}", *(f"--model.mixer.{key}={value}" for key, value in options.items())]


WRONG = [
    (of("mamba", d_state=-3), "model.mixer.d_state: mamba: d_state must be positive, not -3. Its default is 16."),
    (of("mamba", d_conv=0), "model.mixer.d_conv: mamba: d_conv must be positive, not 0. Its default is 4."),
    (of("mamba", expand=0), "model.mixer.expand: mamba: expand must be positive, not 0. Its default is 2."),
    (of("mamba", dt_max=1e-4), "model.mixer.dt_max: dt_min must be above 0 and at most dt_max"),
    (of("mamba2", head_dim=48), "model.mixer.head_dim: mamba2: head_dim 48 does not divide expand * d_model = 128."),
    (of("mamba2", chunk_size=0), "model.mixer.chunk_size: mamba2: chunk_size must be positive, not 0. Its default is"),
    (of("attention", n_heads=7), "model.mixer.n_heads: attention: d_model 64 is not divisible by n_heads 7; take"),
    (of("linear_attention", n_heads=7), "model.mixer.n_heads: linear_attention: n_heads 7 does not divide d_model 64."),
    ([*of("retention"), "--model.d_model=66"], "model.d_model: retention: n_heads 4 does not divide d_model 66."),
    (of("s5", d_state=6), "model.mixer.d_state: s5: blocks must divide d_state, and 4 does not divide 6. Its default"),
    (of("hyena", l_max=1), "model.mixer.l_max: hyena: l_max must be at least 2, not 1. Its default is 1024."),
    (of("hyena", short_conv=0), "model.mixer.short_conv: hyena: short_conv must be positive, not 0."),
    (of("h3", shift_width=-1), "model.mixer.shift_width: h3: shift_width must be positive, not -1."),
    (of("mlp", hidden=-1), "model.mixer.hidden: mlp: hidden must be positive, not -1."),
    (of("mlp", hidden=8, expand=2), "mlp: expand 2 takes the place of hidden 8. Leave one of them out."),
    (["--model.backbone.n_layers=0"], "model.backbone.n_layers: n_layers must be at least 1, not 0. Its default is 4."),
    (
        ["--model.backbone.pattern=[mamba, attention]", "--model.mixers.attention.n_heads=5"],
        "model.mixers.attention.n_heads: attention: d_model 64 is not divisible by n_heads 5;",
    ),
    (["--model.backbone.pattern=[mamba, mambo]"], "model.backbone.pattern: no mixer is named 'mambo'. Did you mean"),
    (of("mamba", lti="maybe"), "model.mixer.lti"),
    (["--model.backbone.name=unet", "--model.backbone.pool=[1]"], "model.backbone.pool: pool must be a list of"),
    (["--model.encoder.name=dna/kmer", "--model.encoder.k=0"], "model.encoder.k"),
    (["--model.d_model=2000000"], "asks for"),
]


@pytest.mark.parametrize(("words", "told"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_wrong_value_is_told_with_its_key_before_data_are_read(config: Path, words, told: str, capsys) -> None:
    assert main(["fit", "--config", str(config), "--out", "run", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert not Path("run").exists()


def test_a_right_value_lets_the_data_be_read(config: Path) -> None:
    with pytest.raises(AssertionError, match="the data were read"):
        main(["fit", "--config", str(config), "--out", "run", "--model.mixer.d_state=3"])


def test_a_part_that_needs_what_the_data_give_is_left_to_them(config: Path) -> None:
    """Its other options may depend on that."""
    weights = ["--model.head.name=classification", "--model.head.class_weights=[1, 2, 3]"]
    with pytest.raises(AssertionError, match="the data were read"):
        main(["fit", "--config", str(config), "--out", "run", *weights])


def test_a_sweep_is_told_before_its_data_are_read(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"of a trial with .*d_state.*: model\.mixer\.d_state: mamba: d_state must"):
        sweep({"config": str(config), "grid": {"model.mixer.d_state": [4, -3]}}, out="sweep")


def test_models_made_in_python_are_told_the_same() -> None:
    with pytest.raises(ConfigError, match=r"^model\.mixer\.d_state: mamba: d_state must be positive, not -3"):
        causal_lm(7, 64, 2, d_state=-3)
    spec = causal_lm(7, 16, 1).spec
    assert spec is not None
    with pytest.raises(ConfigError, match=r"^model\.backbone\.dropout: dropout must be"):
        build_model({**spec, "backbone": {"name": "residual", "dropout": 2.0}})


def test_no_random_number_is_drawn(config: Path) -> None:
    states = torch.get_rng_state(), random.getstate()
    parse_config(str(config), of("mamba2")).check_model()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
