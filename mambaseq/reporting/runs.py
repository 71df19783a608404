"""A run's folder: what lies where, and what is read from it.

config.yaml   checkpoints/last.ckpt, best.ckpt   model/ (weights and description)   logs/version_K/metrics.csv
tensorboard/  results.json   curves.png   confusion.png
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from mambaseq.atomic import atomic_file
from mambaseq.errors import UserError


class RunFolder:
    """Paths of a run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.model = self.path / "model"
        self.weights = self.model / "model.safetensors"
        self.logs = self.path / "logs"
        self.results = self.path / "results.json"

    def require(self) -> RunFolder:
        """Raise UserError unless a run was begun here."""
        if not self.config.is_file():
            raise UserError(
                f"There is no run at {self.path}: config.yaml is missing. Give the folder that `mambaseq fit` made."
            )
        return self

    def next_version(self) -> int:
        """Number of the next metrics file: a resumed run goes on in one of its own, so that none is lost."""
        return sum(1 for _ in self.logs.glob("version_*"))

    def read_results(self) -> dict[str, Any]:
        """What results.json holds; nothing when there is none yet. Raises UserError when it is damaged."""
        if not self.results.is_file():
            return {}
        try:
            results = json.loads(self.results.read_text(encoding="utf-8"))
            if not isinstance(results, dict):
                raise TypeError("it holds no results")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.results} is damaged ({error}). Delete it; `mambaseq validate` and `mambaseq test` write their "
                f"results again."
            ) from error
        return results

    def update_results(self, **values: Any) -> None:
        """Merge values into results.json. Raises UserError when the file that is there is damaged."""
        merged = {**self.read_results(), **values}
        with atomic_file(self.results, "w", encoding="utf-8") as file:
            json.dump(merged, file, indent=2)
            file.write("\n")

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a logged metric over all starts of the run, a repeated step's last value."""
        points: dict[int, float] = {}
        for path in sorted(self.logs.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:])):
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get(metric):
                        points[int(row["step"])] = float(row[metric])
        return sorted(points.items())
