"""Nothing that a file names is imported or called, whatever key names it and whatever command reads it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.models import build_model
from mambaseq.registry import allow_imports


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """In place of the fixture of this name for all tests: here nothing is allowed."""
    with allow_imports():
        yield


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once the module `evil_names` is imported, or anything of it called; it must not be."""
    path = tmp_path / "touched"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_names.py").write_text(
        f"import pathlib\npathlib.Path({str(path)!r}).touch()\ndef call(*a, **k): pathlib.Path({str(path)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists()
    assert "evil_names" not in sys.modules


# what was there before, what was not, and what others' modules hand on
PATHS = (
    "evil_names:call",
    "os:system",
    "subprocess:Popen",
    "timeit:timeit",
    "builtins:exec",
    "pickle:loads",
    "mambaseq.atomic:os",
    "mambaseq.cli.main:importlib",
)
SPEC: dict[str, Any] = {
    "d_model": 8,
    "encoder": {"name": "tokens", "vocab_size": 256},
    "backbone": {"name": "residual", "n_layers": 1},
    "mixer": {"name": "mamba"},
    "head": {"name": "lm", "vocab_size": 256},
}
CARD: dict[str, Any] = {
    "tokenizer": {"name": "text/bytes", "options": {}},
    "reader": "text/text",
    "writer": "text/text",
    "reader_options": {"field": "text"},
    "length": 8,
}
IN_MODEL = (
    ("spec", "encoder", "name"),
    ("spec", "backbone", "name"),
    ("spec", "backbone", "pattern", 0),
    ("spec", "mixer", "name"),
    ("spec", "head", "name"),
    ("tokenizer", "name"),
    ("reader",),
    ("writer",),
)


def put(values: Any, keys: tuple, value: Any) -> Any:
    """The values with another one at the end of these keys."""
    values = copy.deepcopy(values)
    inner = values
    for key, following in itertools.pairwise(keys):
        inner = inner.setdefault(key, [] if following == 0 else {})
    inner.append(value) if isinstance(inner, list) else inner.__setitem__(keys[-1], value)
    return values


def refused(arguments: list[str], capsys: pytest.CaptureFixture, said: str) -> None:
    assert main(arguments) == 2, arguments
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error, error
    assert len(error) < 1000


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_model(folder, build_model(SPEC), ModelCard(spec=SPEC, **CARD))
    return folder


