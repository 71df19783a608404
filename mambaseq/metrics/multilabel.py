"""Metrics of several labels, any of which may apply, for sequences or positions; -100 does not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric
from mambaseq.metrics.ranking import Ranked, precision_area, roc_area
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


class _RankedLabels(Ranked, _Multilabel):
    """Scores are the logits; areas are means over the labels that have both positive and negative rows."""

    def _scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = self._rows(output, batch)
        return logits.float(), labels.clamp(-1, 1).to(torch.int8)


class AUROC(_RankedLabels):
    """Exact area under the ROC curve of each label, and the mean over the labels that have both positive and negative
    rows; NaN if none has. Scores are kept until the end of the set: 5 bytes for each row and label."""

    area = staticmethod(roc_area)


class MultilabelAUPRC(_RankedLabels):
    """Exact average precision of each label, and the mean over the labels that have both positive and negative rows;
    NaN if none has. Scores are kept until the end of the set, as by `AUROC`."""

    area = staticmethod(precision_area)


class MultilabelF1(_Multilabel):
    """F1 of each label, predicted where its probability is above 1/2, and the mean over labels; a label that neither
    applies nor is predicted counts as 0."""

    counts: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        # true positives; labels that apply plus labels that are predicted
        self.add_state("counts", torch.zeros(2, len(self.class_names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        self.counts += self._counted(*self._rows(output, batch)).sum(0)

    def compute(self) -> Tensor:
        return self._score(self.counts.double())

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        counted = self._counted(answers.outputs, answers.targets)
        return self._score(answers.summed(counted.flatten(1), draws).unflatten(1, counted.shape[1:]))

    def _counted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`(rows, 2, labels)` int64."""
        known = labels != -100
        said, holds = (logits > 0) & known, (labels == 1) & known
        return torch.stack([(said & holds).long(), said.long() + holds.long()], 1)

    def _score(self, counts: Tensor) -> Tensor:
        hits, sums = counts.unbind(-2)
        return (2 * hits / sums.clamp(min=1)).mean(-1)
