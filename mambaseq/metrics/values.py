"""Metrics of real values, for sequences or positions; unknown ones (NaN) are left out."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
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


def values_of(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predicted and true values, both `(..., outputs)` float64; NaN where the true one is unknown.

    Raises ConfigError if their numbers differ."""
    values, targets = output.values, batch.targets
    assert values is not None
    assert targets is not None
    if values.shape != targets.shape and values.shape[-1] == 1 and values.shape[:-1] == targets.shape:
        targets = targets[..., None]
    if values.shape != targets.shape:
        raise ConfigError(
            f"The data give values {tuple(targets.shape)}, but the head {tuple(values.shape)}. Set the head's number "
            "of outputs to that of the data, or remove the metric."
        )
    return values.double(), targets.double()


class _Errors(Metric):
    """Sums an error of each known value, in float64."""

    measures: ClassVar[Kind | None] = "values"
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        values, targets = values_of(output, batch)
        known = ~targets.isnan()
        self.total += self._errors(values, targets)[known].sum()
        self.count += known.sum()

    @abc.abstractmethod
    def _errors(self, values: Tensor, targets: Tensor) -> Tensor: ...

    def compute(self) -> Tensor:
        return self._score(self.total / self.count)

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        if not answers.point:
            return None
        values, targets = values_of(*answers.rows())
        known = ~targets.isnan()
        errors = torch.where(known, self._errors(values, targets), 0.0).sum(1)
        total, count = answers.summed(torch.stack([errors, known.sum(1)], 1), draws).unbind(1)
        return self._score(total / count)

    def _score(self, mean: Tensor) -> Tensor:
        return mean


class MAE(_Errors):
    """Mean absolute error of a value."""

    def _errors(self, values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).abs()


class RMSE(_Errors):
    """Root of the mean squared error of a value."""

    def _errors(self, values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).square()

    def _score(self, mean: Tensor) -> Tensor:
        return mean.sqrt()


class CRPS(_Errors):
    """Mean continuous ranked probability score of a head with a distribution (see `heads/distributions.py`); for other
    heads the mean absolute error, which is the same for a single value."""

    def update(self, output: ModelOutput, batch: Batch) -> None:
        self._told = output.distribution
        super().update(output, batch)

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        self._told = None
        return super().drawn(answers, draws)

    def _errors(self, values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).abs() if self._told is None else self._told.crps(targets.float()).double()


