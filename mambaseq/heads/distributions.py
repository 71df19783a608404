"""Distributions of values that a head predicts, each for many values at once."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from mambaseq.trees import register_tree


class Distribution(abc.ABC):
    """Distributions of values of one shape, `(..., outputs)`: dataclasses of tensors."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_tree(cls)

    @abc.abstractmethod
    def point(self) -> Tensor:
        """The best single value of each, `(..., outputs)`."""

    @abc.abstractmethod
    def quantile(self, share: Tensor) -> Tensor:
        """The quantile at a share in (0, 1), `(..., outputs)`."""

    @abc.abstractmethod
    def crps(self, values: Tensor) -> Tensor:
        """Continuous ranked probability scores, `(..., outputs)`: in units of the values; 0 is best (Gneiting and
        Raftery, doi:10.1198/016214506000001437)."""

    def sample(self, uniform: Tensor, temperature: float = 1.0) -> Tensor:
        """A sample from uniform numbers in [0, 1), `(..., outputs)`. temperature: scales the distance from `point`,
        which 0 gives."""
        if temperature == 0:
            return self.point()
        share = (uniform.double() + 2.0**-33).clamp(max=1 - 2.0**-33)
        point = self.point()
        return point + temperature * (self.quantile(share).to(point.dtype) - point)


@dataclasses.dataclass
class Point(Distribution):
    """A single value with all the probability."""

    values: Tensor

    def point(self) -> Tensor:
        return self.values

    def quantile(self, share: Tensor) -> Tensor:
        return self.values.expand(share.shape)

    def crps(self, values: Tensor) -> Tensor:
        return (values - self.values).abs()


@dataclasses.dataclass
class Gaussian(Distribution):
    """Normal distributions: mean and standard deviation of each."""

    mean: Tensor
    scale: Tensor

    def point(self) -> Tensor:
        return self.mean

    def quantile(self, share: Tensor) -> Tensor:
        return self.mean + self.scale * torch.special.ndtri(share).to(self.mean.dtype)

    def crps(self, values: Tensor) -> Tensor:
        z = (values - self.mean) / self.scale
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        return self.scale * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


@dataclasses.dataclass
class Quantiles(Distribution):
    """Quantiles at some levels, ascending along the last dimension, `(..., outputs, levels)`, with linear interpolation
    and extrapolation. The score is twice the mean pinball loss of the levels."""

    values: Tensor
    levels: Tensor

    def point(self) -> Tensor:
        """The median."""
        return self.quantile(torch.full(self.values.shape[:-1], 0.5, device=self.values.device)).to(self.values.dtype)

    def quantile(self, share: Tensor) -> Tensor:
        if len(self.levels) == 1:
            return self.values[..., 0].expand(share.shape)
        levels = self.levels.to(share)
        at = torch.searchsorted(levels, share.contiguous()).clamp(1, len(levels) - 1)
        low, high = (self.values.gather(-1, (at - back)[..., None])[..., 0].to(share) for back in (1, 0))
        return low + (share - levels[at - 1]) / (levels[at] - levels[at - 1]) * (high - low)

    def crps(self, values: Tensor) -> Tensor:
        difference = values[..., None] - self.values
        levels = self.levels.to(difference)
        return 2 * torch.maximum(levels * difference, (levels - 1) * difference).mean(-1)
