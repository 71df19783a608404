"""Count models: predict a sample by its frequency, or by that of the pair with the previous sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mambaseq.data import baselines
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

    Raises ValueError for a test set without samples.
    """
    train, test = ((np.concatenate([[first], clip]) for clip in clips) for clips in (train, test))
    return baselines.unigram_bigram(train, test, LEVELS, smoothing)
