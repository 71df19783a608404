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


def _draw_ops(report: Report) -> Figure:
    shown = {"forward_ms": "forward", "backward_ms": "backward", "both_ms": "forward + backward"}
    ratios = [r for r in report.ratios() if r.shape is not None and r.value in shown and r.op != by_length.OP]
    groups = list(dict.fromkeys(_group(ratio) for ratio in ratios))
    figure = Figure(figsize=(14, max(6.5, 1 + 0.36 * len(groups))), layout="constrained")
    panels = figure.subplot_mosaic([["ratios", "forward_ms"], ["ratios", "both_ms"]])
    _ratios(panels["ratios"], ratios, groups, shown)
    for key, title in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
        axes = panels[key]
        _lines(axes, [row for row in report.rows if row.op == by_length.OP], key, "length")
        axes.set_title(f"{title}, batch 1, width {by_length.WIDTH[report.scale]}")
        axes.set_xlabel("length")
        axes.set_ylabel("ms")
    figure.suptitle(_title(report))
    return figure


def _title(report: Report) -> str:
    return f"mambaseq bench {report.bench}, {report.hardware}"


_Group = tuple[str, tuple[int, ...], str]  # op, sizes and peer: what stands side by side


def _group(ratio: Ratio) -> _Group:
    return ratio.op, tuple((ratio.shape or {}).values()), ratio.peer


def _ratios(axes: Any, ratios: list[Ratio], groups: list[_Group], shown: dict[str, str]) -> None:
    """The ratio to each peer, from the top down: forward, backward, and both. shown: names of these by their keys."""
    for offset, (value, name) in zip((-0.27, 0, 0.27), shown.items(), strict=True):
        points = [(groups.index(_group(r)) + offset, r.ratio) for r in ratios if r.value == value]
        if points:
            places, times = zip(*points, strict=True)
            bars = axes.barh(places, [ratio - 1 for ratio in times], left=1, height=0.25, label=name)
            axes.bar_label(bars, [_times(ratio) for ratio in times], fontsize=6, padding=1.5)
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    names = [f"{op}, {' × '.join(f'{n:,}' for n in shape)}\nover {peer}" for op, shape, peer in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("times as fast")
    if groups:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    else:
        axes.text(0.5, 0.5, "no peer ran", transform=axes.transAxes, ha="center")


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"


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
