"""Every key of a configuration and every option of a command is explained by `--help`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import pytest

from mambaseq.arguments import Arguments
from mambaseq.cli.main import COMMANDS, main
from mambaseq.domain import catalog
from mambaseq.registry import import_target
from mambaseq.runs.config import SECTIONS
from mambaseq.runs.naming import PROVIDED
from mambaseq.runs.parser import add_plain, make_parser
from mambaseq.specs import arguments_of

PARTS = ("datasets", "encoders", "mixers", "backbones", "heads", "tokenizers")
EXAMPLES = Path(__file__).parents[2] / "examples"


def silent(actions: list[Any]) -> list[str]:
    """The arguments of a parser that have no words."""
    return [action.dest for action in actions if not (action.help or "").strip()]


def keys_without_words(kind: Any, skip: set[str]) -> list[str]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_plain(parser, kind, "key", skip)
    return [f"{kind.__name__}.{name.removeprefix('key.')}" for name in silent(parser._actions)]


def test_every_key_of_what_is_registered_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all domains, of the examples, and of the sections of a configuration."""
    classes = {kind: [entry.load() for entry in catalog()[kind]] for kind in PARTS}
    examples = sorted(path.parent for path in EXAMPLES.glob("*/mambaseq_*/__init__.py"))
    assert examples
    for package in examples:
        monkeypatch.syspath_prepend(str(package.parent))
        domain = importlib.import_module(package.name).domain
        for kind in PARTS:
            classes[kind] += [import_target(target) for target, _ in getattr(domain, kind).values()]
    found = [name for kind in SECTIONS.values() for name in keys_without_words(kind, set())]
    for kind, members in classes.items():
        for member in dict.fromkeys(members):
            skip = set() if kind == "datasets" else PROVIDED & arguments_of(member).keys()
            found += keys_without_words(member, skip)
    assert found == []
    metrics = [entry.load() for entry in catalog()["metrics"]]
    assert {name for metric in metrics for name in arguments_of(metric)} == {"class_names"}  # a metric has no keys


def test_a_key_without_words_is_found() -> None:
    def made(told: int, silent: int = 0) -> None:
        """Something.

        Args:
            told: what it is.
        """

    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(made)
    assert silent(parser._actions) == ["silent"]


def test_every_key_of_every_configuration_is_explained() -> None:
    """The names, the trainer's keys and the others that are no class's own."""
    defaults = {"encoder": "tokens", "backbone": "residual", "mixer": "mamba", "head": "lm"}
    parser, _ = make_parser({"data": "text/corpus", **defaults}, {"attention": "attention"})
    assert silent(parser._actions) == []
    assert len(parser._actions) > 100


def test_every_option_of_every_command_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}

    class Seen(Exception):
        pass

    def note(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        inner = [other for action in subparsers for other in action.choices.values()]
        actions = [a for one in (parser, *inner) for a in one._actions if a not in subparsers]
        seen[parser.prog] = silent(actions)
        raise Seen

    monkeypatch.setattr(Arguments, "parse_known_args", note)
    for name, (module, _) in COMMANDS.items():
        with pytest.raises(Seen):
            importlib.import_module(module).run([], name)
    assert len(seen) == len(COMMANDS)
    assert {prog: options for prog, options in seen.items() if options} == {}


def test_help_lists_the_options_and_the_keys(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run's folder is there already, of a run, and of another mixer than the configuration's."""
    monkeypatch.chdir(tmp_path)
    Path("runs/demo/checkpoints").mkdir(parents=True)
    assert main(["fit", "--config", "text/demo", "--help", "--model.mixer.name", "s4d"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: mambaseq fit [--config CONFIG]",
        "--init-from RUN start with the weights of another run",
        f"data (text/corpus): {catalog()['datasets'].entry('text/corpus').summary}",
        "--data.length LENGTH tokens a window.",
        "model.mixer (s4d): diagonal S4",
        "--model.mixer.discretization {zoh,bilinear} zoh or bilinear.",
        "optimizer: the optimizer and its schedule",
        "--trainer.strategy STRATEGY how several devices work together",
        "default: auto)",
    ):
        assert words in told, words
    for words in ("TrainerClasses", ":class:", "--data CONFIG", "usage: mambaseq fit [--config CONFIG] [--seed"):
        assert words not in told, words
