"""What the parsers of several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Container
from pathlib import Path
from typing import Any

from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.importing import uncollected
from mambaseq.plain import read_json
from mambaseq.resources import model_folder
from mambaseq.runs.naming import check_names


def refuse_words(argv: list[str], left: list[str], option: str, program: str) -> None:
    """Raise ConfigError for a command line that begins with a word instead of an option, and suggest one."""
    if left and argv and not argv[0].startswith("-") and left[0] == argv[0]:
        raise ConfigError(
            f"{shown(argv[0])} is given without an option. Is it {option}? {program} {option} {argv[0][:80]}"
        )


def check_overrides(
    parser: argparse.ArgumentParser, overrides: list[str], named: str, config: str | None, unused: Container[str] = ()
) -> None:
    """Raise ConfigError for words that name nothing, before anything slow is imported.

    named: the words by which the command's help lists the keys (`--config NAME`). config: the configuration's name or
    file; None while there is none. unused: the command's options, as attributes of what it parses, that go with no
    overrides and so are not what a wrong word means.
    """
    known = [name for name, action in parser._option_string_actions.items() if action.dest not in unused]
    check_names(overrides, f"{parser.prog} {named}", [name for name in known if name[:2] == "--"], config)


def read_card(checkpoint: str | Path) -> dict[str, Any]:
    """What the model.json of a run or an exported model holds; {} for a damaged one, which what loads the model tells.
    Raises UserError where there is none."""
    card = model_folder(checkpoint) / "model.json"
    try:
        return read_json(card)
    except UserError:
        return {}


def asks_for_help(left: list[str]) -> bool:
    """Whether --help is among the words that a command's own options leave."""
    return "--help" in left or "-h" in left


def print_keys(parser: argparse.ArgumentParser, config: str, overrides: list[str]) -> int:
    """Print a command's options and, below them, all keys of a configuration."""
    print(parser.format_help(), flush=True)  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq.runs.parsing import explained

    print(explained(config, [text for text in overrides if text not in ("--help", "-h")]))
    return 0