@pytest.mark.parametrize("keys", IN_MODEL, ids=lambda keys: ".".join(map(str, keys)))
def test_model_json_names_nothing_but_what_is_registered(
    keys: tuple, exported: Path, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    description = json.loads((exported / "model.json").read_text())
    model = tmp_path / "m"
    model.mkdir()
    (model / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    (tmp_path / "in.txt").write_text("some text")
    predict = ["predict", "--checkpoint", str(model), "in.txt", "--out", "out.csv", "--device", "cpu"]
    generate = ["generate", "--checkpoint", str(model), "--prompt", "in.txt", "--out", "out.txt", "--device", "cpu"]
    commands = {("reader",): [predict, generate], ("writer",): [generate]}.get(keys, [predict, generate])
    for path, command in itertools.product(PATHS, commands):
        (model / "model.json").write_text(json.dumps(put(description, keys, path)))
        refused(command, capsys, "--allow-import")
    if keys[0] == "spec":  # what once ran a command
        ran = put(put(description, ("spec", "mixer", "name"), "os:system"), ("spec", "d_model"), f"touch {sentinel}")
        (model / "model.json").write_text(json.dumps(ran))
        for command in commands:
            refused(command, capsys, "d_model")


DATA: dict[str, Any] = {"name": "synthetic/induction_heads"}
IN_CONFIG = (
    ("data", "name"),
    ("metrics", 0),
    ("model", "encoder", "name"),
    ("model", "backbone", "name"),
    ("model", "backbone", "pattern", 0),
    ("model", "mixer", "name"),
    ("model", "head", "name"),
)
TRAINER = ("callbacks", "logger", "plugins", "strategy", "profiler", "accelerator")


def commands_of(run: Path, config: dict[str, Any]) -> list[list[str]]:
    """What reads a run's configuration: each of them reads it before anything else of the run."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = str(run.parent / "other")
    return [
        ["fit", "--config", str(run / "config.yaml"), "--out", out],
        ["fit", "--resume", str(run)],
        ["test", "--checkpoint", str(run)],
        ["validate", "--checkpoint", str(run)],
    ]


@pytest.mark.parametrize("keys", IN_CONFIG, ids=lambda keys: ".".join(map(str, keys)))
def test_a_configuration_names_nothing_but_what_is_registered(
    keys: tuple, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, path in enumerate(PATHS[:2] if keys[0] == "metrics" else PATHS):
        commands = commands_of(tmp_path / "run", put({"data": DATA}, keys, path))
        for command in commands if number == 0 else commands[:1]:
            refused(command, capsys, "--allow-import")


def by_path(path: str) -> Any:
    return path


def by_class_path(path: str) -> Any:
    return {"class_path": path}


def in_a_list(path: str) -> Any:
    return [{"class_path": path, "init_args": {"cmd": "x"}}]


def inside(path: str) -> Any:
    return {"class_path": "EarlyStopping", "init_args": {"monitor": {"class_path": path}}}


def as_a_function(path: str) -> Any:
    return {"class_path": "LambdaCallback", "init_args": {"on_fit_start": path}}


FORMS = [(key, form) for key in TRAINER for form in (by_path, by_class_path, in_a_list)]


@pytest.mark.parametrize(("key", "form"), [*FORMS, ("callbacks", inside), ("callbacks", as_a_function)])
def test_trainer_names_lightnings_own_classes_only(
    key: str, form: Any, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = ("evil_names.call", "os.system", "subprocess.Popen", "evil_names:call")[TRAINER.index(key) % 4]
    commands = commands_of(tmp_path / "run", put({"data": DATA}, ("trainer", key), form(path)))
    for command in commands if key == "callbacks" else commands[:1]:
        refused(command, capsys, f"trainer.{key}")
    commands_of(tmp_path / "run", {"data": DATA})
    value = form(path)
    text = value if isinstance(value, str) else json.dumps(value)
    refused(["fit", "--resume", str(tmp_path / "run"), f"--trainer.{key}={text}"], capsys, f"trainer.{key}")


SHORTHANDS = {
    "loader: evil_names.call": "loader must hold settings",
    "optimizer: {class_path: evil_names.call}": "optimizer.class_path",
    "optimizer: {lr: '{class_path: evil_names.call}'}": "optimizer.lr",
    "trainer: {max_steps: {class_path: evil_names.call}}": "trainer.max_steps.class_path",
    "trainer: other.yaml": "trainer must hold settings",
    "model: other.yaml": "model must hold settings",
    "model: {mixer: evil_names.call}": "model.mixer must hold settings",
    "config: other.yaml": "no key 'config'",
}


@pytest.mark.parametrize("text", SHORTHANDS)
def test_no_other_file_or_class_is_read_for_a_value(
    text: str, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other.yaml").write_text("callbacks: {class_path: evil_names.call}\n")
    (tmp_path / "c.yaml").write_text(f"data: {{name: synthetic/induction_heads}}\n{text}\n")
    refused(["fit", "--config", "c.yaml", "--out", "o"], capsys, SHORTHANDS[text])


@pytest.mark.parametrize(
    "option",
    [
        "--loader=evil_names.call",
        "--trainer=other.yaml",
        "--model.mixer=evil_names.call",
        "--optimizer.lr={class_path: evil_names.call}",
        "--trainer.callbacks.help=evil_names.call",
        "--trainer.callbacks.class_path=evil_names.call",
        "--trainer.callbacks+=evil_names.call",
        "--config=other.yaml",
    ],
)
def test_no_option_imports_unasked(option: str, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.yaml").write_text("trainer: {callbacks: {class_path: evil_names.call}}\n")
    commands_of(tmp_path / "run", {"data": DATA})
    refused(["test", "--checkpoint", "run", option], capsys, option[2:].partition("=")[0].partition("+")[0])


def test_the_environment_imports_nothing(
    sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("MAMBASEQ_FIT_TRAINER__CALLBACKS", "evil_names.call")
    monkeypatch.setenv("MAMBASEQ_FIT_LOADER", "evil_names.call")
    commands_of(tmp_path / "run", {"data": DATA})
    main(["test", "--checkpoint", "run"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints_are_not_unpickled(sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (exec, (f"import evil_names; open({str(sentinel)!r}, 'w')",))

    commands_of(tmp_path / "run", {"data": DATA})
    save_model(tmp_path / "run" / "model", None, ModelCard(spec=SPEC, **CARD))
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    (tmp_path / "in.txt").write_text("some words of a text\n" * 50)
    for command in (
        ["predict", "--checkpoint", "run", "in.txt", "--out", "o.csv"],
        ["test", "--checkpoint", "run"],
        ["fit", "--resume", "run"],
    ):
        refused(command, capsys, "last.ckpt cannot be read")


ALLOWED = """
import lightning
class Counts(lightning.Callback):
    def __init__(self, start: int = 0) -> None:
        self.start = start
def call(*a, **k): raise SystemExit(3)
"""


def test_what_is_allowed_is_made_if_it_is_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "allowed_names.py").write_text(ALLOWED)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"name": "allowed_names:call"}}))
    refused(["fit", "--config", str(tmp_path / "c.yaml"), "--allow-import", "allowed_names"], capsys, "is not a mamba")
    from mambaseq.runs.parsing import parse_config

    (tmp_path / "c.yaml").write_text("data: {name: synthetic/induction_heads}\n")
    config = str(tmp_path / "c.yaml")
    with allow_imports("allowed_names"):
        value = '{"class_path": "allowed_names.Counts", "init_args": {"start": 3}}'
        made = parse_config(config, [f"--trainer.callbacks={value}"]).trainer["callbacks"]
        assert (type(made).__name__, made.start) == ("Counts", 3)
        with pytest.raises(Exception, match=r"trainer\.callbacks.*is not a lightning\.pytorch\.callbacks\.Callback"):
            parse_config(config, ["--trainer.callbacks=allowed_names.call"])
    own = '[{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}, "Timer"]'
    made = parse_config(config, [f"--trainer.callbacks={own}", "--trainer.profiler=simple"]).trainer
    assert [type(callback).__name__ for callback in made["callbacks"]] == ["EarlyStopping", "Timer"]
    assert made["profiler"] == "simple"
    arguments = '{"monitor": "a", "patience": "many"}'
    with pytest.raises(Exception, match=r"trainer\.callbacks\.init_args\.patience cannot be 'many'"):
        parse_config(config, [f'--trainer.callbacks={{"class_path": "EarlyStopping", "init_args": {arguments}}}'])


WITH_CODE = """
from collections.abc import Callable
from typing import Any
from mambaseq.mixers.s4d import S4D
from tiny import TinyTokens

class Data(TinyTokens):
    def __init__(self, size: int = 8, f: Callable = len, k: type = int, c: S4D | None = None, a: Any = None,
                 either: int | Callable = 3) -> None:
        super().__init__(size)
"""
CODE = (
    "os.system",
    "subprocess.Popen",
    "evil_names.call",
    {"class_path": "os.system"},
    {"class_path": "evil_names.call", "init_args": {}},
    '{"cl\\u0061ss_path": "evil_names.call"}',
)


@pytest.mark.parametrize("argument", ["f", "k", "c", "a", "either"])
def test_arguments_of_a_part_are_no_code(
    argument: str, sentinel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "with_code.py").write_text(WITH_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("with_code", None)
    from mambaseq.runs.parsing import parse_config

    data = {"name": "with_code:Data"}
    with allow_imports("with_code", "tiny"):
        for value in CODE:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {**data, argument: value}}))
            (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"data": data}))
            text = value if isinstance(value, str) else json.dumps(value)
            for config, overrides in (("c.yaml", []), ("plain.yaml", [f"--data.{argument}={text}"])):
                if argument == "a" and isinstance(value, str):  # text is a plain value
                    with contextlib.suppress(ConfigError):
                        parse_config(config, overrides)
                    continue
                with pytest.raises(ConfigError, match=rf"data\.{argument}\b"):
                    parse_config(config, overrides)
        assert parse_config("plain.yaml", ["--data.either=4", "--data.size=2"]).settings["data"]["either"] == 4


def test_shipped_parts_take_no_code() -> None:
    from mambaseq.runs.naming import PROVIDED
    from mambaseq.runs.parser import code_arguments

    for kind in ("datasets", "encoders", "backbones", "mixers", "heads"):
        for entry in catalog()[kind]:
            part = entry.load()
            skip = PROVIDED & set(inspect.signature(part).parameters)
            assert not code_arguments(part, "part", frozenset(skip)), entry.name
