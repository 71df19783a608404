"""Pictures of an evaluation, from the plain values in a run's evaluation.json, and tables of baselines.

The values may have been changed by somebody: what cannot be drawn is left out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mambaseq.errors import cut_list
from mambaseq.reporting.charts import LARGEST, Bar, Curve, bars, lines, shortened, square
from mambaseq.reporting.sections import drawing, side_by_side, table
from mambaseq.reporting.tracks import Band, tracks

_ODD = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)
_COLOURED = 3  # classes with a colour of their own: of more the mean is drawn


def pictures(found: Mapping[str, Any], stage: str) -> str:
    """HTML of all pictures of a set: curves of ranks, reliability, values, and tracks. "" for none."""
    drawn: list[str] = []
    for draw in (_curves, _reliability, _values, _tracks):
        try:
            drawn += [drawing(svg, f"{stage}: {caption}") for svg, caption in draw(found) if svg]
        except _ODD:
            continue
    return f'<div class="wide">{side_by_side(*drawn)}</div>' if drawn else ""


def _curves(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind, x, y, what in (
        ("roc", "false positive rate", "true positive rate", "ROC"),
        ("precision", "recall", "precision", "precision and recall"),
    ):
        classes = [(str(one["name"]), float(one["area"]), _floats(one["x"]), _floats(one["y"])) for one in found[kind]]
        if not classes:
            continue
        if len(classes) <= _COLOURED:
            curves = [
                Curve(f"{shortened(name)} {area:.3f}", xs, ys, colour=colour)
                for colour, (name, area, xs, ys) in enumerate(classes)
            ]
        else:
            grid = np.linspace(0, 1, 101)
            mean = np.mean([np.interp(grid, xs, ys) for _, _, xs, ys in classes], axis=0)
            area = float(np.mean([area for _, area, _, _ in classes]))
            curves = [Curve("", xs, ys, "faint", 2) for _, _, xs, ys in classes]
            curves.append(Curve(f"mean of {len(classes)} classes {area:.3f}", grid.tolist(), mean.tolist()))
        yield square(curves, x, y, diagonal=kind == "roc"), what


def _reliability(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bins = found["reliability"]
    sure, right, count = (_floats(bins[key]) for key in ("confidence", "right", "count"))
    largest = max(count, default=0) or 1
    amounts = [(x, n / largest) for x, n in zip(sure, count, strict=True)]
    curve = Curve("", sure, right, "dots")
    what = "reliability: how often answers of a probability are right, and how many there are (grey)"
    yield square([curve], "probability", "share that is right", amounts=amounts), what


def _values(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(found["values"]):
        true, said = _floats(one["true"]), _floats(one["said"])
        low, high = min([*true, *said], default=0.0), max([*true, *said], default=0.0)
        room = 0.04 * (high - low)
        of = f" {number + 1}" if len(found["values"]) > 1 else ""
        svg = square([Curve("", true, said, "points")], "true", "predicted", span=(low - room, high + room))
        yield svg, f"values{of}, predicted against true"


def _tracks(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = list(map(str, found["classes"]))
    if found["kind"] == "multilabels":
        names = ["none", *names]
    for one in found["tracks"]:
        step, caption = int(one["step"]), f"the truth and the prediction along sequence {int(one['sequence']) + 1:,}"
        if found["kind"] == "values":
            places = [step * number for number in range(len(one["truth"]))]
            both = [
                Curve(name, places, [math.nan if v is None else float(v) for v in one[key]], colour=colour)
                for name, key, colour in (("truth", "truth", 1), ("predicted", "said", 0))
            ]
            yield lines(both, "position", "value"), caption
        else:
            bands = [
                Band(name, [(int(label), min(int(length), 2**31)) for label, length in one[key]], colour)
                for name, key, colour in (("truth", "truth", 2), ("predicted", "said", 0))
            ]
            yield tracks(bands, names, step=step), caption


def _floats(values: Any) -> list[float]:
    """Finite numbers. Raises ValueError for others."""
    found = [float(value) for value in values]
    if not all(abs(value) < LARGEST for value in found):
        raise ValueError("not finite")
    return found


def remarks(results: Mapping[str, Any], stage: str) -> list[str]:
    """What makes figures of a stage's sets look more certain than they are, a sentence each, with the set: that a model
    answers all alike, or that an interval has no width. results: as in results.json."""
    told = []
    for place in dict.fromkeys(key.rpartition("/")[0] for key in results):
        if place.partition("/")[0] != stage:
            continue
        if isinstance(text := results.get(f"{place}/one_answer"), str):
            told.append(f"{place}: {text}")
            continue
        try:
            found = results[f"{place}/intervals"]["metrics"].items()
            flat = [str(name) for name, pair in found if float(pair[0]) == float(pair[1])]
        except _ODD:
            continue
        if flat:
            told.append(
                f"{place}: {cut_list(flat)} came out the same in every draw of the set, so the interval has no width; "
                "that does not make the figure certain."
            )
    return told


def beside_baselines(found: Any, own: Mapping[str, Any], intervals: Any, stage: str) -> str:
    """HTML of baselines beside the run, with intervals, and what comes of it. "" where there are none.

    found: as `test/baselines` in results.json. own: the run's figures by metric. intervals: those of the run.
    """
    try:
        main, verdict = str(found["metric"]), str(found["verdict"])
        rows = [{"name": "this run", "metrics": dict(own), "intervals": dict(intervals)}, *found["rows"]]
        metrics = [name for name in own if any(name in row["metrics"] for row in rows[1:])]
        chart = [
            Bar(
                str(row["name"]),
                float(row["metrics"][main]),
                0 if number == 0 else 2,
                _pair(row["intervals"].get(main)),
            )
            for number, row in enumerate(rows)
            if row["metrics"].get(main) is not None
        ]
        cells = [
            [
                str(row["name"]),
                *(_cell(row["metrics"].get(name)) for name in metrics),
                _between(row.get("intervals", {}).get(main)),
                str(row.get("note", "")),
            ]
            for row in rows
        ]
    except _ODD:
        return ""
    body = f"<p><strong>{html.escape(verdict)}</strong></p>"
    picture = drawing(bars(chart), f"{stage}: {main}, with 95% intervals") if chart else ""
    return body + picture + table(("method", *metrics, f"95% interval of {main}", "how it was chosen"), cells)


def _cell(value: Any) -> object:
    return float(value) if value is not None else ""


def _pair(pair: Sequence[float] | None) -> tuple[float, float] | None:
    return None if pair is None else (float(pair[0]), float(pair[1]))


def _between(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{float(pair[0]):.3f} to {float(pair[1]):.3f}"
