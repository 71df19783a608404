"""Count models: predict a byte by its frequency, or by that of the pair with the previous byte."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def unigram_bigram(
    train: Iterable[np.ndarray], test: Iterable[np.ndarray], *, smoothing: float = 0.1
) -> dict[str, float]:
    """Bits a byte on `test` of the unigram and bigram models of `train`.

    train, test: texts, `(length,)` uint8. The first byte of a test text is not predicted, as in a model without a start
        token. smoothing: added to the count of every byte, above 0.
    """
    counts = _pair_counts(train) + 0.0
    pairs = _pair_counts(test)
    n = pairs.sum()
    if n == 0:
        raise ValueError("The test set has no pair of bytes.")
    frequency = counts.sum(axis=0) + smoothing
    unigram = np.log2(frequency / frequency.sum())
    smoothed = counts + smoothing
    bigram = np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    return {
        "unigram": float(-(pairs.sum(axis=0) * unigram).sum() / n),
        "bigram": float(-(pairs * bigram).sum() / n),
    }


def _pair_counts(texts: Iterable[np.ndarray]) -> np.ndarray:
    """`(previous, next)` counts, `(256, 256)`."""
    counts = np.zeros(256 * 256, dtype=np.int64)
    for text in texts:
        codes = text.astype(np.int64)
        counts += np.bincount(codes[:-1] * 256 + codes[1:], minlength=256 * 256)
    return counts.reshape(256, 256)
