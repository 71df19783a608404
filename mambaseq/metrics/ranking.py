"""Areas under curves: how well scores rank what holds above what does not. Scores are kept until the end of the set."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput

_AT_ONCE = 2**21  # weights of rows
_MANY = 2**17  # rows of positions: of more, the areas of draws are computed from bins
Area = Callable[[Tensor, Tensor], Tensor]


def roc_area(hits: Tensor, misses: Tensor) -> Tensor:
    """Areas under ROC curves, `(draws,)` float64; ties count half. hits, misses: `(draws, thresholds)` float64, how
    many rows of each kind have a score, from the lowest score to the highest."""
    below = misses.cumsum(-1) - misses / 2
    return (hits * below).sum(-1) / (hits.sum(-1) * misses.sum(-1))


def precision_area(hits: Tensor, misses: Tensor) -> Tensor:
    """Average precision: the mean of the precision at each threshold, weighted by the recall that it adds. Arguments as
    of `roc_area`."""
    found, said = (x.flip(-1).cumsum(-1).flip(-1) for x in (hits, hits + misses))
    return (hits * found / said.clamp(min=1)).sum(-1) / hits.sum(-1)


def areas(scores: Tensor, labels: Tensor, weights: Tensor, area: Area, owner: Tensor | None = None) -> Tensor:
    """The mean area of the columns that have rows of both kinds, `(draws,)` float64; NaN where none has.

    scores: `(rows, n)`. labels: `(rows, n)`: 1 where a label holds, 0 where not, negative where unknown. weights:
        `(draws, rows)`, how often a row is drawn; or, with the owner `(rows,)` of each row, `(draws, owners)`.
    """
    total = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    count = torch.zeros_like(total)
    for score, label in zip(scores.unbind(1), labels.unbind(1), strict=True):
        known = (label >= 0).nonzero()[:, 0]
        order = known[score[known].argsort()]
        ends = torch.ones(len(order), dtype=torch.bool, device=order.device)
        ends[:-1] = score[order[1:]] != score[order[:-1]]
        holds = label[order].double()
        place = order if owner is None else owner[order]
        for first in range(0, len(weights), step := max(_AT_ONCE // max(len(order), 1), 1)):
            some = weights[first : first + step, place].double()
            hits, misses = (_between(some * kind, ends) for kind in (holds, 1 - holds))
            both = (hits.sum(-1) > 0) & (misses.sum(-1) > 0)
            found = area(hits, misses)
            total[first : first + step] += torch.where(both, found, 0.0)
            count[first : first + step] += both
    return torch.where(count > 0, total / count, torch.nan)


def _between(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of values `(draws, rows)` over rows up to each of the ends."""
    if bool(ends.all()):
        return values
    sums = values.cumsum(-1)[:, ends]
    return torch.cat([sums[:, :1], sums.diff(dim=-1)], -1)


def _in_cells(values: Tensor, owner: Tensor, cell: Tensor, n: int, cells: int, draws: Tensor) -> Tensor:
    """Sums of values `(rows,)` over the rows in each of the cells, `(draws, cells)` float64. owner: the sequence of a
    row, of n. draws: `(draws, n)`, how often each is drawn."""
    if n * cells <= _AT_ONCE * 16:
        own = torch.zeros(n * cells, dtype=torch.float64).index_add_(0, owner * cells + cell, values)
        return draws.double() @ own.reshape(n, cells)
    found = torch.zeros(len(draws), cells, dtype=torch.float64)  # a table of all sequences would take gigabytes
    for sums, one in zip(found, draws, strict=True):
        sums.index_add_(0, cell, values * one[owner])
    return found


def _binned_areas(scores: Tensor, labels: Tensor, answers: Answers, draws: Tensor, area: Area) -> Tensor:
    """`areas` of scores that are cut into a few thousand bins of about as many rows each, whose rows count as ties:
    close enough for intervals (the set's own area is exact), and a hundred times as fast where sequences have many
    rows."""
    n, bins = answers.n_sequences, max(min(_AT_ONCE * 16 // answers.n_sequences, 4096), 256)
    found = []
    for score, label in zip(scores.unbind(1), labels.unbind(1), strict=True):
        known = (label >= 0).nonzero()[:, 0]
        order = known[score[known].argsort()]
        ranked = score[order]
        first = torch.searchsorted(ranked, ranked)  # equal scores have one place
        cell, owner = first * bins // max(len(order), 1), answers.owner[order]
        holds = label[order].double()
        hits, misses = (_in_cells(of, owner, cell, n, bins, draws) for of in (holds, 1 - holds))
        both = (hits.sum(-1) > 0) & (misses.sum(-1) > 0)
        found.append(torch.where(both, area(hits, misses), torch.nan))
    return torch.stack(found).nanmean(0)


class Ranked(Metric):
    """Keeps the scores and labels of all rows.

    area: the area under a curve of one label; see `areas`.
    """

    higher_is_better = True
    area: Area
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    @abc.abstractmethod
    def _scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores and labels of a batch, as `areas` takes them."""

    def update(self, output: ModelOutput, batch: Batch) -> None:
        scores, labels = self._scores(output, batch)
        self.scores.append(scores)
        self.labels.append(labels)

    def compute(self) -> Tensor:
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        return areas(scores, labels, labels.new_ones(1, len(labels), dtype=torch.long), self.area)[0]

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        scores, labels = self._scores(*answers.rows())
        if len(scores) > _MANY and answers.per_token:
            return _binned_areas(scores, labels, answers, draws, self.area)
        return areas(scores, labels, draws, self.area, answers.owner)


class _RankedClasses(Ranked):
    """Classes of sequences or positions; scores are log odds, so that none are rounded to 1."""

    measures: ClassVar[Kind | None] = "labels"

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        if len(self.class_names) < 2:
            raise ConfigError(f"{type(self).__name__} needs labelled data; this dataset has no classes.")

    def _scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        assert output.logits is not None
        assert batch.targets is not None
        logits, targets, n = output.logits.flatten(0, -2), batch.targets.flatten(), len(self.class_names)
        if logits.shape[-1] != n:
            raise ConfigError(
                f"{type(self).__name__} ranks the {n} classes of the data, but the head has {logits.shape[-1]}. Choose "
                "a head with the data's classes, or remove the metric."
            )
        known = targets != -100
        return one_against_rest(logits[known], targets[known])


def one_against_rest(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds of each class, `(rows, n)` float64, and whether it is the true one, int8; of two classes the second
    alone, `(rows, 1)`. logits: `(rows, n)`. targets: `(rows,)` int64."""
    logits = logits.double()
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1], targets[:, None].to(torch.int8)
    classes = torch.arange(logits.shape[1], device=logits.device)
    others = [logits[:, classes != one].logsumexp(1) for one in classes]
    return logits - torch.stack(others, 1), (targets[:, None] == classes).to(torch.int8)


class LabelAUROC(_RankedClasses):
    """Exact area under the ROC curve: of two classes, how well the second one's is ranked; of several, the mean over
    the classes, each against the rest. Classes that never or always occur are left out; NaN if that leaves none. Scores
    are kept until the end of the set: 9 bytes for each row and class."""

    area = staticmethod(roc_area)


class LabelAUPRC(_RankedClasses):
    """Exact average precision, the area under the precision-recall curve: of two classes that of the second; of several
    the mean over the classes, each against the rest. Classes and scores as by `LabelAUROC`."""

    area = staticmethod(precision_area)
