"""Losses of heads: each is a mean over the known targets, and 0 if there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, shown

Weights = list[float] | Literal["balanced"] | None
"""A number for each class, 1 each if None. A run puts numbers in the place of "balanced", from the data's
`class_counts`."""


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits `(..., n)` fp32, labels `(...)` int64, -100 ignored; 0 where all are."""
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def squared_loss(values: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error: values fp32 and labels float of one shape, NaN ignored; 0 where all are."""
    unknown = labels.isnan()
    difference = (values - labels.float().masked_fill(unknown, 0)).masked_fill(unknown, 0)
    return difference.square().sum() / (~unknown).sum().clamp(min=1)


class LabelLoss(nn.Module):
    """Cross-entropy of one of several classes, with options for training. In evaluation it is plain, so that validation
    losses are comparable whatever the options.

    A target's loss is multiplied by its class's weight and, with `focal_gamma`, by `(1 - p)**gamma`, where p is the
    predicted probability of its class (Lin et al., arXiv:1708.02002). The mean is over targets, not over weights, so
    the result does not depend on how an optimizer step is cut into batches.

    Args:
        n_classes: number of classes.
        class_weights: a weight for each class; None for 1.
        label_smoothing: share of each target that is spread over all classes.
        focal_gamma: 0 is the plain cross-entropy.
    """

    def __init__(
        self,
        n_classes: int,
        class_weights: Weights = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        check_loss_options(label_smoothing, focal_gamma)
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        self.weights: Tensor | None
        self.register_buffer("weights", checked_weights("class_weights", class_weights, n_classes), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits `(..., n_classes)` fp32, labels `(...)` int64, -100 ignored. Returns a mean over labels."""
        if not self.training or (self.weights is None and not self.label_smoothing and not self.focal_gamma):
            return label_loss(logits, labels)
        logits, labels = logits.flatten(0, -2), labels.flatten()
        weights = None if self.weights is None else self.weights.to(logits)
        losses = F.cross_entropy(
            logits, labels, weights, ignore_index=-100, reduction="none", label_smoothing=self.label_smoothing
        )
        if self.focal_gamma:
            p = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none").neg().exp()
            losses = losses * _focus(p, self.focal_gamma)
        return losses.sum() / (labels != -100).sum().clamp(min=1)


class BinaryLoss(nn.Module):
    """Cross-entropy of several labels, any of which may apply. As in `LabelLoss`, its options affect training only.

    Args:
        n_classes: number of labels.
        positive_weights: weight of each label where it applies; None for 1.
        label_smoothing: the target of a label that applies is 1 - label_smoothing / 2, of another label_smoothing / 2.
        focal_gamma: see `LabelLoss`; 0 is the plain cross-entropy.
    """

    def __init__(
        self,
        n_classes: int,
        positive_weights: Weights = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        check_loss_options(label_smoothing, focal_gamma)
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        weights = checked_weights("positive_weights", positive_weights, n_classes)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits `(..., n_classes)` fp32, labels the same shape int64: 1, 0, or -100, which is ignored. Returns a mean
        over labels in nats."""
        known = labels != -100
        holds = labels.clamp(min=0).to(logits)
        if not self.training:
            losses = F.binary_cross_entropy_with_logits(logits, holds, reduction="none")
        else:
            weights = None if self.weights is None else self.weights.to(logits)
            smooth = holds * (1 - self.label_smoothing) + self.label_smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction="none")
            if self.focal_gamma:
                p = F.binary_cross_entropy_with_logits(logits, holds, reduction="none").neg().exp()
                losses = losses * _focus(p, self.focal_gamma)
        return losses.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


def _focus(p: Tensor, gamma: float) -> Tensor:
    return (1 - p).clamp(min=1e-6) ** gamma  # so that the gradient is finite at p = 1 even for gamma below 1


def check_loss_options(label_smoothing: float, focal_gamma: float) -> None:
    """Raise ConfigError for values out of range."""
    if not 0 <= label_smoothing < 1 or not 0 <= focal_gamma < math.inf:
        raise ConfigError(
            f"model.head.label_smoothing must be from 0 to below 1, and model.head.focal_gamma finite and at least 0, "
            f"not {label_smoothing} and {focal_gamma}."
        )


def checked_weights(key: str, weights: Weights, count: int) -> Tensor | None:
    """`(count,)` fp32. Raises ConfigError unless they are as many finite numbers of at least 0, not all of them 0."""
    if weights is None:
        return None
    if isinstance(weights, str):
        raise ConfigError(
            f"model.head.{key} is {shown(weights)}, which a run replaces by numbers from its data. Give a number for "
            f"each of the {count} classes (mambaseq.heads.losses.balanced_weights makes them from counts)."
        )
    if len(weights) != count:
        raise ConfigError(f"model.head.{key} are {len(weights)}, but there are {count} classes. Give one for each.")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(
            f"model.head.{key} must be finite numbers of at least 0, some above it, not {shown(list(weights))}."
        )
    return torch.tensor([float(weight) for weight in weights], dtype=torch.float32)


def balanced_weights(key: str, counts: Sequence[tuple[int, int]]) -> list[float]:
    """Weights that make up for how many targets of each class there are in training.

    key: `class_weights`: all targets / (classes * those of the class), so that classes have equal parts in the loss,
        and the mean weight of a target is 1. `positive_weights`: targets that are not of the class / those that are.
    counts: of each class, how many targets are of it, and how many are not.
    Raises ConfigError for a class without a target.
    """
    if empty := [number for number, (of, _) in enumerate(counts) if not of]:
        raise ConfigError(
            f"model.head.{key} cannot be balanced: class number {empty[0] + 1} of {len(counts)} has no training "
            "target. Give data with some, or a number for each class."
        )
    if key == "positive_weights":
        return [others / of for of, others in counts]
    return [(of + others) / (len(counts) * of) for of, others in counts]
