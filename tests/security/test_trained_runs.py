"""A trained run whose files somebody changed: whatever command reads it, no name in them is looked up outside of the
registry, and no argument of any part is code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mambaseq
from mambaseq.cli.main import main
from mambaseq.errors import UserError
from mambaseq.models import build_model
from mambaseq.registry import allow_imports
from mambaseq.runs.parsing import parse_config

PATHS = ("os:system", "subprocess:Popen", "timeit:timeit")
CONFIG: dict[str, Any] = {
    "data": {"name": "text/corpus", "length": 16},
    "loader": {"batch_size": 2},
    "model": {
        "d_model": 8,
        "encoder": {"name": "tokens"},
        "backbone": {"name": "residual", "n_layers": 1},
        "mixer": {"name": "mamba"},
        "head": {"name": "lm"},
    },
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """In place of the fixture of this name for all tests: here nothing is allowed."""
    with allow_imports():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("some words of a text\n" * 60)
    data = {**CONFIG["data"], "files": [str(folder / "text.txt")]}
    (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert main(["fit", "--config", str(folder / "c.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("words of a text")
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, run: Path) -> Iterator[None]:
    """None of what could run a command or code is called."""
    calls: list[str] = []
    for module, name in ((os, "system"), (subprocess, "Popen"), (timeit, "timeit")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **options: calls.append(name))
    yield
    assert calls == []


COMMANDS = {
    "predict": ["predict", "--checkpoint", "run", "in.txt", "--out", "out.csv", "--device", "cpu"],
    "generate": ["generate", "--checkpoint", "run", "-n", "2", "--out", "out.txt", "--device", "cpu"],
    "test": ["test", "--checkpoint", "run"],
    "validate": ["validate", "--checkpoint", "run"],
    "resume": ["fit", "--resume", "run"],
    "begin": ["fit", "--config", "run/config.yaml", "--out", "other"],
}
READ_THE_MODEL = ("predict", "generate", "test", "validate")
READ_THE_CONFIGURATION = ("test", "validate", "resume", "begin")


def put(values: dict[str, Any], key: str, path: str) -> None:
    """Set a value by its dotted key; a number is a place in a list, PATH the path itself."""
    *steps, last = key.split(".")
    for step, following in zip(steps, [*steps[1:], last], strict=True):
        if not values.get(step):
            values[step] = [] if following == "0" else {}
        values = values[step]
    if last == "0":
        values[:] = [path]  # type: ignore[index]
    else:
        values[path if last == "PATH" else last] = {} if last == "PATH" else path


def refused(arguments: list[str], capsys: pytest.CaptureFixture, *said: str) -> None:
    assert main(arguments) == 2, arguments
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(one in error for one in said), error
    assert len(error) < 1000


def said(key: str, path: str) -> tuple[str, ...]:
    """Of a mixer that no layer has, no more is asked than its name."""
    return (path,) if key.endswith("PATH") else (path, "--allow-import")


PARTS = ("encoder", "backbone", "mixer", "head")
IN_MODEL = [*(f"spec.{part}.name" for part in PARTS), "spec.backbone.pattern.0", "spec.mixers.PATH", "tokenizer.name"]


@pytest.mark.parametrize("key", IN_MODEL)
def test_every_command_that_loads_a_model_refuses_a_path(
    key: str, run: Path, called: None, capsys: pytest.CaptureFixture
) -> None:
    description = run / "model" / "model.json"
    before = description.read_text()
    for number, path in enumerate(PATHS):
        changed = json.loads(before)
        put(changed, key, path)
        description.write_text(json.dumps(changed))
        for command in READ_THE_MODEL[: 4 if number == 0 else 1]:
            refused(COMMANDS[command], capsys, *said(key, path))
        with pytest.raises(UserError, match=path):
            mambaseq.load("run").predict("in.txt")
    main(COMMANDS["resume"])  # says that there is nothing to do
    changed["spec"]["d_model"] = "touch x"  # what once was run
    description.write_text(json.dumps(changed))
    for command in READ_THE_MODEL:
        refused(COMMANDS[command], capsys, "d_model")


@pytest.mark.parametrize("key", ["reader", "writer"])
def test_readers_and_writers_are_those_that_are_registered(
    key: str, run: Path, called: None, capsys: pytest.CaptureFixture
) -> None:
    description = run / "model" / "model.json"
    before = json.loads(description.read_text())
    prompted = [*COMMANDS["generate"], "--prompt", "in.txt"]
    for path in PATHS[:2]:
        description.write_text(json.dumps({**before, key: path}))
        for command in [COMMANDS["predict"], prompted] if key == "reader" else [prompted]:
            refused(command, capsys, path, "--allow-import")
        refused([*prompted[:-2], f"--{key}", path], capsys, path if key == "writer" else "--reader")
    assert main(COMMANDS["test"]) == 0


IN_CONFIGURATION = [
    "data.name",
    "metrics.0",
    *(f"model.{part}.name" for part in PARTS),
    "model.backbone.pattern.0",
    "model.mixers.PATH",
]


@pytest.mark.parametrize("key", IN_CONFIGURATION)
def test_every_command_that_reads_a_configuration_refuses_a_path(
    key: str, run: Path, called: None, capsys: pytest.CaptureFixture
) -> None:
    before = (run / "config.yaml").read_text()
    for number, path in enumerate(PATHS):
        changed = yaml.safe_load(before)
        put(changed, key, path)
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        for command in READ_THE_CONFIGURATION[: 4 if number == 0 else 1]:
            refused(COMMANDS[command], capsys, *said(key, path))
    assert not (run.parent / "other").exists()
    if key == "data.name":
        for command in ("predict", "generate"):  # do not read it
            assert main(COMMANDS[command]) == 0


@pytest.mark.parametrize("command", READ_THE_CONFIGURATION)
def test_options_name_what_is_registered(command: str, run: Path, called: None, capsys: pytest.CaptureFixture) -> None:
    options = ("--data.name={}", '--metrics=["{}"]', *(f"--model.{part}.name={{}}" for part in PARTS))
    for number, option in enumerate((*options, '--model.backbone.pattern=["{}"]')):
        path = PATHS[number % len(PATHS)]
        refused([*COMMANDS[command], option.format(path)], capsys, path, "--allow-import")
    assert not (run.parent / "other").exists()


WITH_CODE = """
from collections.abc import Callable
from typing import Any
from mambaseq.backbones.residual import ResidualStack
from mambaseq.encoders import TokenEncoder
from mambaseq.heads.lm import LMHead
from mambaseq.mixers.s4d import S4D

