"""Configurations: checked, suggested, overridable, saved so that they read back."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from tiny import TinyTokens

from mambaseq.batch import Batch
from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError
from mambaseq.metrics.likelihood import TokenAccuracy
from mambaseq.mixers.s4d import S4D
from mambaseq.models import build_model
from mambaseq.runs import parser, parsing
from mambaseq.runs.parsing import parse_config
from mambaseq.tasks.optimizer import OptimizerConfig

BASE = 'data: {name: "tiny:TinyTokens", size: 8}\nmodel: {d_model: 8, mixer: {name: mamba, d_state: 4}}\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    return path


def test_overrides_win_and_types_are_checked(config: Path) -> None:
    run = parse_config(str(config), ["--model.mixer.d_state", "2", "--trainer.max_steps=7", "--seed", "3"])
    assert run.settings["model"]["mixer"]["d_state"] == 2
    assert run.settings["data"]["size"] == 8
    assert run.settings["seed"] == 3
    assert run.trainer["max_steps"] == 7
    with pytest.raises(ConfigError, match=r"data\.size"):
        parse_config(str(config), ["--data.size", "many"])


def test_a_parser_that_is_kept_forgets_what_it_parsed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = parse_config(str(config), ["--seed=3", "--trainer.max_steps=7"])
    first.settings["metrics"].append("accuracy")
    with pytest.raises(ConfigError), contextlib.redirect_stdout(None):
        parse_config(str(config), ["--print_config", "--data.size=many"])
    again = parse_config(str(config), [])
    assert (again.settings["metrics"], again.settings["seed"], again.trainer["max_steps"]) == ([], 0, 1000)
    assert "metrics: []" in again.yaml
    assert parsing.explained(str(config), []) == parsing.explained(str(config), [])
    assert capsys.readouterr().out == ""


def test_a_name_on_the_command_line_changes_the_class(config: Path) -> None:
    config.write_text('data: {name: "tiny:TinyTokens"}\n')
    run = parse_config(str(config), ["--model.mixer.name", "s4d", "--model.mixer.init", "inv"])
    assert run.classes["mixer"].__name__ == "S4D"


def test_another_name_drops_the_settings_of_the_former_class(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = parse_config("dna/demo", ["--model.encoder.name", "tokens"])
    assert run.settings["model"]["encoder"] == {"name": "tokens", "condition_dropout": 0.0}
    assert parse_config("dna/demo", []).settings["model"]["encoder"]["k"] == 6
    config.write_text(BASE.replace("d_state: 4", "d_state: 4, d_conv: 3"))
    run = parse_config(str(config), ["--model.mixer.name=s4d", "--data.name=tiny:TinyValues"])
    assert run.settings["data"]["size"] == 8
    # states of one mixer are not those of another
    assert run.settings["model"]["mixer"]["d_state"] == inspect.signature(S4D).parameters["d_state"].default != 4
    note = "s4d has its own defaults; mamba's settings are dropped: d_conv 3, d_state 4."
    assert note in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no key 'model\.mixer\.d_conv'.*s4d has .*d_state.*\.name s4d"):
        parse_config(str(config), ["--model.mixer.name=s4d", "--model.mixer.d_conv=3"])


@pytest.mark.parametrize(
    ("written", "given", "expected", "note"),
    [
        ({"beta1": 0.8, "lr": 0.5}, ["name=muon"], {"name": "muon", "beta1": 0.8, "lr": 0.5}, ""),
        (
            {"name": "muon", "momentum": 0.8, "beta1": 0.7, "warmup_steps": 3},
            ["name=adamw"],
            {"name": "adamw", "beta1": 0.7, "warmup_steps": 3},
            "adamw is another optimizer; muon's settings are dropped: momentum 0.8.",
        ),
        ({"name": "muon", "momentum": 0.8}, ["name=muon"], {"name": "muon", "momentum": 0.8}, ""),
        ({"momentum": 0.95}, ["name=muon", "momentum=0.9"], {"name": "muon", "momentum": 0.9}, ""),
    ],
)
def test_another_optimizer_drops_what_was_for_the_former_one(
    written: dict, given: list[str], expected: dict, note: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Muon has the betas of AdamW as well; rates and the schedule are any optimizer's."""
    config.write_text(f"{BASE}\noptimizer: {json.dumps(written)}\n")
    run = parse_config(str(config), [f"--optimizer.{one}" for one in given])
    assert run.settings["optimizer"] == dataclasses.asdict(OptimizerConfig(**expected))
    assert capsys.readouterr().err == (f"{note}\n" if note else "")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["momentum=0.8"], r"optimizer\.momentum is 0\.8, which adamw does not use\. Leave it out, or choose muon "),
        (["options={beta: 0.9}"], r"optimizer\.options are for other optimizers than adamw and muon"),
    ],
)
def test_an_option_of_another_optimizer_is_refused_before_data_are_read(
    given: list[str], told: str, config: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config(str(config), [f"--optimizer.{one}" for one in given])


def test_options_of_a_mixer_that_the_pattern_does_not_have(config: Path) -> None:
    pattern = "--model.backbone.pattern=[s4d, attention]"
    assert parse_config(str(config), [pattern]).settings["model"]["mixers"].keys() == {"s4d", "attention", "mlp"}
    with pytest.raises(ConfigError, match=r"mixer\.d_state is an option of mamba, which .* does not name"):
        parse_config(str(config), [pattern, "--model.mixer.d_state=8"])


def test_a_mixer_under_a_name_of_its_own(config: Path) -> None:
    """Options of two variants of a mixer, in a file and by the command line, for the tiers of a unet."""
    config.write_text(
        'data: {name: "tiny:TinyTokens", size: 8}\nmodel:\n  d_model: 8\n'
        "  backbone: {name: unet, n_layers: 1, pool: [2, 2], tiers: [[mamba], [mamba], [inside+mlp]]}\n"
        "  mixers: {inside: {name: mamba, lti: true, d_state: 6}}\n"
    )
    run = parse_config(str(config), ["--model.mixers.inside.d_state=7", "--model.mixers.mlp.expand=2"])
    inside, mlp = (run.settings["model"]["mixers"][name] for name in ("inside", "mlp"))
    assert (inside["name"], inside["lti"], inside["d_state"], mlp["expand"]) == ("mamba", True, 7, 2)
    assert "name" not in mlp
    data = run.make_data()
    data.setup()
    mixers = build_model(run.model_spec(data)).backbone.mixers()
    assert [getattr(mixer, "lti", "mlp") for mixer in mixers] == [False, False, True, "mlp", False, False]
    other = parse_config(str(config), ["--model.mixers.inside.name=s4d"]).settings["model"]["mixers"]["inside"]
    assert other["name"] == "s4d"
    assert "lti" not in other
    assert other["d_state"] != 6  # an option of the same name means something else
    with pytest.raises(ConfigError, match=r"'inner'.*model\.backbone\.tiers|model\.backbone\.tiers.*'inner'"):
        parse_config(str(config), ["--model.backbone.tiers=[[mamba], [mamba], [inner]]"])
    with pytest.raises(ConfigError, match=r"model\.mixers\.inside\.name: no mixer is named 's44'"):
        parse_config(str(config), ["--model.mixers.inside.name=s44"])
    with pytest.raises(ConfigError, match=r"no key 'model\.mixers\.inside\.dstate'.*Did you mean"):
        parse_config(str(config), ["--model.mixers.inside.dstate=3"])


def test_the_seed_is_the_datas_too_unless_it_has_its_own(tmp_path: Path) -> None:
    assert parse_config("text/demo", []).settings["data"]["seed"] == 0
    run = parse_config("text/demo", ["--seed", "3"])
    assert run.settings["data"]["seed"] == 3
    assert parse_config("dna/demo", ["--seed=3"]).settings["data"]["seed"] == 3  # its class has it from another
    assert parse_config("text/demo", ["--seed=3", "--data.seed=0"]).settings["data"]["seed"] == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(run.yaml)
    assert parse_config(str(saved), ["--seed=5"]).settings["data"]["seed"] == 3
    with pytest.raises(ConfigError, match="seed"):
        parse_config("text/demo", ["--seed=many"])


def test_paths_are_saved_so_that_they_hold_from_another_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "corpus", "utf-8"):
        (tmp_path / name).write_text("words")
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/deep.md").write_text("words")
    files = ["a.txt", "corpus", "*.txt", "none.txt", "mambaseq:data/a.txt", "/elsewhere.txt", "**/*.md"]
    run = parse_config("text/demo", [f"--data.files={files}", "--data.encoding=utf-8"])
    here = str(tmp_path)
    expected = [f"{here}/a.txt", f"{here}/corpus", f"{here}/*.txt", "none.txt", "mambaseq:data/a.txt", "/elsewhere.txt"]
    expected.append(f"{here}/**/*.md")
    assert run.settings["data"]["files"] == expected == yaml.safe_load(run.yaml)["data"]["files"]
    assert run.settings["data"]["encoding"] == "utf-8"
    species = "{one: [a.txt], two: ['fetched:genome/a.fa']}"
    run = parse_config("dna/demo", [f"--data.species={species}", "--data.test_records=[a.txt]"])
    assert list(run.settings["data"]["test_records"]) == ["a.txt"]  # a name
    assert run.settings["data"]["species"] == {"one": [f"{here}/a.txt"], "two": ["fetched:genome/a.fa"]}


