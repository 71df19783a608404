"""Tracks: labels along a sequence as bands, the truth above what was predicted, drawn as the charts are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mambaseq.reporting.charts import WIDTH, axis_numbers, frame, shortened, text, ticks

_MOST = 12  # classes with a lane
_STRIP, _GAP = 8.0, 9.0  # height of a band, and what stands between lanes
_LEVELS = 4  # shades of how much of a column has the class


class Band(NamedTuple):
    """Labels along a sequence. runs: `(label, length)` each, one after the other; below 0 it is unknown. colour: 0,
    1 or 2 of the page's."""

    name: str
    runs: Sequence[tuple[int, int]]
    colour: int = 0


def runs_of(labels: np.ndarray) -> list[tuple[int, int]]:
    """Runs of equal labels `(length,)`.

    >>> runs_of(np.array([0, 0, 2, -1]))
    [(0, 2), (2, 1), (-1, 1)]
    """
    return [(int(label), len(list(run))) for label, run in itertools.groupby(np.asarray(labels).tolist())]


def tracks(bands: Sequence[Band], names: Sequence[str], start: int = 0, step: int = 1, unit: str = "position") -> str:
    """A lane for each class that occurs, with a strip for each band: where it has this class. At most 12 lanes are
    drawn, of the classes that occur most; the rest is counted.

    names: of the classes. start: the position of the first label. step: positions to a label. "" where nothing is
    known.
    """
    most = max((sum(length for _, length in band.runs) for band in bands), default=0)
    totals = np.zeros(len(names))
    for band in bands:
        for label, length in band.runs:
            if 0 <= label < len(names):
                totals[label] += length
    shown = sorted(np.argsort(-totals, kind="stable")[: min(_MOST, int((totals > 0).sum()))].tolist())
    if not shown:
        return ""
    x0 = 14 + 6.4 * min(max(len(shortened(names[label])) for label in shown), 16)
    x1, y = WIDTH - 10.0, 26.0
    columns = int(x1 - x0)
    parts, at = [], x0
    for band in bands:
        parts.append(f'<rect class="c{band.colour} area" x="{at:.1f}" y="7" width="10" height="4" rx="2"/>')
        parts.append(text(at + 14, 13, band.name))
        at += 26 + 6.2 * len(band.name)
    for label in shown:
        parts.append(text(x0 - 6, y + len(bands) * _STRIP / 2 + 4, shortened(names[label]), "end"))
        for band in bands:
            parts.append(f'<path class="grid" d="M{x0:.1f} {y + _STRIP:.1f}H{x1:.1f}"/>')
            parts += _strip(band, label, most, columns, (x0, y))
            y += _STRIP
        y += _GAP
    places = [place for place in ticks(start, start + most * step, 4) if place <= start + most * step]
    for place, word in zip(places, axis_numbers(places), strict=True):
        share = (place - start) / (most * step)
        parts.append(text(x0 + share * (x1 - x0), y + 8, word, "end" if share > 0.95 else "middle"))
    left_out = int((totals > 0).sum()) - len(shown)
    more = f"; {left_out} more classes are not drawn" if left_out else ""
    parts.append(text((x0 + x1) / 2, y + 24, f"{unit}{more}", "middle"))
    told = f"{' and '.join(band.name for band in bands)} along {most * step:,} positions"
    if len(bands) == 2:
        told += f", {_agreement(*bands):.0%} alike"
    return frame(WIDTH, y + 30, told, "".join(parts))


def _strip(band: Band, label: int, most: int, columns: int, corner: tuple[float, float]) -> list[str]:
    """Paths of where a band has a label, a path for each shade."""
    bounds = np.concatenate([[0], np.cumsum([length for _, length in band.runs])])
    held = np.concatenate([[0], np.cumsum([length if own == label else 0 for own, length in band.runs])])
    edges = np.linspace(0, most, columns + 1)
    share = np.diff(np.interp(edges, bounds, held)) / (most / columns)
    level = np.ceil(share * _LEVELS - 1e-6).astype(int)
    starts = np.flatnonzero(np.diff(level, prepend=-1))
    ends = np.append(starts[1:], columns)
    x0, y = corner
    found = []
    for shade in range(1, _LEVELS + 1):
        drawn = [(a, b) for a, b in zip(starts, ends, strict=True) if level[a] == shade]
        if drawn:
            path = "".join(f"M{x0 + a:.0f} {y + 1:.1f}h{b - a}v{_STRIP - 2:g}h-{b - a}z" for a, b in drawn)
            found.append(f'<path class="c{band.colour} area" fill-opacity="{shade / _LEVELS:g}" d="{path}"/>')
    return found


def _agreement(one: Band, other: Band) -> float:
    """The share of the positions that are known in the first and have the same label in the other."""
    first, second = (
        np.repeat([label for label, _ in band.runs], [length for _, length in band.runs]) for band in (one, other)
    )
    length = min(len(first), len(second))
    known = first[:length] >= 0
    return float((first[:length] == second[:length])[known].mean()) if known.any() else 0.0
