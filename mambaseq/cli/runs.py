"""`mambaseq runs`: a table of runs, and a picture of their curves."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mambaseq.arguments import Arguments
from mambaseq.outputs import check_picture

if TYPE_CHECKING:
    from mambaseq.reporting.comparison import Runs


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq runs",
        description="Compare runs: settings that differ, metrics, speed and size.",
    )
    parser.add_argument(
        "folders", nargs="*", default=["runs"], metavar="FOLDER", help="runs, or folders that hold runs (default: runs)"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort by a column, or the end of its name: accuracy, lr")
    parser.add_argument("--descending", action="store_true", help="the largest first")
    parser.add_argument(
        "--all", action="store_true", help="all columns, also where the terminal is too narrow for them"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the whole table to a file")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, an object a run")
    parser.add_argument("--picture", metavar="FILE.png", help="draw a metric of all runs over steps, tokens and time")
    parser.add_argument("--curve", default="val/loss", metavar="METRIC", help="the metric to draw (default: val/loss)")
    arguments = parser.parse_args(argv)
    check_picture(arguments.picture)
    from mambaseq.reporting.comparison import column_named, compare, curves, ordered, write_csv, write_json
    from mambaseq.reporting.pictures import save_png

    found = compare([Path(folder) for folder in arguments.folders])
    if arguments.sort:
        found = ordered(found, arguments.sort, arguments.descending)
    print_table(found, column_named(found, arguments.sort) if arguments.sort else None, arguments.all)
    if arguments.csv:
        write_csv(found, Path(arguments.csv))
    if arguments.json:
        write_json(found, Path(arguments.json))
    if arguments.picture:
        figure, notes = curves(found, arguments.curve)
        save_png(Path(arguments.picture), figure)
        print("".join(f"{note}\n" for note in notes), end="")
    return 0


def print_table(found: Runs, keep: str | None = None, every: bool = False) -> None:
    """Print runs, a row each, and those that cannot be read. keep: a column that is shown in any case. every: all
    columns; otherwise those that fit the terminal (all in a file or a pipe, unless the variable COLUMNS is set)."""
    from mambaseq.reporting.comparison import lines_of

    fits = not every and (sys.stdout.isatty() or "COLUMNS" in os.environ)
    width = shutil.get_terminal_size().columns if fits else None
    for line in [*lines_of(found, width, keep), *(f"left out: {message}" for message in found.bad)]:
        print(line)
