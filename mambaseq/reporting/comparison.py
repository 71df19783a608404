"""Runs side by side: settings that differ, metrics, speed, size and curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mambaseq.atomic import json_text
from mambaseq.errors import ConfigError, UserError, cut_list, did_you_mean, shown
from mambaseq.outputs import Lines, output_file, safe_cell
from mambaseq.plain import flatten, read_yaml
from mambaseq.reporting.runs import RunFolder

NUMBERS = ("steps", "exported_step", "parameters", "train_tokens", "train_seconds", "tokens_per_second")
"""Of results.json, beside the metrics."""


class Runs(NamedTuple):
    """folders: of the runs, one for each row. columns: `run`, settings that differ, metrics and numbers. rows: cells;
    "" if a run has none. bad: messages about runs that cannot be read."""

    folders: list[RunFolder]
    columns: list[str]
    rows: list[list[Any]]
    bad: list[str]


def find_runs(folders: Sequence[Path]) -> Iterator[RunFolder]:
    """Runs at and below these folders, sorted by name; links are not followed.

    Raises UserError for a folder that does not exist.
    """
    for top in folders:
        if not top.is_dir():
            raise UserError(f"{top} is not a folder. Give one with runs in it.")
        for path, below, names in os.walk(top):
            below.sort()
            if "config.yaml" in names and (Path(path) / "model").is_dir():
                below.clear()
                yield RunFolder(path)


def compare(folders: Sequence[Path]) -> Runs:
    """Runs below folders, side by side. Raises UserError if there are none."""
    found: list[tuple[RunFolder, dict[str, Any], dict[str, Any]]] = []
    bad: list[str] = []
    for run in find_runs(folders):
        try:
            found.append((run, flatten(read_yaml(run.config, "It is no run's.")), run.read_results()))
        except UserError as error:
            bad.append(str(error))
    if not found:
        raise UserError(f"There is no run in {cut_list(folders)}. Give a folder that `mambaseq fit` wrote runs to.")
    keys = sorted({key for _, settings, _ in found for key in settings})
    differing = [key for key in keys if len({repr(settings.get(key)) for _, settings, _ in found}) > 1]
    metrics = sorted({key for _, _, results in found for key, value in results.items() if _is_metric(key, value)})
    numbers = [key for key in NUMBERS if any(key in results for _, _, results in found)]
    rows = [
        [
            str(run.path),
            *(_cell(settings.get(key, "")) for key in differing),
            *(_cell(results.get(key, "")) for key in (*metrics, *numbers)),
        ]
        for run, settings, results in found
    ]
    return Runs([run for run, _, _ in found], ["run", *differing, *metrics, *numbers], rows, bad)


def _is_metric(key: str, value: Any) -> bool:
    return "/" in key and isinstance(value, float)


def _cell(value: Any) -> Any:
    return (
        value if isinstance(value, int | float) and not isinstance(value, bool) else "" if value is None else str(value)
    )


def column_named(runs: Runs, column: str) -> str:
    """The whole name of a column, given as such or by its end. Raises ConfigError for a name that fits no column, or
    several."""
    names = [name for name in runs.columns if name == column] or [
        name for name in runs.columns if name.endswith((f".{column}", f"/{column}"))
    ]
    if len(names) != 1:
        told = f" It may be {cut_list(names)}." if names else did_you_mean(column, runs.columns)
        raise ConfigError(f"No column is named {shown(column)}.{told} Columns: {cut_list(runs.columns)}.")
    return names[0]


def ordered(runs: Runs, column: str, descending: bool = False) -> Runs:
    """The runs sorted by a column, or by the end of its name; runs without a value come last.

    Raises ConfigError as `column_named` does.
    """
    place = runs.columns.index(column_named(runs, column))
    numeric = all(isinstance(row[place], int | float) or row[place] == "" for row in runs.rows)

    def key(number: int) -> Any:
        value = runs.rows[number][place]
        return value if numeric else str(value)

    given = [number for number, row in enumerate(runs.rows) if row[place] != ""]
    order = sorted(given, key=key, reverse=descending)
    order += [number for number, row in enumerate(runs.rows) if row[place] == ""]
    return runs._replace(folders=[runs.folders[i] for i in order], rows=[runs.rows[i] for i in order])


def write_csv(runs: Runs, path: Path) -> None:
    """Write the table; text that a spreadsheet would run gets an apostrophe before it."""
    with output_file(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(Lines(file))
        writer.writerow(map(safe_cell, runs.columns))
        writer.writerows([safe_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in runs.rows)


def write_json(runs: Runs, path: Path) -> None:
    """Write the table as a list of objects, one a run; null where a run has no value."""
    rows = [
        {name: None if cell == "" else cell for name, cell in zip(runs.columns, row, strict=True)} for row in runs.rows
    ]
    with output_file(path) as file:
        file.write((json_text(rows, indent=1, ensure_ascii=False) + "\n").encode())


_LINES = ("-", "--", ":", "-.")


def curves(runs: Runs, metric: str = "val/loss") -> tuple[Figure, list[str]]:
    """A picture of a logged metric of all runs over steps, and over logged tokens and seconds of training; and messages
    about runs that did not log those, which are drawn over steps only.

    Raises UserError if none of them logged the metric.
    """
    figure = Figure(figsize=(13, 3.6))
    panels = figure.subplots(1, 3, sharey=True)
    drawn, old = 0, []
    for run in runs.folders:
        if not (points := run.points(metric)):
            continue
        # ten colours, and then the same ones with other lines
        label, colour, line = str(run.path), f"C{drawn % 10}", _LINES[drawn // 10 % len(_LINES)]
        drawn += 1
        places: tuple[list[float | None], ...] = (
            [point.step + 1 for point in points],
            [point.tokens for point in points],
            [point.seconds for point in points],
        )
        for axes, found in zip(panels, places, strict=True):
            known = [(x, point.value) for x, point in zip(found, points, strict=True) if x is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", ms=2.5, label=label, color=colour, ls=line)
        if any(None in found for found in places):
            old.append(label)
    if not drawn:
        raise UserError(f"None of these runs logged {shown(metric)}. Give another --curve, such as train/loss.")
    for axes, label in zip(panels, ("step", "tokens", "seconds of training"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    handles, labels = panels[0].get_legend_handles_labels()
    anchor = (0.5, -0.05 - 0.05 * ((drawn + 2) // 3))
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=anchor, ncols=3, fontsize=8)
    told = "an earlier version did not log tokens and seconds of"
    return figure, [f"over steps alone: {told} {cut_list(old)}"] if old else []


_WIDEST, _NARROW, _GAP = 40, 16, 2
_LEAST = ("exported_step", "train_tokens", "train_seconds", "tokens_per_second", "steps", "parameters")


def lines_of(runs: Runs, width: int | None = None, keep: str | None = None) -> list[str]:
    """The table as text, a line each run. width: characters of a line, None for all.

    What does not fit is left out in a fixed order, until the rest fits: texts are cut to 16 characters; then go metrics
    of training, numbers (those of training before steps and parameters), settings and metrics, each the last column
    first. The run and `keep` (a column) stay; then the run's name is cut at its beginning. A last line says what is not
    shown.
    """
    shown_of = list(range(len(runs.columns)))
    most = _WIDEST
    gone = _by_importance(runs.columns, keep)
    while True:
        cells = [[_text(row[i], most) for i in shown_of] for row in [runs.columns, *runs.rows]]
        widths = [max(len(row[place]) for row in cells) for place in range(len(shown_of))]
        over = 0 if width is None else sum(widths) + _GAP * (len(widths) - 1) - width
        if over <= 0:
            break
        if most > _NARROW:
            most = _NARROW
            continue
        if not gone:
            widths[0] = max(widths[0] - over, _NARROW)
            for row in cells:
                row[0] = _end(row[0], widths[0])
            break
        shown_of.remove(gone.pop(0))
    gap = " " * _GAP
    lines = [gap.join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in cells]
    if left := [name for i, name in enumerate(runs.columns) if i not in shown_of]:
        lines.append(
            f"not shown: {cut_list(left, 6)}. Widen the window (in a pipe, set COLUMNS), or use --all, --csv or --json."
        )
    return lines


def _by_importance(columns: Sequence[str], keep: str | None) -> list[int]:
    """The places of the columns that may be left out, the first to go first."""

    def rank(place: int) -> tuple[int, int]:
        name = columns[place]
        kinds = (name.startswith("train/"), name in _LEAST, "/" not in name, True)
        return kinds.index(True), _LEAST.index(name) if name in _LEAST else -place

    return sorted((i for i in range(1, len(columns)) if columns[i] != keep), key=rank)


def _text(cell: Any, most: int) -> str:
    return f"{cell:.5g}" if isinstance(cell, float) else _end(str(cell), most)


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"
