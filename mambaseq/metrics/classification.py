"""Metrics of labels, all computed from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput


class Confusion(Metric):
    """Confusion matrix `(n_classes, n_classes)`: rows are true classes, columns predicted ones. Labels belong to
    sequences or positions; -100 does not count."""

    scalar = False
    measures: ClassVar[Kind | None] = "labels"
    higher_is_better: bool | None = None
    counts: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        if len(self.class_names) < 2:
            raise ConfigError(f"{type(self).__name__} needs labelled data; this dataset has no classes.")
        n = len(self.class_names)
        self.add_state("counts", torch.zeros(n, n, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        assert output.logits is not None
        assert batch.targets is not None
        n = len(self.class_names)
        if output.logits.shape[-1] != n:
            raise ConfigError(
                f"{type(self).__name__} counts the {n} classes of the data, but the head has "
                f"{output.logits.shape[-1]}. Choose a head with the data's classes, or remove the metric."
            )
        known = batch.targets.flatten() != -100
        logits, targets = output.logits.flatten(0, -2)[known], batch.targets.flatten()[known]
        self.counts += multiclass_confusion_matrix(logits, targets, num_classes=n)

    def compute(self) -> Tensor:
        return self.counts


class Accuracy(Confusion):
    """Share of the labels (of sequences or positions) that are ranked first."""

    scalar = True
    higher_is_better = True

    def compute(self) -> Tensor:
        return self.counts.diagonal().sum() / self.counts.sum()


class MacroF1(Confusion):
    """Unweighted mean of the classes' F1; a class that is neither present nor predicted counts as 0."""

    scalar = True
    higher_is_better = True

    def compute(self) -> Tensor:
        hits = self.counts.diagonal().double()
        sums = self.counts.sum(0) + self.counts.sum(1)
        return (2 * hits / sums.clamp(min=1)).mean()


class MCC(Confusion):
    """Matthews correlation coefficient for several classes (Gorodkin's R_K, doi:10.1016/j.compbiolchem.2004.09.006);
    0 where it is undefined."""

    scalar = True
    higher_is_better = True

    def compute(self) -> Tensor:
        counts = self.counts.double()
        true, predicted, n = counts.sum(1), counts.sum(0), counts.sum()
        covariance = counts.diagonal().sum() * n - (true * predicted).sum()
        scale = ((n**2 - (predicted**2).sum()) * (n**2 - (true**2).sum())).sqrt()
        return torch.where(scale > 0, covariance / scale, torch.zeros_like(scale))
