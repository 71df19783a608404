"""`mambaseq runs`: a table of runs, and a picture of their curves."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mambaseq.arguments import Arguments
from mambaseq.outputs import check_picture, is_stream

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
    parser.add_argument("--all", action="store_true", help="all columns, also where lines are too narrow for them")
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
    streams = any(is_stream(file) for file in (arguments.csv, arguments.json, arguments.picture) if file is not None)
    told = sys.stderr if streams else sys.stdout  # what is written to a stream may be read by a program
    with contextlib.redirect_stdout(told):
        print_table(found, column_named(found, arguments.sort) if arguments.sort else None, arguments.all)
    if arguments.csv:
        write_csv(found, Path(arguments.csv))
    if arguments.json:
        write_json(found, Path(arguments.json))
    if arguments.picture:
        figure, notes = curves(found, arguments.curve)
        save_png(Path(arguments.picture), figure)
        print("".join(f"{note}\n" for note in notes), end="", file=told)
    return 0


def print_table(found: Runs, keep: str | None = None, every: bool = False) -> None:
    """Print runs, a row each, and those that cannot be read. keep: a column that is shown in any case. every: all
    columns; otherwise those that fit."""
    from mambaseq.reporting.comparison import lines_of

    width = None if every else _width()
    for line in [*lines_of(found, width, keep), *(f"left out: {message}" for message in found.bad)]:
        print(line)


def _width() -> int:
    """Characters of a line: the variable COLUMNS, or those of the terminal, also where a pager reads; 120 in a job that
    has none."""
    try:
        terminal = os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # no terminal, or no file
        terminal = os.terminal_size((120, 24))
    return shutil.get_terminal_size(terminal).columns
