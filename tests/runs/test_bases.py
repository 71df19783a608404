"""Configurations that lie over others."""

from __future__ import annotations

import dataclasses
import wave
from pathlib import Path

import pytest
import yaml

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.runs import naming
from mambaseq.runs.config import SECTIONS
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.settings import read_settings
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq.tasks.task import LengthWarmup

WHOLE = """
seed: 3
metrics: [token_accuracy, perplexity]
data: {name: "tiny:TinyTokens", size: 8}
model:
  d_model: 8
  backbone: {name: residual, n_layers: 3, pattern: [inside, s4d]}
  mixer: {name: mamba, d_state: 4, d_conv: 3}
  mixers: {inside: {name: mamba, d_state: 5}, s4d: {d_state: 6}}
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, callbacks: [{class_path: a}, {class_path: b}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "whole.yaml").write_text(WHOLE)
    return tmp_path


def over(folder: Path, text: str, name: str = "over.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_sections_are_laid_over_setting_by_setting_and_other_values_whole(folder: Path) -> None:
    path = over(
        folder,
        "base: whole.yaml\n"
        "metrics: [perplexity]\n"
        "model: {backbone: {n_layers: 5}, mixer: {d_state: 7}, mixers: {inside: {d_conv: 2}}}\n"
        "trainer: {max_steps: 9, callbacks: [{class_path: c}]}\n"
        "loader: {batch_size: 2}\n",
    )
    expected = yaml.safe_load(WHOLE)
    expected["metrics"] = ["perplexity"]
    expected["model"]["backbone"]["n_layers"] = 5
    expected["model"]["mixer"]["d_state"] = 7
    expected["model"]["mixers"]["inside"]["d_conv"] = 2
    expected["trainer"] |= {"max_steps": 9, "callbacks": [{"class_path": "c"}]}
    expected["loader"] = {"batch_size": 2}
    assert read_settings(path) == expected
    assert yaml.safe_load((folder / "whole.yaml").read_text()) == yaml.safe_load(WHOLE)


def test_a_part_of_another_name_begins_anew(folder: Path) -> None:
    path = over(
        folder,
        "base: whole.yaml\n"
        "data: {name: other, length: 3}\n"
        "model: {mixer: {name: s4d, d_conv: 2}, mixers: {inside: {name: s4}, s4d: {name: s4d, init: inv}}}\n",
    )
    settings = read_settings(path)
    assert settings["data"] == {"name": "other", "length": 3}
    assert settings["model"]["mixer"] == {"name": "s4d", "d_conv": 2}
    assert settings["model"]["mixers"] == {
        "inside": {"name": "s4"},
        "s4d": {"name": "s4d", "d_state": 6, "init": "inv"},
    }
    assert settings["model"]["backbone"]["n_layers"] == 3
    (folder / "short.yaml").write_text("model: {mixer: {d_state: 4}}\n")  # whose mixer is mamba
    again = over(folder, "base: short.yaml\nmodel: {mixer: {name: mamba, d_conv: 2}}\n")
    assert read_settings(again)["model"]["mixer"] == {"d_state": 4, "name": "mamba", "d_conv": 2}


def test_an_optimizer_of_another_name_begins_anew(folder: Path) -> None:
    over(folder, "optimizer: {lr: 3.0e-3, beta1: 0.8, beta2: 0.99}\n", "rates.yaml")  # of adamw, which is not named
    path = over(folder, "base: [whole.yaml, rates.yaml]\noptimizer: {name: muon, lr: 0.02}\n")
    assert read_settings(path)["optimizer"] == {"name": "muon", "lr": 0.02}
    over(folder, "optimizer: {name: adamw, lr: 0.02}\n", "same.yaml")
    path = over(folder, "base: [rates.yaml, same.yaml]\n")
    assert read_settings(path)["optimizer"] == {"name": "adamw", "lr": 0.02, "beta1": 0.8, "beta2": 0.99}
    path = over(folder, "base: text/pile\noptimizer: {name: muon}\n")
    assert parse_config(str(path), []).settings["optimizer"] == dataclasses.asdict(OptimizerConfig("muon"))


def test_defaults_and_names_of_sections_are_those_of_their_classes() -> None:
    """Of what is laid over without a look at the classes."""
    assert naming._DEFAULTS["optimizer"] == OptimizerConfig().name
    named = [key for key, kind in SECTIONS.items() if any(field.name == "name" for field in dataclasses.fields(kind))]
    assert [key for key in SECTIONS if naming._PART.fullmatch(key)] == named == ["optimizer"]


def test_options_of_another_tokenizer_are_left(folder: Path) -> None:
    over(folder, "data: {name: text/documents, tokenizer: text/hf, tokenizer_options: {path: a}}\n", "short.yaml")
    for text, options in (
        ("{tokenizer: text/bytes}", {}),
        ("{tokenizer: text/hf}", {"tokenizer_options": {"path": "a"}}),
        ("{tokenizer: text/bpe, tokenizer_options: {path: b}}", {"tokenizer_options": {"path": "b"}}),
        ("{tokenizer_options: {path: b}, tokenizer: text/bpe}", {"tokenizer_options": {"path": "b"}}),
    ):
        read = read_settings(over(folder, f"base: short.yaml\ndata: {text}\n"))["data"]
        assert {key: value for key, value in read.items() if key == "tokenizer_options"} == options, text


def test_null_takes_a_section_of_a_base_away(folder: Path) -> None:
    over(folder, "length_warmup: {start: 8, steps: 2}\nloader: {batch_size: 2}\n", "warm.yaml")
    path = over(
        folder,
        "base: [whole.yaml, warm.yaml]\n"
        "length_warmup: null\ntrainer:\n"
        "model: {mixer: null, mixers: {inside: null}, backbone: {pattern: [mamba, s4d]}}\n",
    )
    expected = yaml.safe_load(WHOLE) | {"loader": {"batch_size": 2}}
    del expected["trainer"], expected["model"]["mixer"], expected["model"]["mixers"]["inside"]
    expected["model"]["backbone"]["pattern"] = ["mamba", "s4d"]
    assert read_settings(path) == expected
    run = parse_config(str(path), [])
    assert run.settings["length_warmup"] == dataclasses.asdict(LengthWarmup())
    assert run.settings["model"]["mixer"]["name"] == "mamba"
    naming.check_names(["--trainer.max_steps=1"], "mambaseq fit", [], str(path))
    settings = read_settings(over(folder, "base: whole.yaml\nmodel: {backbone: {pattern: null}}\n", "value.yaml"))
    assert settings["model"]["backbone"]["pattern"] is None  # of a setting it is a value
    over(folder, "base: over.yaml\nlength_warmup: {steps: 3}\n", "again.yaml")
    assert read_settings(folder / "again.yaml")["length_warmup"] == {"steps": 3}
    path = over(folder, "model: null\n", "without.yaml")
    assert "model" not in read_settings(over(folder, "base: [whole.yaml, without.yaml]\n"))
    over(folder, "data: null\n", "without.yaml")
    with pytest.raises(ConfigError, match=r"needs data\.name"):
        parse_config(str(over(folder, "base: [whole.yaml, without.yaml]\n")), [])


def test_a_section_with_nothing_under_it_is_empty(folder: Path) -> None:
    """All lines of it may be commented out."""
    blank = over(
        folder, "data: {name: tiny:TinyTokens}\ntrainer:\n  # max_steps: 3\nlength_warmup:\nmodel:\n", "blank.yaml"
    )
    assert read_settings(blank) == {"data": {"name": "tiny:TinyTokens"}}
    naming.check_names(["--trainer.max_steps=1"], "mambaseq fit", [], str(blank))
    assert (
        read_settings(over(folder, "base: [blank.yaml, whole.yaml]\n"))["trainer"] == yaml.safe_load(WHOLE)["trainer"]
    )
    assert read_settings(over(folder, "base: whole.yaml\nlength_warmup:\n")) == yaml.safe_load(WHOLE)


def test_later_bases_lie_over_earlier_ones(folder: Path) -> None:
    over(folder, "base: ../whole.yaml\nseed: 4\nloader: {batch_size: 3}\n", "parts/one.yaml")
    over(folder, "seed: 5\noptimizer: {lr: 1.0e-2}\n", "parts/other.yaml")
    path = over(folder, "base: [parts/one.yaml, parts/other.yaml]\nloader: {num_workers: 1}\n")
    settings = read_settings(path)
    assert (settings["seed"], settings["loader"]) == (5, {"batch_size": 3, "num_workers": 1})
    assert read_settings(over(folder, "base: [parts/other.yaml, parts/one.yaml]\n"))["seed"] == 4
    (folder / "whole.yaml").write_text("data: {name: x}\nseed: 6\n")
    assert read_settings(over(folder, "base: [parts/one.yaml, whole.yaml]\n"))["seed"] == 6


def test_registered_and_shipped_files_are_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = over(tmp_path, "base: text/demo\nmodel: {d_model: 32}\n")
    run, demo = parse_config(str(path), []), parse_config("text/demo", [])
    assert run.settings["model"].pop("d_model") == 32 != demo.settings["model"].pop("d_model")
    assert run.settings == demo.settings
    over(tmp_path, "base: mambaseq:configs/text/demo.yaml\nmodel: {d_model: 32}\n")
    assert parse_config(str(path), []).yaml == run.yaml
    assert "base" not in yaml.safe_load(run.yaml)
    monkeypatch.chdir(tmp_path)  # nothing depends on where one stands
    (tmp_path / "deep").mkdir()
    with pytest.raises(ConfigError, match=r"deep/of\.yaml: base: .* 'over\.yaml', and no such file is beside it\. `"):
        read_settings(over(tmp_path, "base: over.yaml\n", "deep/of.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: text/dem\n", r"over\.yaml: base: no configuration is named 'text/dem'.*Did you mean 'text/demo'"),
        ("base: mambaseq:configs/none.yaml\n", r"over\.yaml: base: The resource .* does not exist"),
        ("base: {name: whole.yaml}\n", r"over\.yaml: base must name a configuration or a YAML file"),
        ("base: [whole.yaml, 3]\n", r"over\.yaml: base must name"),
        ("base:\n", r"over\.yaml: base must name"),
        ("base: over.yaml\n", r"over\.yaml is a base of itself"),
        ("base: back.yaml\n", r"over\.yaml is a base of itself"),
        ("base: whole.yaml\nmodel: {head: null}\n", r"over\.yaml: model\.head must hold settings"),
        ("base: whole.yaml\nmodel: {mixers: {other: null}}\n", r"over\.yaml: model\.mixers\.other must hold settings"),
        ("base: wrong.yaml\n", r"wrong\.yaml: model must hold settings"),
        ("base: unknown.yaml\n", r"unknown\.yaml: there is no key 'bases'\. Did you mean 'base'\?"),
        ("base: text.yaml\n", r"text\.yaml, line 2, is not valid YAML"),
        ("base: bomb9.yaml\n", r"more than 100 files below it"),
        ("base: chain0.yaml\n", r"more than 100 files below it"),
    ],
)
def test_mistakes_name_their_file(folder: Path, text: str, message: str) -> None:
    over(folder, "base: over.yaml\n", "back.yaml")
    over(folder, "model: 3\n", "wrong.yaml")
    over(folder, "bases: whole.yaml\n", "unknown.yaml")
    over(folder, "a: [1\n", "text.yaml")
    for n in range(10):
        over(folder, f"base: [bomb{n - 1}.yaml, bomb{n - 1}.yaml]\n" if n else "seed: 1\n", f"bomb{n}.yaml")
    for n in range(120):
        over(folder, f"base: chain{n + 1}.yaml\n", f"chain{n}.yaml")
    with pytest.raises(ConfigError, match=message):
        read_settings(over(folder, text))


def test_a_run_lies_over_another_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over(tmp_path, "model: {d_model: 8, mixer: {d_state: 4}, backbone: {n_layers: 1}}\n", "small.yaml")
    data = 'data: {name: "tiny:TinyTokens", size: 8}\n'
    trainer = "trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false}\n"
    path = over(tmp_path, f"base: small.yaml\n{data}{trainer}")
    run = tmp_path / "run"
    assert main(["fit", "--config", str(path), "--out", str(run), "--model.mixer.d_conv=2"]) == 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["mixer"].items() >= {"d_state": 4, "d_conv": 2}.items()
    (tmp_path / "small.yaml").unlink()  # a run is whole by itself
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=3"]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", str(path), "--out", str(tmp_path / "other")]) == 2
    assert "over.yaml: base: no configuration is named 'small.yaml'" in capsys.readouterr().err


def test_keys_are_told_by_the_names_of_bases_and_with_the_file_that_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = over(tmp_path, "base: [audio/sc09, part.yaml]\n")
    over(tmp_path, "model: {mixer: {dt_rank: 2}}\n", "part.yaml")
    assert main(["fit", "--config", str(path), "--model.backbone.pol=[4]"]) == 2
    assert "Did you mean '--model.backbone.pool'" in capsys.readouterr().err
    over(tmp_path, "model: {backbone: {teirs: [[mamba]]}}\n", "part.yaml")
    assert main(["fit", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'part.yaml'}: there is no key 'model.backbone.teirs'. Did you mean" in told
    over(tmp_path, "base: [audio/sc09, part.yaml]\nmodel: {backbone: {teirs: [[mamba]]}}\n")
    assert main(["fit", "--config", str(path)]) == 2
    assert f"{path}: there is no key 'model.backbone.teirs'" in capsys.readouterr().err


def sounds(folder: Path) -> None:
    (folder / "sc09" / "a").mkdir(parents=True)
    for number in range(4):
        with wave.open(str(folder / "sc09" / "a" / f"hi_{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(number + 1 for _ in range(2000)))


FILES = "  files: sc09/*/*.wav\n"
OTHERS = "  pattern: ^(?P<tone>hi)_\n  condition: [tone]\n  sample_rate: 8000\n  test_list: null\n"


@pytest.mark.parametrize("command", ["fit --out run", "data audit"])
@pytest.mark.parametrize(
    ("own", "words", "told", "sets"),
    [
        (
            f"{FILES}{OTHERS}  validation_list: null\n",
            "",
            "data.split is 'clip', but neither data.validation",
            "audio/sc09 sets data.split; set it to null to leave it out.",
        ),
        (
            FILES,
            "",
            "data.validation_list: There is no data file 'sc09/validation_list.txt'",
            "audio/sc09 sets data.validation_list; set it to null to leave it out.",
        ),
        (f"{FILES}  validation_list: own.txt\n", "", "data.validation_list: There is no data file 'own.txt'", ""),
        (FILES, "--data.validation_list=own.txt", "data.validation_list: There is no data file 'own.txt'", ""),
        (
            "",
            "text/chat --data.files mine.txt --data.validation_files null",
            "data.tokenizer_options.path: There is no tokenizer file runs/mamba-130m/model/tokenizer.json. Give the "
            "path of a model's tokenizer.json; `mambaseq import --checkpoint NAME --out RUN` writes",
            "text/chat sets data.tokenizer_options.path; set it to a value of your own.",
        ),
        (
            "",
            "text/chat --data.files mine.txt --data.validation_files null --data.tokenizer_options.path none.json",
            "data.tokenizer_options.path: There is no tokenizer file none.json.",
            "",
        ),
        (
            "",
            "text/pile --data.files mine.txt --data.validation_files null --data.test_files null",
            "data.tokenizer_options.path: hub:openai-community/gpt2: tokenizer.json of 'openai-community/gpt2' ",
            "text/pile sets data.tokenizer_options.path; set it to a value of your own.",
        ),
    ],
)
def test_refusals_say_which_configuration_sets_a_key_that_is_not_the_users(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    own: str,
    words: str,
    told: str,
    sets: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sounds(tmp_path)
    (tmp_path / "mine.txt").write_text("a text\n")
    over(tmp_path, f"base: audio/sc09\ndata:\n{own}")
    given = words.split() if words.startswith("text") else ["over.yaml", *words.split()]
    given = ["--config", *given] if command.startswith("fit") else given
    assert main([*command.split(), *given]) == 2
    error = capsys.readouterr().err
    assert f": {told}" in error
    assert error.endswith(f" {sets}\n") if sets else " sets " not in error
