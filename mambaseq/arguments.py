"""The parser of a command's options, for the core's commands and those of domains. Its errors are paragraphs like all
others."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, NoReturn

from mambaseq.errors import ConfigError, cut_list


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


def add_condition(parser: argparse.ArgumentParser, told: str) -> None:
    """The option --condition, in the one form that all commands have; `mambaseq.runs.conditions` reads what it gives, a
    list of words for each time. told: what it is for, for the help."""
    parser.add_argument(
        "--condition",
        action="append",
        nargs="+",
        metavar="NAME",
        help=f"{told}: a name, or for several conditions digit=7 speaker=theo age=31.5; values between commas are each "
        "asked for; may be given again",
    )


def add_condition_columns(parser: argparse.ArgumentParser) -> None:
    """The options by which each record has a condition of its own."""
    parser.add_argument(
        "--condition-column",
        metavar="NAME",
        help="a column with the condition of each record: of the rows that are read (a manifest, jsonl, parquet), or "
        "of a table; several with commas; a manifest's columns that are called as the conditions are used unasked",
    )
    parser.add_argument(
        "--condition-table",
        metavar="FILE",
        help="a .csv, .tsv or .jsonl that has the columns, and a column record or file that says of which record",
    )


def parse_inputs(parser: Arguments, argv: list[str]) -> Any:
    """Parse the options of a command with inputs. Words behind --condition belong to it, but if no input is left then,
    the last of them that name files or folders are inputs."""
    try:
        return parser.parse_args(argv)
    except ConfigError as error:
        for start in reversed([i for i, word in enumerate(argv) if word == "--condition"]):
            stop = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("-")), len(argv))
            first = stop
            while first > start + 2 and _names_input(argv[first - 1]):
                first -= 1
            if first < stop:
                return parser.parse_args([*argv[first:stop], *argv[:first], *argv[stop:]])
        if "--condition" in argv and "required" in str(error):
            told = "Words behind --condition belong to it; give what is read before it."
            raise ConfigError(f"{error} {told}") from error
        raise


def _names_input(word: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if Path(word).exists():
            return True
    return "=" not in word and (word.startswith(("mambaseq:", "fetched:")) or any(sign in word for sign in "*?["))
