from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from mambaseq_audio import scores
from mambaseq_audio.scores import log_probabilities

from mambaseq.errors import DataError

CERTAIN = 60.0  # a logit that leaves e^-60 for the other classes


def certain(classes: list[int], n: int) -> np.ndarray:
    """Log probabilities of clips that are surely of these classes."""
    return log_probabilities(CERTAIN * np.eye(n)[classes])


def answers(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows))


def test_frechet_distance_in_closed_form() -> None:
    """Diagonal: |m - n|² + sum (sqrt c - sqrt d)². A rotation of both changes nothing; singular ones are allowed."""
    m, n, c, d = np.array([1.0, 0, 2]), np.array([0.0, 3, 2]), np.array([4.0, 9, 0]), np.array([1.0, 16, 25])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert scores.frechet_distance(m, np.diag(c), n, np.diag(d)) == pytest.approx(10 + 1 + 1 + 25)
    turned = [rotation @ np.diag(each) @ rotation.T for each in (c, d)]
    found = scores.frechet_distance(rotation @ m, turned[0], rotation @ n, turned[1])
    assert found == pytest.approx(37)
    # two that do not commute, in two dimensions: tr (C D)^½ = sqrt(tr CD + 2 sqrt(det CD))
    one, other = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    root = np.sqrt(np.trace(one @ other) + 2 * np.sqrt(np.linalg.det(one @ other)))
    zero = np.zeros(2)
    assert scores.frechet_distance(zero, one, zero, other) == pytest.approx(11 - 2 * root)


def test_fid_of_features() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    for same in (features, 100 * features, rng.normal(size=(20, 40))):
        assert 0 <= scores.fid(same, same) < 1e-5
    assert scores.fid(features, features + np.array([3, 0, 0, 4, 0])) == pytest.approx(25)
    assert scores.fid(features, 2 * features) == pytest.approx(  # C and 4 C: tr(C + 4C - 2 * 2C) = tr C
        np.square(features.mean(0)).sum() + np.trace(np.cov(features, rowvar=False))
    )


def test_inception_score() -> None:
    assert scores.inception_score(certain([0, 1, 2, 3] * 5, 4)) == pytest.approx(4)
    assert scores.inception_score(answers(*[[0.7, 0.2, 0.1]] * 6)) == pytest.approx(1)
    # half (3/4, 1/4), half (1/4, 3/4): KL to (1/2, 1/2) is ln 2 less the entropy
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert scores.inception_score(answers([0.75, 0.25], [0.25, 0.75])) == pytest.approx(2 * np.exp(-entropy))


def test_the_published_inception_score_exceeds_the_number_of_classes() -> None:
    """Certain answers, a quarter of each half class 0: the right score is exp of the entropy of (1/4, 3/4), the
    published one sqrt(4 * 4/3), more than there are classes."""
    classes = np.empty(8, dtype=int)
    classes[np.random.RandomState(0).permutation(8)] = [0, 1, 1, 1] * 2  # its order is the published code's
    log_p = certain(classes.tolist(), 2)
    assert scores.inception_score(log_p) == pytest.approx(np.exp(0.25 * np.log(4) + 0.75 * np.log(4 / 3)))
    assert scores.published_inception_score(log_p) == pytest.approx(np.sqrt(16 / 3))
    assert np.sqrt(16 / 3) > 2
    # and it is what the published line gives, whatever the answers
    soft = log_probabilities(np.random.default_rng(2).normal(size=(41, 3)))
    p = np.exp(soft)[np.random.RandomState(0).permutation(41)]
    half, mean = p[:20], p[20:].mean(0)
    published = np.exp(scipy.stats.entropy(half, np.repeat(mean[None], 20, axis=0)).mean())
    assert scores.published_inception_score(soft) == pytest.approx(published)


def test_modified_inception_score() -> None:
    """Of two clips by hand: a pair with itself is 0, either other pair is KL((3/4, 1/4), (1/4, 3/4)) = ln(3) / 2."""
    log_p = answers([0.75, 0.25], [0.25, 0.75])
    assert scores.modified_inception_score(log_p) == pytest.approx(np.exp(np.log(3) / 4))
    assert scores.modified_inception_score(answers(*[[0.7, 0.2, 0.1]] * 3)) == pytest.approx(1)
    many = log_probabilities(np.random.default_rng(3).normal(size=(30, 4)))
    pairs = [scipy.stats.entropy(np.exp(a), np.exp(b)) for a in many for b in many]
    assert scores.modified_inception_score(many) == pytest.approx(np.exp(np.mean(pairs)))
    assert scores.published_modified_inception_score(many) == pytest.approx(np.exp(np.mean(pairs)), rel=0.03)


def test_am_score() -> None:
    """KL((1/2, 1/2), (1/4, 3/4)) + no entropy, and by hand for two answers that are not certain."""
    real = certain([0, 1, 0, 1], 2)
    assert scores.am_score(real, certain([0, 1, 1, 1], 2)) == pytest.approx(np.log(2) - 0.5 * np.log(3))
    assert scores.am_score(real, real) == pytest.approx(0, abs=1e-12)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert scores.am_score(real, answers([0.75, 0.25], [0.25, 0.75])) == pytest.approx(entropy)


def test_rejection_keeps_a_band_of_likelihoods() -> None:
    likelihoods = np.random.default_rng(4).permutation(20).astype(float)
    members = scores.kept(likelihoods)
    assert likelihoods[members].tolist() == list(range(8, 19))  # without the lowest 40 and the highest 5 percent
    assert sorted(scores.kept(likelihoods, 0.0, 1.0)) == list(range(20))
    with pytest.raises(DataError, match=r"0\.4 to 0\.95 keeps none of 1 "):
        scores.kept(np.zeros(1))


def test_a_band_is_chosen_on_few_clips_or_says_that_they_are_too_few() -> None:
    assert scores.best_band(np.arange(3.0), certain([0, 1, 0], 2)).score >= 1
    with pytest.raises(DataError, match="cannot be chosen on 1 clips"):
        scores.best_band(np.zeros(1), np.zeros((1, 2)))


def test_the_best_band_is_not_the_last_one() -> None:
    """Clips of the lower likelihoods say something, those above 0.6 nothing: the narrowest band from the bottom wins.
    The published loop, whose best value stays 0, ends at its last band."""
    log_p = np.concatenate([certain([0, 1] * 60, 2), np.log(np.full((80, 2), 0.5))])
    found = scores.best_band(np.arange(200.0), log_p)
    assert (found.upper, found.score) == (0.6, pytest.approx(2))
    best_value, chosen = 0.0, None
    for lower in np.arange(0.0, 0.5, 0.1):
        for upper in np.arange(0.6, 1.0, 0.05):
            if scores.inception_score(log_p[int(lower * 200) : int(upper * 200)]) > best_value:
                chosen = lower, upper
    assert chosen == pytest.approx(scores.PUBLISHED_BAND)


def test_all_scores_of_a_set() -> None:
    rng = np.random.default_rng(5)
    features, log_p = rng.normal(size=(50, 4)), log_probabilities(rng.normal(size=(50, 3)))
    found = scores.scores(features, log_p, features, log_p)
    assert (found.clips, found.fid) == (50, pytest.approx(0, abs=1e-9))
    assert found.am_score == pytest.approx(float(np.mean(scipy.stats.entropy(np.exp(log_p), axis=1))))
    for wrong in (np.zeros((1, 3)), np.full((4, 3), np.nan)):
        with pytest.raises(DataError, match=r"at least 2 clips|not finite"):
            log_probabilities(wrong)
