"""Pictures of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mambaseq.reporting.pictures import learning_curves, png
from mambaseq.reporting.runs import RunFolder


class Curves(RunFolder):
    def __init__(self, path: Path, **points: list[tuple[int, float]]) -> None:
        super().__init__(path)
        self.points = points

    def curve(self, metric: str) -> list[tuple[int, float]]:
        return self.points.get(metric.partition("/")[0], [])


@pytest.mark.filterwarnings("error")
def test_a_run_too_short_for_a_curve(tmp_path: Path) -> None:
    figure = learning_curves(Curves(tmp_path))
    assert figure.axes[0].get_legend() is None
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "points",
    [
        {"train": [(0, math.nan)], "val": [(1, math.inf)]},
        {"train": [(0, 1e30), (1, -1e-30), (2, math.nan)], "val": [(2, 1e30)]},
        {"val": [(10**9, 0.0)]},
        {"train": [(step, 2.0) for step in range(30)], "val": [(9, 2.0), (29, 2.0)]},
    ],
)
def test_odd_curves_are_drawn(tmp_path: Path, points: dict[str, list[tuple[int, float]]]) -> None:
    assert png(learning_curves(Curves(tmp_path, **points))).startswith(b"\x89PNG")


def test_the_curves_are_named(tmp_path: Path) -> None:
    legend = learning_curves(Curves(tmp_path, train=[(1, 2.0), (2, 1.5)], val=[(2, 1.8)])).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train", "val"]