class Correlation(Metric):
    """Pearson's r of each output over the known values, and the mean over outputs. Outputs with fewer than two known
    values, or constant ones, are left out; NaN if all are."""

    measures: ClassVar[Kind | None] = "values"
    higher_is_better = True
    moments: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        # (parts, outputs, 6): count, means, sums of squared deviations and of their products. One part for each batch,
        # merged by Chan's formula, so that no large numbers are subtracted
        self.add_state("moments", torch.zeros(0, 0, 6, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, output: ModelOutput, batch: Batch) -> None:
        values, targets = (tensor.flatten(0, -2) for tensor in values_of(output, batch))
        known = ~targets.isnan()
        count = known.sum(0).double()
        x, y = values.masked_fill(~known, 0), targets.masked_fill(~known, 0)
        means = x.sum(0) / count.clamp(min=1), y.sum(0) / count.clamp(min=1)
        dx, dy = ((part - mean).masked_fill(~known, 0) for part, mean in zip((x, y), means, strict=True))
        new = torch.stack([count, *means, (dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0)], -1)
        self.moments = new[None] if not len(self.moments) else _merged(self.moments[0], new)[None]

    def compute(self) -> Tensor:
        parts = self.moments.reshape(-1, *self.moments.shape[-2:])  # one a process
        if not len(parts):
            return torch.full((), torch.nan, dtype=torch.float64)
        whole = parts[0]
        for part in parts[1:]:
            whole = _merged(whole, part)
        return _mean_r(whole)

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        if not answers.point:
            return None
        values, targets = values_of(*answers.rows())
        known = ~targets.isnan()
        # from the means of the whole set, so that no large numbers are subtracted
        x, y = (
            torch.where(known, part - torch.where(known, part, 0.0).sum(0) / known.sum(0).clamp(min=1), 0.0)
            for part in (values, targets)
        )
        sums = answers.summed(torch.stack([known.double(), x, y, x * x, y * y, x * y], -1).flatten(1), draws)
        return _mean_r(_centred(sums.unflatten(1, (-1, 6))))


class Spearman(Metric):
    """Spearman's rank correlation of each output over the known values, and the mean over outputs. Equal values share
    the mean of their ranks. Outputs are left out as by `Correlation`. Values are kept until the end of the set: 8 bytes
    for each."""

    measures: ClassVar[Kind | None] = "values"
    higher_is_better = True
    values: list[Tensor]
    truths: list[Tensor]

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("truths", [], dist_reduce_fx="cat")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        values, targets = (tensor.flatten(0, -2) for tensor in values_of(output, batch))
        self.values.append(values.float())
        self.truths.append(targets.float())

    def compute(self) -> Tensor:
        truths = dim_zero_cat(self.truths)
        return _rank_correlation(dim_zero_cat(self.values), truths, [truths.new_ones(1, len(truths))])[0]

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        if not answers.point:
            return None
        values, targets = values_of(*answers.rows())
        parts = draws.split(max(_AT_ONCE // max(len(answers), 1), 1))
        return _rank_correlation(values.float(), targets.float(), (answers.weights(some) for some in parts))


_AT_ONCE = 2**21  # ranks that are in memory together, of rows and draws


def _rank_correlation(values: Tensor, targets: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """`(draws,)` float64 of values and targets `(rows, outputs)`. weights: `(some draws, rows)` each, how often a row
    is drawn."""
    known = [~y.isnan() for y in targets.unbind(1)]
    # the place of each row among the different values is the same in all draws
    places = [
        [part[of].unique(return_inverse=True)[1] for part in (x, y)]
        for x, y, of in zip(values.unbind(1), targets.unbind(1), known, strict=True)
    ]
    found = []
    for some in weights:
        columns = []
        for pair, of in zip(places, known, strict=True):
            times = some[:, of].double()
            count = times.sum(1)
            ranks = [_ranks(place, times) for place in pair]
            means = [(times * rank).sum(1, keepdim=True) / count[:, None].clamp(min=1) for rank in ranks]
            dx, dy = (rank - mean for rank, mean in zip(ranks, means, strict=True))
            sums = [(times * a * b).sum(1) for a, b in ((dx, dx), (dy, dy), (dx, dy))]
            columns.append(torch.stack([count, count * 0, count * 0, *sums], -1))
        found.append(_mean_r(torch.stack(columns, 1)))
    return torch.cat(found)


def _ranks(place: Tensor, times: Tensor) -> Tensor:
    """`(draws, rows)`: the rank of each row among those that are drawn, `times` often; equal values share one. place:
    `(rows,)` int64, of each row's value among the different ones."""
    counts = times.new_zeros(len(times), int(place.max()) + 1 if len(place) else 0).index_add_(1, place, times)
    return (counts.cumsum(1) - (counts - 1) / 2)[:, place]


def _mean_r(moments: Tensor) -> Tensor:
    """The mean r `(...)` of the outputs that have one: of moments `(..., outputs, 6)`."""
    count, _, _, xx, yy, xy = moments.unbind(-1)
    # a constant has no r; rounding makes constants not exactly constant
    tiny = torch.finfo(torch.float32).eps ** 2
    scale = count * (1 + moments[..., 1:3].square().amax(-1))
    good = (count > 1) & (xx > tiny * scale) & (yy > tiny * scale)
    r = torch.where(good, xy / (xx * yy).sqrt(), 0.0).clamp(-1, 1)
    return r.sum(-1) / good.sum(-1)


def _centred(sums: Tensor) -> Tensor:
    """Moments of sums `(..., 6)`: of 1, x, y, xx, yy and xy."""
    count, x, y, xx, yy, xy = sums.unbind(-1)
    n = count.clamp(min=1)
    return torch.stack([count, x / n, y / n, xx - x * x / n, yy - y * y / n, xy - x * y / n], -1)


def _merged(one: Tensor, other: Tensor) -> Tensor:
    """The moments `(outputs, 6)` of two sets together (Chan, Golub and LeVeque, 1983)."""
    n, m = one[..., 0], other[..., 0]
    total = (n + m).clamp(min=1)
    dx, dy = other[..., 1] - one[..., 1], other[..., 2] - one[..., 2]
    between = torch.stack([dx * dx, dy * dy, dx * dy], -1) * (n * m / total)[..., None]
    means = one[..., 1:3] + torch.stack([dx, dy], -1) * (m / total)[..., None]
    return torch.cat([(n + m)[..., None], means, one[..., 3:] + other[..., 3:] + between], -1)
