"""Whether a model is right as often as it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.heads.base import Kind
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput

BINS = 15


def binned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each row, `(rows,)` int64, and its count, confidence and whether it is right, `(rows, 3)` float64.

    The confidence is the probability of the class that is ranked first; bins are of equal width, with their upper ends.
    """
    confidence, said = logits.double().softmax(-1).max(-1)
    right = (said == targets).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return place, torch.stack([torch.ones_like(confidence), confidence, right], 1)


class ECE(Metric):
    """Expected calibration error of labels (of sequences or positions): the mean difference, over 15 bins of equal
    width of the first-ranked class's probability, between that probability and the share that is right (Guo et al.,
    arXiv:1706.04599). 0 is best."""

    measures: ClassVar[Kind | None] = "labels"
    higher_is_better = False
    sums: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("sums", torch.zeros(BINS, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        assert output.logits is not None
        assert batch.targets is not None
        targets = batch.targets.flatten()
        known = targets != -100
        place, parts = binned(output.logits.flatten(0, -2)[known], targets[known])
        self.sums.index_add_(0, place, parts)

    def compute(self) -> Tensor:
        return _error(self.sums)

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        place, parts = binned(answers.outputs, answers.targets)
        own = torch.zeros(answers.n_sequences * BINS, 3, dtype=torch.float64)
        own.index_add_(0, answers.owner * BINS + place, parts)  # of each sequence: rows times bins would be many
        return _error((draws.double() @ own.reshape(answers.n_sequences, -1)).unflatten(1, (BINS, 3)))


def _error(sums: Tensor) -> Tensor:
    count, confidence, right = sums.unbind(-1)
    return (confidence - right).abs().sum(-1) / count.sum(-1)
