"""The next values of a continuous signal, with their uncertainty."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive, shown
from mambaseq.heads.base import Head, Kind, check_targets
from mambaseq.heads.distributions import Distribution, Gaussian, Quantiles
from mambaseq.heads.scaling import ChannelScale
from mambaseq.limits import WINDOW, check_setting


class ForecastHead(Head):
    """Predicts distributions of the next values of each channel, one or several steps ahead: normal ones (the loss is
    the negative log likelihood, in nats) or quantiles (the loss is twice the mean pinball loss, in units of the
    values).

    The data give only the next values, `(batch, length, n_channels)`: the value h steps ahead of a position is the
    target of the position h - 1 steps later. A target's loss is the mean over the positions that predict it, so targets
    weigh alike for every horizon.

    Args:
        d_model: width of the backbone's output.
        n_channels: channels of the signal.
        horizon: number of steps ahead to predict.
        loss: "gaussian" (mean and standard deviation) or "quantile".
        quantiles: the levels, ascending in (0, 1), of the loss "quantile"; 0.1 to 0.9 if not given.
        min_scale: smallest standard deviation, in units of the values, or of channel_std if given.
        channel_mean: mean of each channel, in its units. The loss is that of (value - mean) / std, so that channels
            weigh alike; predictions are in units of the values. The default is what the data say, otherwise values as
            they are.
        channel_std: standard deviation of each channel, in its units.
    """

    per_token: ClassVar[bool] = True
    learns: ClassVar[Kind | None] = "values"
    continues: ClassVar[Literal["tokens", "values", ""] | None] = "values"

    def __init__(
        self,
        d_model: int,
        n_channels: int,
        horizon: int = 1,
        loss: Literal["gaussian", "quantile"] = "gaussian",
        quantiles: list[float] | None = None,
        min_scale: float = 1e-3,
        channel_mean: list[float] | None = None,
        channel_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive("The forecast head", d_model=d_model, n_channels=n_channels, min_scale=min_scale)
        check_setting("model.head.horizon", horizon, 1, WINDOW.value)
        if loss not in ("gaussian", "quantile"):
            raise ConfigError(f"The forecast head has the loss gaussian or quantile, not {shown(loss)}.")
        levels = [number / 10 for number in range(1, 10)] if quantiles is None else quantiles
        steps = zip([0.0, *levels], [*levels, 1.0], strict=True)
        if loss == "quantile" and not (levels and all(low < high for low, high in steps)):
            raise ConfigError(f"model.head.quantiles must ascend, all above 0 and below 1, not {shown(levels)}.")
        self.n_channels, self.horizon, self.loss, self.min_scale = n_channels, horizon, loss, min_scale
        self.levels: Tensor
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float64), persistent=False)
        self.scale = ChannelScale(n_channels, channel_mean, channel_std)
        self.n_parameters = 2 if loss == "gaussian" else len(levels)
        self.linear = nn.Linear(d_model, horizon * n_channels * self.n_parameters)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, length, n_channels)` float, the next values at each
        position, NaN where unknown. Returns (loss, logits `(batch, length, horizon, n_channels, 2)` fp32, mean and
        standard deviation, or `(..., levels)`, ascending values). Raises ConfigError for labels of another kind or
        shape."""
        raw = self.linear(hidden.to(self.linear.weight.dtype)).float()
        raw = raw.unflatten(-1, (self.horizon, self.n_channels, self.n_parameters))
        first, more = raw[..., :1], F.softplus(raw[..., 1:])
        logits = torch.cat([first, more + self.min_scale if self.loss == "gaussian" else first + more.cumsum(-1)], -1)
        if labels is None:
            return None, self._in_units(logits)
        check_targets(self, labels, (*hidden.shape[:2], self.n_channels))
        loss = self._loss(logits, self.scale(labels.float()), mask, cu_seqlens)
        return loss, self._in_units(logits)

    def _in_units(self, logits: Tensor) -> Tensor:
        """Parameters of the distributions in units of the values, from normalised ones."""
        if (numbers := self.scale.numbers) is None:
            return logits
        mean, std = (number[:, None] for number in numbers)
        if self.loss == "gaussian":
            return torch.cat([logits[..., :1] * std + mean, logits[..., 1:] * std], -1)
        return logits * std + mean

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        length = labels.shape[1]
        known = ~labels.isnan()
        if mask is not None:
            known = known & mask[..., None]
        values = labels.masked_fill(~known, 0)
        sequence = torch.zeros(length, dtype=torch.long, device=labels.device)
        if cu_seqlens is not None:  # the packed sequence of each position
            places = torch.arange(length, device=labels.device)
            sequence = torch.searchsorted(cu_seqlens[1:].long(), places, right=True)
        total, told = torch.zeros_like(values), torch.zeros_like(values)
        for ahead in range(min(self.horizon, length)):
            behind = length - ahead
            losses = self._of(logits[:, :behind, ahead], values[:, ahead:])
            same = (sequence[:behind] == sequence[ahead:])[None, :, None]
            # each step's first target: earlier ones have no position that far before them
            total = total + F.pad(losses.masked_fill(~(same & known[:, ahead:]), 0), (0, 0, ahead, 0))
            told = told + F.pad(same.to(told), (0, 0, ahead, 0))
        return (total / told.clamp(min=1)).sum() / known.sum().clamp(min=1)

    def _of(self, parameters: Tensor, values: Tensor) -> Tensor:
        """Losses `(batch, length, n_channels)` from the distributions' parameters `(..., parameters)`."""
        found = self._distribution(parameters)
        if isinstance(found, Gaussian):
            z = (values - found.mean) / found.scale
            return z.square() / 2 + found.scale.log() + math.log(2 * math.pi) / 2
        return found.crps(values)

    def _distribution(self, parameters: Tensor) -> Distribution:
        if self.loss == "gaussian":
            return Gaussian(parameters[..., 0], parameters[..., 1])
        return Quantiles(parameters, self.levels)

    def distribution(self, logits: Tensor) -> Distribution:
        """The distribution of the next values, `(..., n_channels)`, from logits `(..., horizon, n_channels,
        parameters)`."""
        return self._distribution(logits[..., 0, :, :])

    def columns(self) -> list[str]:
        """Names of the numbers in the logits of a position."""
        kinds = ["mean", "std"] if self.loss == "gaussian" else [f"q{level:g}" for level in self.levels.tolist()]
        return [
            f"{kind}_{channel}" + (f"_ahead_{ahead}" if self.horizon > 1 else "")
            for ahead in range(1, self.horizon + 1)
            for channel in range(1, self.n_channels + 1)
            for kind in kinds
        ]
