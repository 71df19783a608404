"""Scores of generated clips by a classifier's features and answers, as in SaShiMi (arXiv:2202.09729, appendix C.3) and
DiffWave (arXiv:2009.09761); beside two of them, what SaShiMi's published code computes under their name.

Features are `(clips, features)`, log probabilities `(clips, classes)`, natural logarithms from `log_probabilities`;
all is computed in float64.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from mambaseq.errors import DataError

PUBLISHED_BAND = (0.40, 0.95)
"""Shares of likelihoods between which SaShiMi's samples are kept. Its code means to choose the band by the inception
score, but never raises the best score seen so far, so that the last band of its grid always wins: this one."""

_LOWER, _UPPER = range(0, 10, 2), range(12, 20)  # twentieths; the published grid


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """`(clips, classes)` float64 of logits: finite where a probability in fp32 would be 0."""
    found: np.ndarray = log_softmax(_clips(logits, "logits"), axis=1)
    return found


def frechet_distance(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray) -> float:
    """The squared Fréchet distance of two normal distributions: |m - n|² + tr(C + D - 2 (C D)^½). Means `(features,)`,
    covariances `(features, features)`, which may be singular."""
    # tr (C D)^½ is the sum of the singular values of C^½ D^½: no root of a matrix that is not symmetric is needed
    cross = np.linalg.svd(_root(cov) @ _root(other_cov), compute_uv=False).sum()
    found = np.square(mean - other_mean).sum() + np.trace(cov) + np.trace(other_cov) - 2 * cross
    return max(0.0, float(found))  # of equal ones, rounding may leave less than nothing


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def fid(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet inception distance of features, 0 for equal ones: lower is better. Covariances are divided by n - 1, as
    published. It is too high for few clips: compare only sets of one size."""
    (mean, cov), (other_mean, other_cov) = (_moments(_clips(each, "features")) for each in (real, generated))
    return max(frechet_distance(mean, cov, other_mean, other_cov), 0.0)  # of equal sets, rounding goes below


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def inception_score(log_p: np.ndarray) -> float:
    """exp of the mean KL(p(y|x) | p(y)): from 1 (all answers alike) to the number of classes (each certain, all equally
    frequent): higher is better."""
    p, marginal = np.exp(log_p), _log_mean(log_p)
    return float(np.exp((p * (log_p - marginal)).sum(1).mean()))


def published_inception_score(log_p: np.ndarray, seed: int = 0) -> float:
    """What SaShiMi's code calls the inception score. `scipy.stats.entropy` there lacks `axis=1`, so that it compares
    how a class's probability is spread over clips, not a clip's over classes: exp of the mean over classes of
    KL(p(x|y) | uniform). It can exceed the number of classes: it grows where a class is rare. One half of the clips, in
    a random order, is compared with the other half's mean, which plays no part then. NaN for a class that no clip may
    be of."""
    p = np.exp(log_p[np.random.RandomState(seed).permutation(len(log_p))[: len(log_p) // 2]])
    with np.errstate(invalid="ignore", divide="ignore"):
        share = p / p.sum(0)
        spread = np.where(share > 0, share * np.log(share * len(share)), np.where(share == 0, 0.0, np.nan))
    return float(np.exp(spread.sum(0).mean()))


def modified_inception_score(log_p: np.ndarray) -> float:
    """exp of the mean KL(p(y|x) | p(y|x')) over all pairs of clips, a clip with itself included: 1 if all are alike, no
    upper bound; higher is better. It depends on how certain the classifier is: compare scores of one classifier."""
    p = np.exp(log_p)
    return float(np.exp((p * log_p).sum(1).mean() - p.mean(0) @ log_p.mean(0)))


def published_modified_inception_score(log_p: np.ndarray, pairs: int = 10_000, seed: int = 0) -> float:
    """The same over 10,000 random pairs, as SaShiMi's code estimates it."""
    one, other = np.random.default_rng(seed).integers(len(log_p), size=(2, pairs))
    return float(np.exp((np.exp(log_p[one]) * (log_p[one] - log_p[other])).sum(1).mean()))


def am_score(real: np.ndarray, generated: np.ndarray) -> float:
    """KL(mean answer to real clips | mean answer to generated ones) + the mean entropy of answers to generated ones, in
    nats, of log probabilities: 0 is best."""
    expected, found = _log_mean(real), _log_mean(generated)
    entropy = -(np.exp(generated) * generated).sum(1).mean()
    return float((np.exp(expected) * (expected - found)).sum() + entropy)


def _log_mean(log_p: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.logaddexp.reduce(log_p, axis=0) - np.log(len(log_p))
    return found


def _clips(values: np.ndarray, what: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or len(found) < 2:
        raise DataError(f"Scores need the {what} of at least 2 clips, (clips, {what}), not {found.shape}. Give more.")
    if not np.isfinite(found).all():
        raise DataError(f"The {what} of {int((~np.isfinite(found)).any(1).sum())} clips are not finite numbers.")
    return found


def kept(log_likelihoods: np.ndarray, lower: float = PUBLISHED_BAND[0], upper: float = PUBLISHED_BAND[1]) -> np.ndarray:
    """Rejection sampling as published: the indices of the clips `(clips,)` whose likelihood is between two shares of
    the ranking, from the lowest likelihood up. Whole clips are ranked, so they should be equally long.

    Raises DataError if none is kept.
    """
    order = np.argsort(np.asarray(log_likelihoods), kind="stable")
    found = order[int(lower * len(order)) : int(upper * len(order))]
    if not (0 <= lower < upper <= 1) or not len(found):
        raise DataError(
            f"The band {lower:g} to {upper:g} keeps none of {len(order)} clips. Widen it, or give more clips."
        )
    return found


class Band(NamedTuple):
    """The shares of the ranking by likelihood, and the inception score of what is between them."""

    lower: float
    upper: float
    score: float


def best_band(log_likelihoods: np.ndarray, log_p: np.ndarray) -> Band:
    """The band of the published grid with the highest inception score: what the published code means to choose. Choose
    on one half of the clips and report scores of the other.

    Raises DataError for fewer than two clips: no band would hold any, or one clip.
    """
    count = len(log_likelihoods)
    bands = [(lower / 20, upper / 20) for lower in _LOWER for upper in _UPPER]
    bands = [(lower, upper) for lower, upper in bands if int(lower * count) < int(upper * count)]
    if count < 2 or not bands:
        raise DataError(f"A band of likelihoods cannot be chosen on {count} clips. Give more, at least 4 in all.")
    found = [Band(*band, inception_score(log_p[kept(log_likelihoods, *band)])) for band in bands]
    return max(found, key=lambda band: band.score)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one set of clips against a set of real ones; see the functions. published_*: what SaShiMi's code gives."""

    clips: int
    fid: float
    inception_score: float
    modified_inception_score: float
    am_score: float
    published_inception_score: float
    published_modified_inception_score: float


def scores(real_features: np.ndarray, real_log_p: np.ndarray, features: np.ndarray, log_p: np.ndarray) -> Scores:
    """All scores of generated clips by what one classifier gives for them and for real ones."""
    return Scores(
        clips=len(log_p),
        fid=fid(real_features, features),
        inception_score=inception_score(log_p),
        modified_inception_score=modified_inception_score(log_p),
        am_score=am_score(real_log_p, log_p),
        published_inception_score=published_inception_score(log_p),
        published_modified_inception_score=published_modified_inception_score(log_p),
    )
