"""A benchmark's rows as a picture: bars next to those of peers, lines over a growing size."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure

from mambaseq.benchmarking import by_length
from mambaseq.benchmarking.report import OURS, Column, Ratio, Report, Row

_COLOURS = {OURS: "#1f5fa8"}
_PEERS = ("#d9822b", "#6b8e4e", "#8a5a9e", "#7f7f7f")
# the size that lines are drawn over, by benchmark
_ALONG = {"decode": "batch"}


def draw(report: Report) -> Figure:
    """One panel for each compared value; `_draw_ops` draws those of ops."""
    if report.bench == "ops":
        return _draw_ops(report)
    columns = [
        column for column in report.columns if column.compared and any(column.key in row.values for row in report.rows)
    ]
    figure = Figure(figsize=(4.6 * max(len(columns), 1), 3.4), layout="constrained")
    for index, column in enumerate(columns, 1):
        axes = figure.add_subplot(1, len(columns), index)
        along = _ALONG.get(report.bench)
        if along is None:
            _bars(axes, report.rows, column)
        else:
            _lines(axes, report.rows, column.key, along)
            axes.set_xlabel(along)
        axes.set_title(column.heading + (" (more is better)" if column.more_is_better else " (less is better)"))
    figure.suptitle(_title(report))
    return figure


_SHOWN = {"forward_ms": "forward", "backward_ms": "backward", "both_ms": "forward + backward"}


def _draw_ops(report: Report) -> Figure:
    """Beside each other: the ratios to peers, or where none ran our times; times by length, if they were taken."""
    ratios = [r for r in report.ratios() if r.shape is not None and r.value in _SHOWN and r.op != by_length.OP]
    times = [
        row for row in report.rows if row.contender == OURS and row.op != by_length.OP and row.values.keys() & _SHOWN
    ]
    lengths = [row for row in report.rows if row.op == by_length.OP and row.values]
    groups = list(dict.fromkeys(map(_group, ratios))) if ratios else list(dict.fromkeys(map(_place, times)))
    left, right = ["ops"] if groups or not lengths else [], [["forward_ms"], ["both_ms"]] if lengths else [[], []]
    height = max(6.5 if lengths else 2.5, 1.2 + 0.36 * len(groups))
    figure = Figure(figsize=(7 * (len(left) + len(right[0])), height), layout="constrained")
    rows: list[Any] = [left + row for row in right]
    panels = figure.subplot_mosaic(rows)
    if ratios:
        _beside(panels["ops"], {(_group(r), r.value): r.ratio for r in ratios}, groups, ratio=True)
    elif times:
        found = {(_place(row), key): row.values[key] for row in times for key in _SHOWN if key in row.values}
        _beside(panels["ops"], found, groups, ratio=False)
    elif left:
        panels["ops"].text(0.5, 0.5, "nothing was measured", transform=panels["ops"].transAxes, ha="center")
    for key in right[0] + right[1]:
        _lines(panels[key], lengths, key, "length")
        panels[key].set_title(f"{_SHOWN[key]}, batch 1, width {by_length.WIDTH[report.scale]}")
        panels[key].set_xlabel("length")
        panels[key].set_ylabel("ms")
    figure.suptitle(_title(report))
    return figure


def _title(report: Report) -> str:
    return f"mambaseq bench {report.bench}, {report.hardware}"


def _group(ratio: Ratio) -> str:
    return f"{_place(ratio)}\nover {ratio.peer}"


def _place(of: Ratio | Row) -> str:
    """The op and its sizes."""
    return f"{of.op}, {' × '.join(f'{size:,}' for size in (of.shape or {}).values())}"


def _beside(axes: Any, values: dict[tuple[str, str], float], groups: list[str], *, ratio: bool) -> None:
    """Bars of each group, from the top down: forward, backward, and both. values: by the group and the key of `_SHOWN`;
    ratios, from 1 on, or milliseconds."""
    start = 1 if ratio else 0
    for offset, (key, name) in zip((-0.27, 0, 0.27), _SHOWN.items(), strict=True):
        points = [(index + offset, values[group, key]) for index, group in enumerate(groups) if (group, key) in values]
        if points:
            places, found = zip(*points, strict=True)
            bars = axes.barh(places, [value - start for value in found], left=start, height=0.25, label=name)
            axes.bar_label(bars, [_times(value) for value in found], fontsize=6, padding=1.5)
    if ratio:
        axes.set_xscale("log")
        axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("times as fast" if ratio else "ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _times(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def _bars(axes: Any, rows: list[Row], column: Column) -> None:
    shapes = list(dict.fromkeys(tuple(row.shape.items()) for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows if column.key in row.values))
    width = 0.8 / max(len(contenders), 1)
    for position, contender in enumerate(contenders):
        points = [
            (shapes.index(tuple(row.shape.items())) + (position - (len(contenders) - 1) / 2) * width, value)
            for row in rows
            if row.contender == contender and (value := row.values.get(column.key)) is not None
        ]
        bars = axes.bar(*zip(*points, strict=True), width=width, label=contender, color=_colour(contender, contenders))
        axes.bar_label(bars, fmt=lambda value: f"{value:,.{column.digits if value < 100 else 0}f}", fontsize=8)
    axes.set_xticks(range(len(shapes)), [" × ".join(f"{size:,}" for _, size in shape) for shape in shapes])
    axes.set_xlabel(" × ".join(name for name, _ in shapes[0]) if shapes else "")
    axes.margins(y=0.15)
    if contenders:
        axes.legend(fontsize=8)


def _lines(axes: Any, rows: list[Row], key: str, along: str) -> None:
    contenders = list(dict.fromkeys(row.contender for row in rows if key in row.values))
    ops = list(dict.fromkeys(row.op for row in rows if key in row.values))
    for contender in contenders:
        for op, line in zip(ops, itertools.cycle(("-", "--", ":"))):
            alike = [row for row in rows if (row.contender, row.op) == (contender, op) and key in row.values]
            points = sorted((row.shape[along], row.values[key]) for row in alike)
            label = contender if len(ops) == 1 else f"{contender}, {op.rpartition(', ')[2]}"
            colour = _colour(contender, contenders)
            if points:
                axes.plot(*zip(*points, strict=True), line, marker="o", ms=3.5, label=label, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if contenders:
        axes.legend(fontsize=8)


def _colour(contender: str, contenders: list[str]) -> str:
    peers = [name for name in contenders if name not in _COLOURS]
    return _COLOURS.get(contender) or _PEERS[peers.index(contender) % len(_PEERS)]
