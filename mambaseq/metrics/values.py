"""Metrics of real values, for sequences or positions; unknown ones (NaN) are left out."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
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
        return self.total / self.count


class MAE(_Errors):
    """Mean absolute error of a value."""

    def _errors(self, values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).abs()


class RMSE(_Errors):
    """Root of the mean squared error of a value."""

    def _errors(self, values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).square()

    def compute(self) -> Tensor:
        return super().compute().sqrt()


class CRPS(_Errors):
    """Mean continuous ranked probability score of a head with a distribution (see `heads/distributions.py`); for other
    heads the mean absolute error, which is the same for a single value."""

    def update(self, output: ModelOutput, batch: Batch) -> None:
        self._told = output.distribution
        super().update(output, batch)

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
        count, _, _, xx, yy, xy = whole.unbind(-1)
        # a constant has no r; rounding makes constants not exactly constant
        tiny = torch.finfo(torch.float32).eps ** 2
        scale = count * (1 + whole[..., 1:3].square().amax(-1))
        good = (count > 1) & (xx > tiny * scale) & (yy > tiny * scale)
        return (xy / (xx * yy).sqrt())[good].clamp(-1, 1).mean()


def _merged(one: Tensor, other: Tensor) -> Tensor:
    """The moments `(outputs, 6)` of two sets together (Chan, Golub and LeVeque, 1983)."""
    n, m = one[..., 0], other[..., 0]
    total = (n + m).clamp(min=1)
    dx, dy = other[..., 1] - one[..., 1], other[..., 2] - one[..., 2]
    between = torch.stack([dx * dx, dy * dy, dx * dy], -1) * (n * m / total)[..., None]
    means = one[..., 1:3] + torch.stack([dx, dy], -1) * (m / total)[..., None]
    return torch.cat([(n + m)[..., None], means, one[..., 3:] + other[..., 3:] + between], -1)
