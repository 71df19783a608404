"""The metrics file of a run, which survives when the process is killed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from mambaseq.atomic import atomic_file
from mambaseq.outputs import Lines
from mambaseq.tasks.callbacks import Throughput


class _Writer(ExperimentWriter):
    def save(self) -> None:
        """Lightning's version ends lines as DOS does."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        is_new = not path.is_file()
        if self._record_new_keys() and not is_new:
            self._rewrite_with_new_header(self.metrics_keys)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(Lines(file), fieldnames=self.metrics_keys)
            if is_new:
                writer.writeheader()
            writer.writerows(self.metrics)
        self.metrics = []

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning's version empties the file first."""
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with atomic_file(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(Lines(file), fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class RunLog(CSVLogger):
    """Lightning's CSV logger with two more columns, `tokens` and `seconds`: how much the run has trained so far,
    including before a resume. A column that is added later does not endanger earlier rows."""

    def __init__(self, *arguments: Any, throughput: Throughput, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._throughput = throughput
        self._ahead: int | None = None

    def log_ahead(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write what Lightning is going to log of this training step: a run that is killed once the step's checkpoint
        is there does not log it again."""
        self.log_metrics(metrics, step)
        self.save()
        self._ahead = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead == step:
            return
        spent = {"tokens": self._throughput.tokens, "seconds": round(self._throughput.seconds, 3)}
        super().log_metrics({**metrics, **spent}, step)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]
