"""Count models: predict a byte by its frequency, by that of the pair with the previous byte, or by those of what
followed the last few bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mambaseq.data import baselines


def unigram_bigram(
    train: Iterable[np.ndarray], test: Iterable[np.ndarray], *, smoothing: float = 0.1
) -> dict[str, float]:
    """Bits a byte on `test` of the unigram and bigram models of `train`.

    train, test: texts, `(length,)` uint8. The first byte of a test text is not predicted, as in a model without a start
        token. smoothing: added to the count of every byte, above 0.

    Raises ValueError for a test set without a pair of bytes.
    """
    return baselines.unigram_bigram(train, test, 256, smoothing)


def interpolated(train: np.ndarray, tests: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Bits that Markov models of order 0 to `most` take for each text but its first byte, `(most + 1, texts)`.

    Each order is interpolated with the one below it by Witten and Bell's rule (IEEE Trans. Inf. Theory 37(4), 1991):
    a context seen n times, with d different bytes behind it, has n / (n + d) of the weight; below order 0 all bytes are
    equally likely. train, tests: `(length,)` uint8; most: at most 7.
    """
    p = [np.full(max(len(text) - 1, 0), 1 / 256) for text in tests]
    bits = np.zeros((most + 1, len(tests)))
    for order in range(most + 1):
        seen, counts = np.unique(_codes(train, order), return_counts=True)
        contexts, first = np.unique(seen >> np.uint64(8), return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(seen)))
        for number, text in enumerate(tests):
            codes = _codes(text, order)[order == 0 :]
            below = p[number][max(order - 1, 0) :]  # what has so many bytes before it
            place = np.searchsorted(seen, codes).clip(max=len(seen) - 1)
            count = np.where(seen[place] == codes, counts[place], 0)
            context = codes >> np.uint64(8)
            place = np.searchsorted(contexts, context).clip(max=len(contexts) - 1)
            known = contexts[place] == context
            total, kind = totals[place], kinds[place]
            below[:] = np.where(known, (count + kind * below) / (total + kind), below)
            bits[order, number] = -np.log2(p[number]).sum()
    return bits


def _codes(text: np.ndarray, order: int) -> np.ndarray:
    """Each byte that has `order` bytes before it, with these, as one number: `(length - order,)` uint64."""
    n = max(len(text) - order, 0)
    codes = np.zeros(n, dtype=np.uint64)
    for k in range(order + 1):
        codes = (codes << np.uint64(8)) | text[k : k + n]
    return codes
