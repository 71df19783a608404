"""Metrics of several labels, any of which may apply, for sequences or positions; -100 does not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput


class _Multilabel(Metric):
    """Checks that there are as many labels as the data name."""

    measures: ClassVar[Kind | None] = "multilabels"
    higher_is_better = True

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        if not self.class_names:
            raise ConfigError(f"{type(self).__name__} needs labelled data; this dataset has no classes.")

    def _rows(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels, `(rows, labels)` both."""
        assert output.logits is not None
        assert batch.targets is not None
        n = len(self.class_names)
        if output.logits.shape[-1] != n or batch.targets.shape[-1] != n:
            raise ConfigError(
                f"{type(self).__name__} counts the {n} labels that the data name, but the head has "
                f"{output.logits.shape[-1]} and the targets {batch.targets.shape[-1]}. Choose a head with the data's "
                "labels, or remove the metric."
            )
        return output.logits.flatten(0, -2), batch.targets.flatten(0, -2)


class AUROC(_Multilabel):
    """Exact area under the ROC curve of each label, and the mean over the labels that have both positive and negative
    rows; NaN if none has. Scores are kept until the end of the set: 5 bytes for each row and label."""

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        logits, labels = self._rows(output, batch)
        self.logits.append(logits.float())
        self.labels.append(labels.clamp(-1, 1).to(torch.int8))

    def compute(self) -> Tensor:
        logits, labels = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
        found = []
        for score, label in zip(logits.unbind(1), labels.unbind(1), strict=True):
            known = label >= 0
            if label[known].unique().numel() == 2:
                # torchmetrics would apply a sigmoid, which makes all large scores 1; ranks have the same area
                ranks = score[known].unique(return_inverse=True)[1]
                found.append(binary_auroc(ranks.double() / ranks.max().clamp(min=1), label[known].long()))
        return torch.stack(found).double().mean() if found else torch.full((), torch.nan, dtype=torch.float64)


class MultilabelF1(_Multilabel):
    """F1 of each label, predicted where its probability is above 1/2, and the mean over labels; a label that neither
    applies nor is predicted counts as 0."""

    counts: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        # true positives; labels that apply plus labels that are predicted
        self.add_state("counts", torch.zeros(2, len(self.class_names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        logits, labels = self._rows(output, batch)
        known = labels != -100
        said, holds = (logits > 0) & known, (labels == 1) & known
        self.counts += torch.stack([(said & holds).sum(0), said.sum(0) + holds.sum(0)])

    def compute(self) -> Tensor:
        hits, sums = self.counts.double()
        return (2 * hits / sums.clamp(min=1)).mean()
