"""Pictures of a run: learning curves and confusion matrices."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mambaseq.outputs import output_file
from mambaseq.reporting.curves import smoothed
from mambaseq.reporting.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    """An empty one. Matplotlib is imported for it: commands that draw nothing start without."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def save_png(path: Path, figure: Figure) -> None:
    """Write the figure as a PNG file, whole or not at all. Raises what `output_file` raises, as for a full disk."""
    with output_file(path) as file:
        file.write(png(figure))


def learning_curves(run: RunFolder, scale: float = 1.0, unit: str = "loss (nats)") -> Figure:
    """Training loss, smoothed above its faint values, and validation loss over steps. scale multiplies the losses
    (1/ln 2 for bits)."""
    figure = _figure(6, 3.2)
    axes = figure.subplots()
    for metric, colour in (("train/loss", "C0"), ("val/loss", "C1")):
        points = run.curve(metric)
        if points:
            steps, values = zip(*points, strict=True)
            losses, name = np.array(values) * scale, metric.split("/")[0]
            if name == "train":
                axes.plot(steps, losses, color=colour, alpha=0.3, lw=1)
                axes.plot(steps, smoothed(losses), color=colour, label=name)
            else:
                axes.plot(steps, losses, color=colour, label=name, marker="o", ms=3)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()
    return figure


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Rows are true classes; a cell shows the count, its colour the share of the row."""
    table = np.asarray(counts)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure = _figure(0.7 * len(names) + 2, 0.6 * len(names) + 1.6)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(names)):
        for column in range(len(names)):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure
