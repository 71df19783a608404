"""`mambaseq COMMAND ...`: finds the command's module. Errors that the user has to mend become one paragraph and exit
code 2."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable

from mambaseq import __version__
from mambaseq.atomic import FULL
from mambaseq.domain import catalog
from mambaseq.errors import UserError, did_you_mean, paragraph, shown
from mambaseq.registry import allow_imports
from mambaseq.started import watch_from_the_start

COMMANDS = {
    "fit": (
        "mambaseq.cli.fit",
        "train a model: --config NAME_OR_FILE [--out RUN] [--init-from RUN] [--key value ...]; --resume RUN",
    ),
    "sweep": (
        "mambaseq.cli.sweep",
        "train runs of several settings, a grid or a search, by one YAML: SWEEP.yaml [--out FOLDER]",
    ),
    "validate": ("mambaseq.cli.evaluate", "evaluate a run on its validation set: --checkpoint RUN [--baselines]"),
    "test": ("mambaseq.cli.evaluate", "evaluate a run on its test set: --checkpoint RUN [--baselines]"),
    "predict": ("mambaseq.cli.predict", "apply a run to files: --checkpoint RUN INPUT ... --out FILE"),
    "generate": ("mambaseq.cli.generate", "continue a prompt: --checkpoint RUN [--prompt P] --out FILE"),
    "import": (
        "mambaseq.cli.checkpoints",
        "make a published Mamba a run: --checkpoint NAME_OR_FOLDER --out RUN",
    ),
    "export": (
        "mambaseq.cli.checkpoints",
        "write a run's model for transformers: --checkpoint RUN --out FOLDER",
    ),
    "serve": (
        "mambaseq.cli.serve",
        "answer over HTTP as OpenAI's completions do, many requests at once: --checkpoint RUN [--port 8000]",
    ),
    "runs": (
        "mambaseq.cli.runs",
        "compare runs: settings that differ, metrics, speed, size: [FOLDER] [--sort COLUMN]",
    ),
    "list": (
        "mambaseq.cli.listing",
        "list what configurations can name: domains, datasets, tokenizers, mixers, heads, metrics, configs",
    ),
    "new": (
        "mambaseq.cli.new",
        "write the package of a new domain, to be changed into yours: domain NAME [--out FOLDER]",
    ),
    "check": ("mambaseq.cli.check", "test a domain against the laws, and say what fails: NAME"),
    "doctor": (
        "mambaseq.cli.doctor",
        "check this machine: which backend each op would use, and whether it is right",
    ),
    "bench": ("mambaseq.cli.bench", "measure speed next to installed peers: ops, block, train, decode"),
    "reproduce": ("mambaseq.cli.reproduce", "repeat a published result and compare the paper's figures with ours"),
    "data": (
        "mambaseq.cli.data",
        "data sets that can be fetched: list, info NAME, fetch NAME; audit CONFIG looks for leaks and shortcuts",
    ),
    "demo": ("mambaseq.cli.demo", "train every domain's demo on the shipped data and write report.html"),
}


def usage() -> str:
    told = {name: text for name, (_, text) in COMMANDS.items()}
    told |= {entry.name: f"{entry.summary} [{entry.origin}]" for entry in catalog()["commands"]}
    width = min(max(map(len, told)), 20)
    lines = "\n".join(
        textwrap.fill(text, 100, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in told.items()
    )
    return (
        f"mambaseq {__version__}: one Mamba backbone for long sequences of any kind\n\n"
        f"usage: mambaseq COMMAND [options]      mambaseq COMMAND --help\n\n{lines}\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for an error that the user has to mend, 130 when interrupted."""
    watch_from_the_start()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:  # also when argparse exits: a closed pipe may be noticed only when the buffer is flushed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe left (mambaseq list | head)
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        _drop_output()
        print(
            "mambaseq: The disk is full (or a quota reached): the output of this command, or a temporary file, could "
            "not be written completely. Free some space, or choose another place.",
            file=sys.stderr,
        )
        return 2


def _drop_output() -> None:
    """Leave standard output without a reader, for the flush at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command, rest = arguments[0], arguments[1:]
    ours = catalog()["commands"] if command not in COMMANDS else ()
    if command not in ours and rest and f"{command}/{rest[0]}" in ours:  # a domain's command as two words
        command, rest = f"{command}/{rest[0]}", rest[1:]
    if command not in COMMANDS and command not in ours:
        known = [*COMMANDS, *(entry.name for entry in ours)]
        told = paragraph(f"no command is named {shown(command)}.{did_you_mean(command, known)}")
        print(f"mambaseq: {told}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        run = _function(command)
        with allow_imports():  # what the command allows ends with it
            return int(run(rest) or 0)
    except UserError as error:
        from mambaseq.data.addresses import redacted

        print(f"mambaseq {command}: {paragraph(redacted(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # raised wherever somebody asks what is there
        if error.errno != errno.ENAMETOOLONG:
            raise
        told = f"{shown(error.filename, 200)} is not a file name: it is too long. Give another."
        print(f"mambaseq {command}: {told}", file=sys.stderr)
        return 2
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # before and after training, Lightning turns Ctrl-C into an exit and leaves the signal ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nmambaseq {command}: interrupted.", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\nmambaseq {command}: interrupted.", file=sys.stderr)
        return 130


def _function(command: str) -> Callable[[list[str]], int | None]:
    """The function of a command: ours, or one that a domain registered, which gets the words after the name."""
    if command not in COMMANDS:
        return catalog()["commands"].get(command)
    module = importlib.import_module(COMMANDS[command][0])
    return lambda rest: module.run(rest, command)


if __name__ == "__main__":
    sys.exit(main())
