"""Linear models of a few features: logistic regression for classes, ridge regression for labels and values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from mambaseq.heads.base import Kind

Matrix = Any
"""Features `(sequences, n)`: a numpy array, or a scipy matrix in rows."""


class Fitted(NamedTuple):
    """A linear model of scaled features.

    mean, scale: of the features; mean is 0 for sparse ones. weights: `(features, outputs)`. bias: `(outputs,)`.
    """

    mean: np.ndarray | float
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, features: Matrix) -> np.ndarray:
        """`(sequences, outputs)`: logits, log odds or values."""
        weights = self.weights / self.scale[:, None]
        return (
            np.asarray(features @ weights) - self.mean @ weights + self.bias
            if np.ndim(self.mean)
            else (np.asarray(features @ weights) + self.bias)
        )


def spread_of(features: Matrix) -> tuple[np.ndarray | float, np.ndarray]:
    """What is taken from features `(rows, features)` (nothing from sparse ones, so that they stay sparse), and what
    they are divided by: `(features,)` float64 each."""
    if sparse.issparse(features):
        square = np.asarray(features.multiply(features).mean(0)).ravel()
        deviation = np.sqrt(np.maximum(square - np.asarray(features.mean(0)).ravel() ** 2, 0))
        return 0.0, np.where(deviation > 1e-12, deviation, 1.0)
    mean = features.mean(0, dtype=np.float64)  # sums of many float32 would lose digits
    deviation = features.std(0, dtype=np.float64)
    return mean, np.where(deviation > 1e-12, deviation, 1.0)


def _scaled(features: Matrix, mean: np.ndarray | float, scale: np.ndarray) -> Matrix:
    if sparse.issparse(features):
        return (features @ sparse.diags(1 / scale)).tocsr()
    ready: np.ndarray = np.subtract(features, mean, out=np.empty_like(features), casting="same_kind")
    ready /= scale
    return ready


def logistic(
    features: Matrix, labels: np.ndarray, n_classes: int, strength: float, balanced: bool = False, scaled: bool = True
) -> Fitted:
    """Logistic regression on features of standard deviation 1, or, if not `scaled`, as they are (one-hot). labels:
    `(sequences,)` int64, all known. strength: C of scikit-learn. balanced: all classes weigh alike."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = spread_of(features) if scaled else (0.0, np.ones(features.shape[1]))
    weights, bias = np.zeros((features.shape[1], n_classes)), np.full(n_classes, -20.0)
    present = np.unique(labels)
    if len(present) < 2:
        bias[present] = 0
        return Fitted(mean, scale, weights, bias)
    model = LogisticRegression(C=strength, max_iter=300, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(_scaled(features, mean, scale) if scaled else features, labels)
    if len(present) == 2:
        weights[:, present[1]], bias[present] = model.coef_[0], (0.0, model.intercept_[0])
    else:
        weights[:, present], bias[present] = model.coef_.T, model.intercept_
    return Fitted(mean, scale, weights, bias)


def ridge(features: Matrix, targets: np.ndarray, strengths: Sequence[float]) -> list[Fitted]:
    """Ridge regression on features of standard deviation 1, one for each strength (in sequences). targets: `(sequences,
    outputs)`, NaN where unknown."""
    mean, scale = spread_of(features)
    x = _scaled(features, mean, scale)
    width = x.shape[1]
    found = [Fitted(mean, scale, np.zeros((width, targets.shape[1])), np.zeros(targets.shape[1])) for _ in strengths]
    for rows, outputs in _known(targets):
        some, y = x[rows], targets[np.ix_(rows, outputs)]
        if not len(rows):
            continue
        middle = np.asarray(some.mean(0)).ravel()
        level = y.mean(0)
        gram = some.T @ some
        gram = np.asarray(gram.todense() if sparse.issparse(gram) else gram, dtype=np.float64)
        gram -= len(rows) * np.outer(middle, middle)
        cross = np.asarray(some.T @ (y - level), dtype=np.float64)
        values, vectors = np.linalg.eigh(gram)
        turned = vectors.T @ cross
        for fitted, strength in zip(found, strengths, strict=True):
            weights = vectors @ (turned / (np.maximum(values, 0) + strength)[:, None])
            fitted.weights[:, outputs], fitted.bias[outputs] = weights, level - middle @ weights
    return found


def _known(targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows in which outputs are known, for sets of outputs that share them."""
    known = ~np.isnan(targets)
    if known.all():
        return [(np.arange(len(targets)), np.arange(targets.shape[1]))]
    return [(np.flatnonzero(known[:, column]), np.array([column])) for column in range(targets.shape[1])]


def as_values(targets: np.ndarray, kind: Kind) -> np.ndarray:
    """Values as they are, or labels, 1, 0 and below where unknown, as 1, -1 and NaN."""
    return targets if kind == "values" else np.where(targets < 0, np.nan, 2.0 * targets - 1)


def goodness(outputs: np.ndarray, targets: np.ndarray, kind: Kind) -> float:
    """What baselines are chosen by on the validation set: accuracy of classes (then likelihood), else minus the squared
    error. outputs `(rows, n)`; targets `(rows,)` of classes, else `(rows, n)`, unknown ones left out."""
    if kind == "labels":
        known = targets >= 0
        said, true = outputs[known], targets[known]
        shifted = said - said.max(1, keepdims=True)
        likelihood = (shifted[np.arange(len(true)), true] - np.log(np.exp(shifted).sum(1))).mean()
        return float((said.argmax(1) == true).mean() + 1e-6 * max(likelihood, -1e4))
    values = as_values(targets, kind)
    return -float(np.nanmean(np.square(outputs - values)))
