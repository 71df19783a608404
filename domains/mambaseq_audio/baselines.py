"""Count models: predict a sample by its frequency, or by that of the pair with the previous sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mambaseq_audio.mulaw import LEVELS, MuLaw


def unigram_bigram(
    train: Iterable[np.ndarray],
    test: Iterable[np.ndarray],
    *,
    first: int = MuLaw.start_id,
    smoothing: float = 1.0,
) -> dict[str, float]:
    """Bits a sample on `test` of the unigram and bigram models of `train`.

    train, test: clips, `(length,)` integer levels. first: the level before a clip's first sample, which is predicted
        too. smoothing: added to the count of every level, above 0.
    """
    counts = _pair_counts(train, first) + 0.0
    pairs = _pair_counts(test, first)
    n = pairs.sum()
    if n == 0:
        raise ValueError("The test set has no samples.")
    frequency = counts.sum(axis=0) + smoothing
    unigram = np.log2(frequency / frequency.sum())
    smoothed = counts + smoothing
    bigram = np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    return {
        "unigram": float(-(pairs.sum(axis=0) * unigram).sum() / n),
        "bigram": float(-(pairs * bigram).sum() / n),
    }


def _pair_counts(clips: Iterable[np.ndarray], first: int) -> np.ndarray:
    """`(previous, next)` counts, `(256, 256)`."""
    counts = np.zeros(LEVELS * LEVELS, dtype=np.int64)
    for clip in clips:
        levels = np.concatenate([[first], clip.astype(np.int64)])
        counts += np.bincount(levels[:-1] * LEVELS + levels[1:], minlength=LEVELS * LEVELS)
    return counts.reshape(LEVELS, LEVELS)
