"""Metrics of tasks whose answer is a few tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput


def _by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """`(batch, length)` values summed over each sequence: `(sequences,)`."""
    bounds = batch.cu_seqlens
    if bounds is None:
        return values.sum(1)
    lengths = (bounds[1:] - bounds[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    return values.new_zeros(len(lengths)).index_add(0, owner, values[0])


def _right_and_all(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """The number of targets of each sequence that are ranked first, and the number of its targets: `(sequences,)` int64
    each."""
    assert output.logits is not None
    assert batch.targets is not None
    valid = batch.targets != -100
    right = (output.logits.argmax(-1) == batch.targets) & valid
    return _by_sequence(right.long(), batch), _by_sequence(valid.long(), batch)


class SequenceAccuracy(Metric):
    """Share of the sequences with all targets ranked first; sequences without a target do not count."""

    higher_is_better = True
    per_token: ClassVar[bool | None] = True
    measures: ClassVar[Literal["labels", "values"] | None] = "labels"
    counts: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        right, total = _right_and_all(output, batch)
        answered = total > 0
        self.counts += torch.stack([((right == total) & answered).sum(), answered.sum()])

    def compute(self) -> Tensor:
        return self.counts[0] / self.counts[1]


class AccuracyByLength(Metric):
    """Share of the targets ranked first, for sequences of 2^k up to 2^(k+1) - 1 tokens each: rows of 2^k, the number
    of targets, and the share; `(rows, 3)` float64."""

    scalar = False
    higher_is_better = None
    per_token: ClassVar[bool | None] = True
    measures: ClassVar[Literal["labels", "values"] | None] = "labels"
    counts: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("counts", torch.zeros(2, 63, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        real = torch.ones_like(batch.inputs, dtype=torch.long) if batch.mask is None else batch.mask.long()
        lengths = _by_sequence(real, batch)
        powers = 2 ** torch.arange(1, 63, device=lengths.device)
        k = torch.bucketize(lengths, powers, right=True)
        right, total = _right_and_all(output, batch)
        self.counts[0].index_add_(0, k, right)
        self.counts[1].index_add_(0, k, total)

    def compute(self) -> Tensor:
        seen = self.counts[1].nonzero()[:, 0]
        right, total = self.counts[:, seen].double()
        return torch.stack([2.0 ** seen.double(), total, right / total], 1)
