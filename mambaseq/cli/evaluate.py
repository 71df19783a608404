"""`mambaseq validate` and `mambaseq test`: a run's metrics on its validation or test set."""

from __future__ import annotations

from mambaseq.cli.arguments import Arguments, asks_for_help, print_keys, refuse_words
from mambaseq.cli.imports import add_allow_import
from mambaseq.importing import uncollected
from mambaseq.reporting.runs import RunFolder


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog=f"mambaseq {command}",
        description="Evaluate a run; --key value overrides its configuration (--data.length 4096), and `mambaseq "
        f"{command} --checkpoint RUN --help` lists the keys.",
        add_help=not any(argument.partition("=")[0] == "--checkpoint" for argument in argv),
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of the run")
    add_allow_import(parser)
    arguments, overrides = parser.parse_known_args(argv)
    refuse_words(argv, overrides, "--checkpoint", parser.prog)
    if asks_for_help(overrides):
        return print_keys(parser, str(RunFolder(arguments.checkpoint).require().config), overrides)
    with uncollected(for_good=True):
        from mambaseq.runs.evaluation import evaluate

    results = evaluate(RunFolder(arguments.checkpoint), command, overrides)
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:<24} {value:.4f}")
    return 0
