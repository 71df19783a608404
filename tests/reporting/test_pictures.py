"""Pictures of a run."""

from __future__ import annotations

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


def test_the_curves_are_named(tmp_path: Path) -> None:
    legend = learning_curves(Curves(tmp_path, train=[(1, 2.0), (2, 1.5)], val=[(2, 1.8)])).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train", "val"]
