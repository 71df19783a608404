"""Metrics of labels, all computed from one confusion matrix."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput

_AT_ONCE = 2**23  # weights of cells of sequences: many classes along many sequences have many


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
        # torchmetrics has a function for it, and takes more than a second to import it
        cells = batch.targets.flatten()[known].long() * n + output.logits.flatten(0, -2)[known].argmax(-1)
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))  # raises for labels beyond the classes

    def compute(self) -> Tensor:
        return self.counts


class _Score(Confusion):
    """A number that a confusion matrix has."""

    scalar = True
    higher_is_better = True

    def compute(self) -> Tensor:
        return self._score(self.counts.double())

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        n = len(self.class_names)
        cells, owner = answers.targets * n + answers.outputs.argmax(-1), answers.owner
        # how often each sequence has each cell; most have one
        pairs, times = (owner * n * n + cells).unique(return_counts=True)
        found = []
        for some in draws.split(max(_AT_ONCE // max(len(pairs), 1), 1)):
            weights = some[:, pairs // (n * n)] * times
            counts = torch.zeros(len(some), n * n, dtype=torch.long).index_add_(1, pairs % (n * n), weights)
            found.append(self._score(counts.unflatten(1, (n, n)).double()))
        return torch.cat(found)

    @abc.abstractmethod
    def _score(self, counts: Tensor) -> Tensor:
        """`(...)` from matrices `(..., classes, classes)` float64."""


class Accuracy(_Score):
    """Share of the labels (of sequences or positions) that are ranked first."""

    def _score(self, counts: Tensor) -> Tensor:
        return _hits(counts).sum(-1) / counts.sum((-1, -2))


class BalancedAccuracy(_Score):
    """Unweighted mean, over the classes that occur, of the share of a class's labels that are ranked first."""

    def _score(self, counts: Tensor) -> Tensor:
        true = counts.sum(-1)
        return (_hits(counts) / true.clamp(min=1)).sum(-1) / (true > 0).sum(-1)


class MacroF1(_Score):
    """Unweighted mean of the classes' F1; a class that is neither present nor predicted counts as 0."""

    def _score(self, counts: Tensor) -> Tensor:
        return (2 * _hits(counts) / (counts.sum(-2) + counts.sum(-1)).clamp(min=1)).mean(-1)


class MCC(_Score):
    """Matthews correlation coefficient for several classes (Gorodkin's R_K, doi:10.1016/j.compbiolchem.2004.09.006);
    0 where it is undefined."""

    def _score(self, counts: Tensor) -> Tensor:
        true, predicted, n = counts.sum(-1), counts.sum(-2), counts.sum((-1, -2))
        covariance = _hits(counts).sum(-1) * n - (true * predicted).sum(-1)
        scale = ((n**2 - (predicted**2).sum(-1)) * (n**2 - (true**2).sum(-1))).sqrt()
        return torch.where(scale > 0, covariance / scale, torch.zeros_like(scale))


def _hits(counts: Tensor) -> Tensor:
    return counts.diagonal(dim1=-2, dim2=-1)
