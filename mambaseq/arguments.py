"""The parser of a command's options, for the core's commands and those of domains. Its errors are paragraphs like all
others."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean


class Arguments(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises ConfigError for what it cannot use, instead of printing and exiting,
    and takes whole names of options only."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False} | options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's. Words that are left over are quoted in the error, so that blanks and control characters can
        be seen."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            self._refuse(left)
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's, but an empty name of a file or folder is refused: it would be the folder one stands in."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Of the words that an option was given, before they are paths: those of "" and "." are the same."""
        inner = isinstance(action, argparse._SubParsersAction)  # of its own options
        if not inner and "" in arg_strings and _PLACE.search(str(action.metavar or action.dest)):
            named = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
            raise ConfigError(f"{named} is empty. Give a name; a variable of the shell that is not set is empty.")
        return super()._get_values(action, arg_strings)

    def _refuse(self, left: list[str]) -> NoReturn:
        options = [text.partition("=")[0] for text in left if text.startswith("-") and text.strip("-")]
        if options:
            told = f"there is no option {cut(options[0])}.{did_you_mean(options[0], _options(self))}"
        else:
            words = cut_list([text if text.isprintable() and text.strip() else repr(text) for text in left])
            told = f"{words} on the command line: the command takes no more words."
        raise ConfigError(f"{told} `{self.prog} --help` lists the options.")

    def error(self, message: str) -> NoReturn:
        if "required: " in message:  # what is missing may be there under a misspelt name
            missing = message.partition("required: ")[2].split(", ")
            for word in (text.partition("=")[0] for text in self._given if text.startswith("--")):
                if word not in self._option_string_actions and (near := did_you_mean(word[:80], missing)):
                    message = f"there is no option {cut(word)}.{near}"
        stop = "" if message.endswith("?") else "."
        raise ConfigError(f"{message.rstrip('.')}{stop} `{self.prog} --help` lists the options.")


# metavars, or names of options without one, of files and folders
_PLACE = re.compile("RUN|FILE|FOLDER|DIR|INPUT|CONFIG|VARIANTS|FASTA|SWEEP|PAGE|MODEL|^(config|out|plan)$")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a parser, and of those of its words (`data fetch`)."""
    found = [name for name in parser._option_string_actions if name.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [name for inner in action.choices.values() for name in _options(inner)]
    return found


DTYPES = ("float32", "bfloat16", "float16")
"""Of a model's weights, as options and functions name them."""


def dtype_name(text: str) -> str:
    """The long name of a dtype that may be given by its short one; any other text as it is.

    >>> dtype_name("bf16"), dtype_name("float16")
    ('bfloat16', 'float16')
    """
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)


def add_dtype(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option --dtype of commands that apply a model."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        help="of the weights (float32); 16 bits halve their memory and round answers; fp32, bf16 and fp16 are the same",
    )


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