given: list = []

class Mixer(S4D):
    def __init__(self, d_model: int, f: Callable = len, k: type = int, c: S4D | None = None,
                 either: int | Callable = 3) -> None:
        given.append(f)
        super().__init__(d_model)

class Backbone(ResidualStack):
    def __init__(self, make_mixer: Callable, n_layers: int = 1, f: Callable = len, k: type = int,
                 c: S4D | None = None, either: int | Callable = 3) -> None:
        given.append(f)
        super().__init__(make_mixer, n_layers)

class Head(LMHead):
    def __init__(self, d_model: int, vocab_size: int, f: Callable = len, k: type = int, c: S4D | None = None,
                 either: int | Callable = 3) -> None:
        given.append(f)
        super().__init__(d_model, vocab_size)

class Encoder(TokenEncoder):
    def __init__(self, d_model: int, vocab_size: int, f: Callable = len, k: type = int, c: S4D | None = None,
                 either: int | Callable = 3) -> None:
        given.append(f)
        super().__init__(d_model, vocab_size)
"""
CODE = ("os.system", {"class_path": "subprocess.Popen"}, '{"cl\\u0061ss_path": "evil_names.call"}')


@pytest.fixture
def with_code(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a module `with_parts`, whose parts take code, and of `evil_names`, which must not be imported."""
    (run.parent / "with_parts.py").write_text(WITH_CODE)
    (run.parent / "evil_names.py").write_text("def call(*args, **options): ...\n")
    monkeypatch.syspath_prepend(run.parent)
    sys.modules.pop("with_parts", None)
    yield run.parent
    sys.modules.pop("with_parts", None)
    assert "evil_names" not in sys.modules


@pytest.mark.parametrize("argument", ["f", "k", "c", "either"])
@pytest.mark.parametrize("part", [*PARTS, "mixers.with_parts:Mixer"])
def test_arguments_of_parts_of_models_are_no_code(
    part: str, argument: str, run: Path, called: None, with_code: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = yaml.safe_load((run / "config.yaml").read_text())
    if part.startswith("mixers"):
        plain["model"]["backbone"]["pattern"] = ["mamba", "with_parts:Mixer"]
        settings = plain["model"].setdefault("mixers", {}).setdefault("with_parts:Mixer", {})
    else:
        settings = plain["model"][part]
        settings.clear()
        settings["name"] = f"with_parts:{part.title()}"
    allowed = ["--allow-import", "with_parts"]
    number = len(part) + len(argument)  # each is tried with one of them
    value, command = CODE[number % len(CODE)], ("resume", "test")[number % 2]
    (run / "config.yaml").write_text(yaml.safe_dump(plain))
    text = value if isinstance(value, str) else json.dumps(value)
    option = f"--model.{part}.{argument}={text}"
    refused([*COMMANDS[command], *allowed, option], capsys, f"model.{part}.{argument}")
    settings[argument] = value
    (run / "config.yaml").write_text(yaml.safe_dump(plain))
    refused([*COMMANDS[command], *allowed], capsys, f"model.{part}.{argument}")
    if argument == "either":  # what is plain is taken
        settings[argument] = 4
        (run / "config.yaml").write_text(yaml.safe_dump(plain))
        with allow_imports("with_parts"):
            parse_config("run/config.yaml", [])


@pytest.mark.parametrize("part", PARTS)
def test_what_a_model_says_of_such_arguments_stays_text(part: str, run: Path, called: None, with_code: Path) -> None:
    spec = json.loads((run / "model" / "model.json").read_text())["spec"]
    needed = {key: value for key, value in spec[part].items() if key == "vocab_size"}
    for value in CODE:
        spec[part] = {"name": f"with_parts:{part.title()}", **needed, "f": value}
        with allow_imports("with_parts"):
            build_model(spec)
        given = sys.modules["with_parts"].given
        assert given == [value] * len(given)
        assert given
        given.clear()
