"""`mambaseq runs`: a table of runs, and a picture of their curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambaseq.arguments import Arguments

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
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file")
    parser.add_argument("--picture", metavar="FILE.png", help="draw a metric of all runs over steps, tokens and time")
    parser.add_argument("--curve", default="val/loss", metavar="METRIC", help="the metric to draw (default: val/loss)")
    arguments = parser.parse_args(argv)
    from mambaseq.reporting.comparison import compare, curves, ordered, write_csv
    from mambaseq.reporting.pictures import save_png

    found = compare([Path(folder) for folder in arguments.folders])
    if arguments.sort:
        found = ordered(found, arguments.sort, arguments.descending)
    print_table(found)
    if arguments.csv:
        write_csv(found, Path(arguments.csv))
    if arguments.picture:
        figure, notes = curves(found, arguments.curve)
        save_png(Path(arguments.picture), figure)
        print("".join(f"{note}\n" for note in notes), end="")
    return 0


def print_table(found: Runs) -> None:
    """Print runs, a row each, and those that cannot be read."""
    cells = [[_shown(cell) for cell in row] for row in [found.columns, *found.rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(found.columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for message in found.bad:
        print(f"left out: {message}")


def _shown(cell: Any) -> str:
    text = f"{cell:.5g}" if isinstance(cell, float) else str(cell)
    return text if len(text) <= 40 else f"…{text[-39:]}"
