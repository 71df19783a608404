"""The parser of a command's options. Its errors are paragraphs like all others."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.importing import uncollected


class Arguments(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises ConfigError for what it cannot use, instead of printing and exiting."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's. Words that are left over are quoted in the error, so that blanks and control characters can
        be seen."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            words = cut_list([text if text.isprintable() and text.strip() else repr(text) for text in left])
            raise ConfigError(
                f"{words} on the command line is not used: there is no such option, and all inputs are given. "
                f"`{self.prog} --help` lists the options (unrecognized arguments)."
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.rstrip('.')}. `{self.prog} --help` lists the options.")


def refuse_words(argv: list[str], left: list[str], option: str, program: str) -> None:
    """Raise ConfigError for a command line that begins with a word instead of an option, and suggest one."""
    if left and argv and not argv[0].startswith("-") and left[0] == argv[0]:
        raise ConfigError(
            f"{shown(argv[0])} is given without an option. Is it {option}? {program} {option} {argv[0][:80]}"
        )


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