def test_printing_the_configuration_is_no_error(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "text/demo", "--print_config"])
    assert not ended.value.code
    printed = capsys.readouterr()
    assert "text" in yaml.safe_load(printed.out)["data"]["name"]
    assert printed.err == ""


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (BASE.replace("size", "sise"), [], r"no key 'data.sise'\. Did you mean 'data\.size'"),
        (BASE, ["--model.mixer.d_stat", "2"], r"no key 'model.mixer.d_stat'\. Did you mean 'model\.mixer\.d_state'"),
        (BASE + "optimiser: {lr: 1}\n", [], r"no key 'optimiser.*'\. Did you mean 'optimizer"),
        (BASE.replace("mamba,", "mambo,"), [], r"no mixer is named 'mambo'\. Did you mean 'mamba'"),
        (BASE + "trainer: {max_step: 3}\n", [], r"no key 'trainer\.max_step'\. Did you mean 'trainer\.max_steps'"),
        (BASE, ["--trainer.foo", "1"], r"no key 'trainer\.foo'\. `"),  # the step before is no likeness
        (BASE, ["--model.mixer.rc", "1"], r"no key 'model\.mixer\.rc'\. mamba has"),
        (BASE, ["--trainer.precision", "bf17"], r"must be one of 64, .*; it is 'bf17'\. Did you mean 'bf16'\?$"),
        (BASE, ["--trainer.max_epochs", "a"], r"max_epochs must be a whole number or null; it is 'a'\.$"),
        (BASE, ["--model.d_model", "null"], r"model\.d_model must be a whole number; it is null\.$"),
        (BASE, ["--model.d_model="], r"model\.d_model must be a whole number; it is null\.$"),
        (BASE, ["--trainer.max_steps", "1.5"], r"max_steps must be a whole number; it is 1\.5\.$"),
        (BASE, ["--trainer.max_steps", "'3'"], r"max_steps must be a whole number; it is '3'\.$"),
        (BASE, ["--optimizer.lr", "1e-3."], r"optimizer\.lr must be a finite number; it is '1e-3\.'\.$"),
        ("seed: 1\n", [], r"needs data\.name"),
        ("just text\n", [], r"c\.yaml holds one str instead of names"),
        ("a: [1\n", [], r"c\.yaml, line 2, is not valid YAML"),
    ],
)
def test_mistakes_are_named_with_a_suggestion(config: Path, text: str, overrides: list[str], message: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_config(str(config), overrides)


@pytest.mark.parametrize("option", ["--dtype", "--precision"])
def test_the_precision_of_a_run_is_found(config: Path, option: str, capsys) -> None:
    config.write_text(BASE)
    assert main(["fit", "--config", str(config), option, "bf16"]) == 2
    assert f"'{option}'. Did you mean '--trainer.precision'?" in capsys.readouterr().err


def test_unknown_configuration_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'dna/demo'"):
        parse_config("dna/dem", [])


def test_the_saved_configuration_reads_back_equal(config: Path, tmp_path: Path) -> None:
    run = parse_config(str(config), ["--trainer.callbacks", "null"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(run.yaml)
    again = parse_config(str(saved), [])
    assert again.settings == run.settings
    assert again.yaml == run.yaml


@pytest.mark.parametrize("name", [entry.name for entry in catalog()["configs"]])
def test_every_configuration_reads_back_as_it_was_run(name: str, tmp_path: Path) -> None:
    run = parse_config(name, ["--trainer.gradient_clip_val=null", "--trainer.limit_val_batches=3"])
    run.check_model()
    saved = tmp_path / "saved.yaml"
    saved.write_text(run.yaml)
    again = parse_config(str(saved), [])
    callbacks = [[type(of) for of in one.trainer["callbacks"] or []] for one in (run, again)]
    assert callbacks[0] == callbacks[1]
    same = {"callbacks": None}
    if not isinstance(run.trainer["strategy"], str):
        assert type(again.trainer["strategy"]) is type(run.trainer["strategy"])
        same["strategy"] = None
    assert {**again.trainer, **same} == {**run.trainer, **same}
    assert again.trainer["check_val_every_n_epoch"] is None
    assert again.trainer["gradient_clip_val"] is None
    assert again.yaml == run.yaml


def test_user_errors_exit_with_2_in_one_paragraph(config: Path, capsys) -> None:
    config.write_text(BASE.replace("size", "sise"))
    assert main(["fit", "--config", str(config), "--out", str(config.parent / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mambaseq fit: ")
    assert "\n" not in error
    assert not (config.parent / "run").exists()


REFUSED = {
    "--checkpoint.monitor=val/acuracy": r"Did you mean 'val/token_accuracy'",
    "--checkpoint.monitor=val/Undecided": r"does not say whether higher is better.*checkpoint\.mode",
    "--checkpoint.mode=most": r"checkpoint\.mode",
    "--checkpoint.every_n_steps=0": r"checkpoint\.every_n_steps must be",
    "--model.mixer.backend=refrence": r"no backend 'refrence'\. Did you mean 'reference'",
    "--model.mixer.backend=cuda": r"backend 'cuda' cannot run",
    "--model.mixers.attention.n_heads=2": r"'attention', which is not a mixer of this.*model\.backbone\.pattern",
    "--model.mixer.dt_rank=0": r"dt_rank must be positive",
    "--model.mixer.dt_min=0": r"dt_min must be above 0",
    "--model.backbone.dropout=2": r"dropout must be",
    "--trainer.val_check_interval=100": r"less than or equal to the number of the training batches",
    "--trainer.accelerator=gpu": r"finds no GPU here\. Add --trainer\.devices 1 --trainer\.accelerator cpu",
    "--trainer.accelerator=cuda --trainer.devices=4": r"is cuda \(trainer\.devices 4\), but PyTorch finds no GPU",
    "--trainer.accelerator=quantum": r"under trainer cannot be used here: .*quantum",
    "--trainer.strategy=nothing": r"there is no strategy 'nothing'",
    "--trainer.strategy=deepspeed": r"DeepSpeedStrategy writes checkpoints in a form of its own",
    "--trainer.devices=0": r"trainer\.devices is '0', but is how many to use \(--trainer\.devices 2\)",
    "--trainer.devices=many": r"trainer\.devices is 'many', but is how many to use \(--trainer\.devices 2\)",
    "--trainer.precision=7": r"trainer\.precision",
    "--trainer.max_steps=-2": r"trainer\.max_steps must be at least -1",
    "--trainer.enable_checkpointing=false": r"trainer.enable_checkpointing is False, but a run writes checkpoints",
    "--trainer.max_steps=-1 --trainer.max_time=00:00:01:00": r"'cosine' ends at the last step.*constant",
    "--optimizer.lr=-1": r"optimizer\.lr must not be negative",
    "--optimizer.beta2=1": r"optimizer\.beta2 must be",
    "--optimizer.min_lr_ratio=2": r"optimizer\.min_lr_ratio must be",
    "--optimizer.schedule=stairs": r"optimizer\.schedule",
    "--length_warmup.steps_per_stage=0": r"length_warmup\.steps_per_stage at least 1",
    "--loader.batch_size=0": r"loader\.batch_size must be at least 1",
    "--seed=-1": r"seed must be at least 0",
    "--model.encoder.name=dna/kmer": r"KmerEncoder gives one position for 3 inputs .*model\.encoder\.stride to 1",
    "--model.encoder.name=dna/kmer --model.encoder.stride=1": r"the next token, which the encoder 'dna/kmer' sees",
    "--data.name=runs.test_config:Labelled --model.head.name=regression": r"is 'regression', .* one label a sequence",
    "--data.name=tiny:TinyValues --model.head.name=regression": r"'token_accuracy' needs a label, .* one value a seq",
    "--data.name=runs.test_config:Labelled --model.head.name=lm": r"model\.head\.name is 'lm'.*'classification'",
    "--data.name=tiny:TinyValues --model.head.name=lm": r"model\.head\.name is 'lm'.*'regression'",
    "--model.head.name=regression": r"model\.head\.name is 'regression', but .* one label a position.*'lm'",
    "--out=/proc/run": r"/proc/run cannot be used.*--out",
}


class Labelled(TinyTokens):
    class_names = ("even", "odd")

    def train(self) -> list[Batch]:  # type: ignore[override]
        items = super().train()
        return [Batch(items[index].inputs, items[index].inputs[:, 0] % 2) for index in range(len(items))]


class Undecided(TokenAccuracy):
    higher_is_better = None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")
@pytest.mark.parametrize("options", REFUSED)
def test_settings_that_cannot_be_used_exit_with_2(config: Path, options: str, capsys) -> None:
    trainer = "trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false}"
    config.write_text(f'{BASE}{trainer}\nmetrics: [token_accuracy, "runs.test_config:Undecided"]\n')
    out = [] if options.startswith("--out") else ["--out", str(config.parent / "run")]
    assert main(["fit", "--config", str(config), *out, *options.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mambaseq fit: ")
    assert "\n" not in error
    assert re.search(REFUSED[options], error), error
    assert not (config.parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("metric", "mode", "expected"),
    [("loss", None, "min"), ("perplexity", None, "min"), ("token_accuracy", None, "max"), ("loss", "max", "max")],
)
def test_the_metric_says_which_weights_are_the_best(config: Path, metric: str, mode: str | None, expected: str) -> None:
    config.write_text(BASE + "metrics: [perplexity, token_accuracy]\n")
    chosen = [] if mode is None else [f"--checkpoint.mode={mode}"]
    run = parse_config(str(config), [f"--checkpoint.monitor=val/{metric}", *chosen])
    data = run.make_data()
    assert run.best(run.make_metrics(data)) == (f"val/{metric}", expected)


@pytest.mark.parametrize(
    "arguments",
    [["fitt"], ["list", "mixer"], ["fit"], ["test", "--checkpoint", "nowhere"], ["data", "info", "nothing-like-it"]],
)
def test_wrong_commands_exit_with_2(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("mambaseq")


@pytest.mark.parametrize("annotation", ["Union[float, int, None]", "Union[int, float, None]", "int | float | None"])
@pytest.mark.parametrize(("given", "read"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_a_number_of_batches_stays_whole(config: Path, monkeypatch, annotation: Any, given: str, read: Any) -> None:
    """1 batch is never all of them, whichever type comes first in the annotation."""
    init = inspect.unwrap(lightning.Trainer.__init__)
    monkeypatch.setitem(init.__annotations__, "limit_val_batches", annotation)
    monkeypatch.setattr(parser, "_kept_parser", parser._new_parser)
    run = parse_config(str(config), ["--trainer.limit_val_batches", given])
    again = yaml.safe_load(run.yaml)["trainer"]["limit_val_batches"]
    for value in (run.trainer["limit_val_batches"], again):
        assert (type(value), value) == (type(read), read)


def test_what_refuses_settings_of_data_names_their_key(config: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none - here.fa")
    run = parse_config(str(config), ["--data.name", "dna/genome", "--data.fasta", f"[{missing!r}]"])
    with pytest.raises(DataError, match=r"^data\.fasta: There is no data file"):
        run.make_data(setup=True)
    run = parse_config(str(config), ["--data.name", "runs.test_config:Refusing", "--data.amount", "7"])
    with pytest.raises(ConfigError, match=r"^data\.amount: the amount is odd\.$"):
        run.make_data()
    run = parse_config(str(config), ["--data.name", "runs.test_config:Refusing", "--data.amount", "8"])
    with pytest.raises(ConfigError, match=r"^data: no room is left\.$"):
        run.make_data(setup=True)


class Refusing(TinyTokens):
    def __init__(self, amount: int = 0) -> None:
        super().__init__()
        if amount % 2:
            raise ConfigError("the amount is odd.")

    def setup(self) -> None:
        raise ConfigError("no room is left.")
