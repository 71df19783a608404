"""Charts as SVG text, in the colours of the page that they stand in: its light ones, or its dark ones.

Drawn by hand, so that every run can have its page: a chart takes a millisecond. `STYLE` is what a page needs for them.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mambaseq.reporting.numbers import decimals, number, short

STYLE = """
.chart { font: 11px system-ui, sans-serif; }
.chart text { fill: var(--soft); } .chart .strong { fill: var(--ink); font-weight: 600; }
.chart .on { fill: var(--ground); } .chart .grid { stroke: var(--line); stroke-width: 1; fill: none; }
.chart .c0 { --c: var(--first); } .chart .c1 { --c: var(--second); } .chart .c2 { --c: var(--third); }
.chart .curve { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.chart .faint { fill: none; stroke: var(--c); stroke-width: 1; opacity: .35; }
.chart .area, .chart .dot { fill: var(--c); stroke: none; } .chart .interval { stroke: var(--ink); stroke-width: 1; }
.chart .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
"""
LIGHT = """--ground: #ffffff; --ink: #16202c; --soft: #566273; --line: #dfe4ea;
  --first: #0f6fa8; --second: #c2410c; --third: #8a94a3;"""
DARK = """--ground: #10161d; --ink: #e8edf3; --soft: #9aa7b6; --line: #2b3642;
  --first: #58b4ea; --second: #f59e6b; --third: #6f7c8c;"""

WIDTH, NARROW = 420, 340  # of curves and tables, and of bars
MOST_POINTS = 300  # of a curve: more are not told apart
LARGEST = 1e300  # of what is drawn: a range of larger numbers is no float


class Curve(NamedTuple):
    """A series of a line chart. xs, ys: its points; those that are finite, and below 1e300, are drawn. kind: "curve",
    "faint", "dots" (joined) or, in a `square`, "points". colour: 0, 1 or 2 of the page's."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "curve"
    colour: int = 0


class Bar(NamedTuple):
    """A bar. colour: 0, 1 or 2 of the page's. interval: its lower and upper bound."""

    name: str
    value: float
    colour: int = 2
    interval: tuple[float, float] | None = None


def frame(width: float, height: float, told: str, body: str) -> str:
    """An SVG element; told: what it shows, for those who do not see it."""
    label = html.escape(told, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" style="max-width: {1.45 * width:.0f}px" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" aria-label="{label}">{body}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A text element; kind: "strong", "on" (over a dark cell) or nothing."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{html.escape(words)}</text>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them.

    >>> ticks(0, 340), ticks(1.42, 1.61, 3)
    ([0.0, 100.0, 200.0, 300.0], [1.45, 1.5, 1.55, 1.6])
    """
    if not high - low > 1e-300:  # powers of ten end soon below
        return [low]
    raw = (high - low) / count
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * 0.75), 10 * power)
    first = math.ceil(low / step - 1e-9)
    found = (round(k * step, 2 - exponent) for k in range(first, math.floor(high / step + 1e-9) + 1))
    return list(dict.fromkeys(found))


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a curve that show what all would: of each stretch its lowest and its highest."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    keep = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)  # neither is true of nan
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return x, y
    chosen: list[int] = []
    for part in np.array_split(np.arange(len(x)), most // 2):
        chosen += sorted({int(part[y[part].argmin()]), int(part[y[part].argmax()])})
    return x[chosen], y[chosen]


def lines(curves: Sequence[Curve], x_label: str, y_label: str, height: float = 240) -> str:
    """A chart of curves. The vertical axis spans what is not faint; faint curves are cut off there."""
    drawn = [(curve, *thinned(curve.xs, curve.ys)) for curve in curves]
    drawn = [one for one in drawn if len(one[1])]
    if not drawn:
        return ""
    clear = [y for curve, _, y in drawn if curve.kind != "faint"] or [y for _, _, y in drawn]
    low, high = min(float(y.min()) for y in clear), max(float(y.max()) for y in clear)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    left, right = min(float(x.min()) for _, x, _ in drawn), max(float(x.max()) for _, x, _ in drawn)
    left = 0.0 if left < 0.2 * right else left
    right = right if right > left else left + 1
    levels, places = ticks(low, high, 4), ticks(left, right, 4)
    words = axis_numbers(levels)
    x0 = max(52.0, 10 + 6.2 * max(map(len, words), default=0))
    x1, y0, y1 = WIDTH - 10.0, height - 36.0, 26.0

    def px(x: float) -> float:
        return x0 + (x - left) / (right - left) * (x1 - x0)

    def py(y: float) -> float:
        return y0 - (min(max(y, low), high) - low) / (high - low) * (y0 - y1)

    parts = []
    for level, word in zip(levels, words, strict=True):
        parts.append(f'<path class="grid" d="M{x0:.1f} {py(level):.1f}H{x1:.1f}"/>')
        parts.append(text(x0 - 6, py(level) + 4, word, "end"))
    for place, word in zip(places, axis_numbers(places), strict=True):
        parts.append(text(px(place), y0 + 16, word, "middle"))
    parts.append(text((x0 + x1) / 2, height - 4, x_label, "middle"))
    at = x0
    for curve, _, _ in drawn:
        if curve.name:
            colour = f'class="c{curve.colour} area"'
            parts.append(f'<rect {colour} x="{at:.1f}" y="7" width="10" height="4" rx="2"/>')
            parts.append(text(at + 14, 13, curve.name))
            at += 26 + 6.2 * len(curve.name)
    parts.append(text(x1, 13, y_label, "end"))
    for curve, x, y in sorted(drawn, key=lambda one: one[0].kind != "faint"):
        points = [(px(float(a)), py(float(b))) for a, b in zip(x, y, strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        shape = "faint" if curve.kind == "faint" else "curve"
        parts.append(f'<path class="c{curve.colour} {shape}" d="{path}"/>')
        if (curve.kind == "dots" and len(points) <= 60) or len(points) == 1:
            parts += [f'<circle class="c{curve.colour} dot" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
    names = ", ".join(curve.name for curve, _, _ in drawn if curve.name)
    return frame(WIDTH, height, f"{y_label} over {x_label}: {names}", "".join(parts))


def square(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    span: tuple[float, float] = (0.0, 1.0),
    diagonal: bool = True,
    amounts: Sequence[tuple[float, float]] = (),
) -> str:
    """A chart with the same range on both axes. Names of curves stand below each other in the lower right.

    diagonal: draw it. amounts: (x, share of the largest) of faint bars at the bottom.
    """
    drawn = [(curve, *thinned(curve.xs, curve.ys)) for curve in curves]
    drawn = [one for one in drawn if len(one[1])]
    low, high = span
    if not drawn or not high > low:
        return ""
    x0, x1, y0, y1 = 48.0, NARROW - 12.0, NARROW - 40.0, 12.0

    def px(x: float) -> float:
        return x0 + (min(max(x, low), high) - low) / (high - low) * (x1 - x0)

    def py(y: float) -> float:
        return y0 - (min(max(y, low), high) - low) / (high - low) * (y0 - y1)

    parts, levels = [], ticks(low, high, 4)
    for level, word in zip(levels, axis_numbers(levels), strict=True):
        parts.append(f'<path class="grid" d="M{x0:.1f} {py(level):.1f}H{x1:.1f}M{px(level):.1f} {y0:.1f}V{y1:.1f}"/>')
        parts.append(text(x0 - 6, py(level) + 4, word, "end"))
        parts.append(text(px(level), y0 + 15, word, "middle"))
    for place, share in amounts:
        height = 0.22 * (y0 - y1) * min(max(share, 0.0), 1.0)
        parts.append(
            f'<rect class="c2 area" fill-opacity="0.4" x="{px(place) - 5:.1f}" y="{y0 - height:.1f}" width="10" '
            f'height="{height:.1f}"/>'
        )
    if diagonal:
        parts.append(f'<path class="mark" fill="none" d="M{px(low):.1f} {py(low):.1f}L{px(high):.1f} {py(high):.1f}"/>')
    for curve, x, y in sorted(drawn, key=lambda one: one[0].kind != "faint"):
        points = [(px(float(a)), py(float(b))) for a, b in zip(x, y, strict=True)]
        if curve.kind != "points":
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            parts.append(f'<path class="c{curve.colour} {"faint" if curve.kind == "faint" else "curve"}" d="{path}"/>')
        if curve.kind in ("dots", "points"):
            size, shade = (3.0, "") if curve.kind == "dots" else (2.0, ' fill-opacity="0.5"')
            parts += [
                f'<circle class="c{curve.colour} dot" cx="{a:.1f}" cy="{b:.1f}" r="{size}"{shade}/>' for a, b in points
            ]
    named = [curve for curve, _, _ in drawn if curve.name]
    for number_of, curve in enumerate(named):
        at = y0 - 10 - 15 * (len(named) - 1 - number_of) - (0.22 * (y0 - y1) if amounts else 0)
        parts.append(
            f'<rect class="c{curve.colour} area" x="{x1 - 14:.1f}" y="{at - 6:.1f}" width="10" height="4" rx="2"/>'
        )
        parts.append(text(x1 - 18, at, curve.name, "end"))
    parts.append(text((x0 + x1) / 2, NARROW - 8, x_label, "middle"))
    turned = text(0, 0, y_label, "middle")
    parts.append(f'<g transform="translate(12 {(y0 + y1) / 2:.1f}) rotate(-90)">{turned}</g>')
    told = f"{y_label} over {x_label}: {', '.join(curve.name for curve in named)}"
    return frame(NARROW, NARROW, told.rstrip(": "), "".join(parts))


def axis_numbers(levels: Sequence[float]) -> list[str]:
    """An axis' numbers, in ascending order, with the decimals that the step between them needs: no two are alike.

    >>> axis_numbers([0.0, 0.25, 0.5]), axis_numbers([0.0, 5000.0, 10000.0]), axis_numbers([1000.0, 1000.05])
    (['0.00', '0.25', '0.50'], ['0', '5,000', '10 k'], ['1,000.00', '1,000.05'])
    """
    if len(levels) < 2:
        return [short(level) for level in levels]
    largest = max(map(abs, levels))
    step = min(after - before for before, after in itertools.pairwise(levels))
    exact = all(abs(float(f"{level:.3g}") - level) < 0.01 * step for level in levels)
    if exact and (largest < 1e-3 or 1000 <= largest < 1e15):
        return [short(level) for level in levels]
    mantissa, _, power = f"{step:.1e}".partition("e")  # 1.0, 2.0, 2.5 or 5.0
    places = (not mantissa.endswith("0")) - int(power)
    if 1e-3 <= largest < 1e15:
        return [f"{level:,.{max(places, 0)}f}" for level in levels]
    digits = math.floor(math.log10(largest)) + places + 1
    return [f"{level:.{max(digits, 1)}g}" for level in levels]


def bars(
    rows: Sequence[Bar | str],
    unit: str = "",
    mark: tuple[float, str] | None = None,
    told: str = "",
    places: int | None = -1,
) -> str:
    """Horizontal bars from 0, their numbers behind them; a text between them is a heading of those below. What is not
    finite has no bar. mark: a value that is marked through all of them, and its name. told: what is seen, in words.
    places: decimals of the numbers; -1: by the largest."""
    values = [row for row in rows if isinstance(row, Bar)]
    ends = [value for bar in values for value in (bar.value, *(bar.interval or ())) if math.isfinite(value)]
    largest = max([*ends, mark[0] if mark else 0.0], default=0.0) or 1.0
    places = decimals([bar.value for bar in values]) if places == -1 else places
    x0, x1, top = 4.0, NARROW - 58.0, 4.0

    def px(value: float) -> float:
        return x0 + max(value, 0.0) / largest * (x1 - x0)

    parts, y = [], top
    for row in rows:
        if isinstance(row, str):
            parts.append(text(x0, y + 13, row, kind="strong"))
            y += 22
            continue
        end = px(row.value) if math.isfinite(row.value) else x0
        parts.append(text(x0, y + 10, row.name))
        parts.append(
            f'<rect class="c{row.colour} area" x="{x0}" y="{y + 15:.1f}" width="{max(end - x0, 1):.1f}" height="12" '
            f'rx="3"/>'
        )
        after = end
        if row.interval is not None:
            a, b = px(row.interval[0]), px(row.interval[1])
            after = max(after, b)
            parts.append(
                f'<path class="interval" d="M{a:.1f} {y + 21:.1f}H{b:.1f}M{a:.1f} {y + 17:.1f}v8M{b:.1f} '
                f'{y + 17:.1f}v8"/>'
            )
        if mark is not None:
            parts.append(f'<path class="mark" d="M{px(mark[0]):.1f} {y + 12:.1f}v18"/>')
        words = f"{number(float(row.value), places)}{unit}"
        parts.append(text(after + 6, y + 25, words, kind="strong" if row.colour == 0 else ""))
        y += 38
    if mark is not None:
        parts.append(text(px(mark[0]), y + 8, mark[1], "middle"))
        y += 14
    names = told or ", ".join(f"{bar.name} {number(float(bar.value), places)}{unit}" for bar in values)
    return frame(NARROW, y + 2, names, "".join(parts))


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: rows are true classes; a cell shows the count, its colour the share of the row. "" without
    classes."""
    if not names:
        return ""
    table = np.asarray(counts, dtype=np.int64)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    size, longest = len(names), max(map(len, names))
    margin = 14 + 6.4 * min(longest, 16)
    wide = min(64.0, (WIDTH - margin - 8) / size)
    high = min(wide, 44.0)
    slanted = longest * 6.4 > wide  # names of columns that are wider than these
    head = 22 + (4.0 * min(longest, 16) if slanted else 0)
    parts = []
    for row, name in enumerate(names):
        y = head + row * high
        parts.append(text(margin - 6, y + high / 2 + 4, shortened(name), "end"))
        x = margin + (row + 0.5) * wide
        turn = f' transform="rotate(-35 {x:.1f} {head - 6:.1f})"' if slanted else ""
        column = text(x, head - 6, shortened(name), "start" if slanted else "middle")
        parts.append(column.replace("<text", f"<text{turn}", 1))
        for other in range(size):
            share, x = float(shares[row, other]), margin + other * wide
            parts.append(
                f'<rect class="c0 area" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2:.1f}" '
                f'rx="3" fill-opacity="{0.06 + 0.94 * share:.2f}"/>'
            )
            if size <= 12:
                kind = "on" if share > 0.5 else ""
                parts.append(text(x + wide / 2, y + high / 2 + 4, f"{table[row, other]}", "middle", kind))
    height = head + size * high + 18
    parts.append(text(margin, height - 4, "rows: true class, columns: predicted"))
    told = ", ".join(f"{name} {shares[i, i]:.0%} right" for i, name in enumerate(names))
    return frame(WIDTH, height, told, "".join(parts))


def shortened(name: str) -> str:
    """A name of at most 16 characters."""
    return name if len(name) <= 16 else f"{name[:15]}…"
