"""Normalisation of channels to mean 0 and standard deviation 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, shown
from mambaseq.mixers.hippo import constant, keep_constant


class ChannelScale(nn.Module):
    """Converts values in their units to multiples of a channel's standard deviation, and back, in fp32. The numbers are
    part of a model's description, not of its weights.

    n_channels: of the values. mean, std: one for each channel, in units of the values; with None for both nothing
        changes.
    Raises ConfigError for one without the other, a wrong number of them, or standard deviations that are not above 0.
    """

    def __init__(self, n_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        self.changes = mean is not None or std is not None
        if not self.changes:
            return
        numbers = [list(one) for one in (mean, std) if one is not None]
        if [len(one) for one in numbers] != [n_channels, n_channels]:
            raise ConfigError(
                f"channel_mean and channel_std must be one number for each of {n_channels} channels, not {shown(mean)} "
                f"and {shown(std)}."
            )
        if not all(map(math.isfinite, (*numbers[0], *numbers[1]))) or not all(one > 0 for one in numbers[1]):
            raise ConfigError(
                f"channel_mean and channel_std must be finite numbers, and channel_std above 0, not {shown(mean)} and "
                f"{shown(std)}. A channel that never changes has a channel_std of 1."
            )
        # a model's dtype must not round them: half precision would shift a channel far from 0
        keep_constant(self, mean=torch.tensor(numbers[0]), std=torch.tensor(numbers[1]))

    @property
    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation, `(n_channels,)` fp32 each."""
        if not self.changes:
            return None
        return constant(self, "mean").float(), constant(self, "std").float()

    def forward(self, values: Tensor) -> Tensor:
        """`(..., n_channels)` in their units to fp32 of mean 0 and standard deviation 1; NaN stays NaN."""
        if (numbers := self.numbers) is None:
            return values
        return (values.float() - numbers[0]) / numbers[1]
