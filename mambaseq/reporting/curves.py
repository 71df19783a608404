"""A run's curves: smoothed, over steps, tokens and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mambaseq.reporting import charts
from mambaseq.reporting.charts import Curve

if TYPE_CHECKING:
    from mambaseq.reporting.runs import RunFolder

AXES = (("step", "step"), ("tokens", "tokens"), ("seconds", "seconds of training"))


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """A curve without its noise: means over a twelfth of it, nearer points weighing more. Ends are means of what is
    there; values that are not finite are left out, NaN where there is nothing else."""
    y = np.asarray(values, dtype=np.float64)
    if not len(y):
        return y
    half = max(len(y) // 24, 1)
    window = np.bartlett(2 * half + 3)[1:-1]
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), window)[half : half + len(y)]
    weight = np.convolve(known.astype(float), window)[half : half + len(y)]
    return np.divide(total, weight, out=np.full(len(y), np.nan), where=weight > 0)


def loss_charts(run: RunFolder, scale: float = 1.0, unit: str = "loss") -> str:
    """Training and validation loss over steps, tokens and seconds, of which a reader chooses; "" for a run that logged
    none. scale multiplies the losses (1/ln 2 for bits)."""
    logged = run.log()
    drawn = []
    for what, label in AXES:
        curves = []
        for name in ["train/loss", *(name for name in logged if name.startswith("val/") and name.endswith("/loss"))]:
            known = [point for point in logged.get(name, []) if getattr(point, what) is not None]
            xs = [getattr(point, what) + (what == "step") for point in known]
            values = [point.value * scale for point in known]
            if name == "train/loss":
                curves.append(Curve("", xs, values, "faint"))
                curves.append(Curve("training, smoothed", xs, smoothed(values).tolist()))
            else:
                of = name.removeprefix("val/").removesuffix("loss").rstrip("/")
                curves.append(Curve(f"validation {of}".strip(), xs, values, "dots", 1))
        if chart := charts.lines(curves, label, unit):
            drawn.append((label, chart))
    return tabs(f"loss of {run.path.name}", drawn)


def other_charts(run: RunFolder, most: int = 12) -> str:
    """Small charts of everything else that a run logged, the first `most` by name, and how many more there are; ""
    where there is nothing."""
    drawn = []
    for name, points in sorted(run.log().items()):
        if name.rpartition("/")[2] == "loss" or len(points) < 2:
            continue
        kind = "dots" if name.startswith("val/") else "curve"
        steps, values = [point.step + 1 for point in points], [point.value for point in points]
        chart = charts.lines([Curve("", steps, values, kind, int(kind == "dots"))], "step", name, 170)
        drawn += [f"<figure>{chart}</figure>"] if chart else []
    left = len(drawn) - most
    more = f"<p>{left:,} more {'is' if left == 1 else 'are'} not drawn; see the run's logs.</p>" if left > 0 else ""
    return f'<div class="small">{"".join(drawn[:most])}</div>{more}' if drawn else ""


def tabs(name: str, charts_of: Sequence[tuple[str, str]]) -> str:
    """Charts in one place, of which a reader chooses by their labels. name: theirs, unlike others on the page."""
    if not charts_of:
        return ""
    group = "".join(letter if letter.isalnum() else "-" for letter in name)
    parts = []
    for number, (label, chart) in enumerate(charts_of):
        checked = " checked" if number == 0 else ""
        one = f"{group}-{number}"
        parts.append(f'<input type="radio" name="{group}" id="{one}"{checked}><label for="{one}">{label}</label>')
        parts.append(f"<figure>{chart}</figure>")
    return f'<div class="tabs">{"".join(parts)}</div>'
