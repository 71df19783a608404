"""Classes of bases by the word around each of them."""

from __future__ import annotations

import numpy as np

from mambaseq.data.baselines import Told
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.linear import goodness
from mambaseq_dna.tokenizer import N

_WORDS = (1, 3, 5, 7, 9, 11)
_SEEN = 8  # words for each base that there is: longer words are hardly seen twice
_AT_ONCE = 2**21  # bases
_BACKED = 10.0  # bases of a class that a word without any gets from the shorter one within it


def words_around(examples: Examples, k: int) -> np.ndarray:
    """`(bases,)` int32: the word of k bases (an odd number) with each base in its middle; -1 where that has N or
    reaches over the end of its sequence."""
    half, ids = k // 2, examples.ids.astype(np.int32)
    padded = np.pad(ids, half, constant_values=N)
    found, bad = np.zeros(len(ids), np.int32), np.zeros(len(ids), bool)
    for offset in range(k):
        base = padded[offset : offset + len(ids)]
        found, bad = found * 4 + base % 4, bad | (base >= N)
    place = np.arange(len(ids)) - np.repeat(examples.bounds[:-1], examples.lengths)
    left = np.repeat(examples.lengths, examples.lengths) - 1 - place
    return np.where(bad | (place < half) | (left < half), -1, found)


def around(train: Examples, validation: Examples, test: Examples, n_classes: int) -> Told:
    """Shares of the classes of the middle base, by words of up to 11 bases; a word that is rare is filled up by the
    shorter one within it. The longest word is chosen on the validation set."""
    known = train.targets >= 0
    shares = np.bincount(train.targets[known], minlength=n_classes).astype(np.float64) + 1.0
    tables = [(shares / shares.sum())[None]]
    best: tuple[float, int] = (-np.inf, 0)
    for k in (k for k in _WORDS if 4**k <= _SEEN * len(train.ids)):
        words = words_around(train, k)
        some = known & (words >= 0)
        counts = np.bincount(words[some].astype(np.int64) * n_classes + train.targets[some], minlength=4**k * n_classes)
        inner = (np.arange(4**k) // 4) % 4 ** max(k - 2, 0)  # without its first and last base
        backed = tables[-1][inner if k > 1 else np.zeros(4**k, np.int64)]
        sums = counts.reshape(-1, n_classes)
        tables.append((sums + _BACKED * backed) / (sums.sum(1, keepdims=True) + _BACKED))
        value = goodness(_looked_up(validation, tables, k), validation.targets, "labels")
        best = max(best, (value, k))
    outputs = _looked_up(test, tables, best[1])
    return Told(np.split(outputs, test.bounds[1:-1]), f"words of {best[1]} bases")


def _looked_up(examples: Examples, tables: list[np.ndarray], longest: int) -> np.ndarray:
    """Log shares `(bases, classes)` float32: of the longest word that each base has."""
    found = []
    for part in examples.parts(_AT_ONCE):
        shares = np.repeat(tables[0], len(part.ids), 0)
        for table, k in zip(tables[1:], _WORDS, strict=False):
            if k <= longest:
                words = words_around(part, k)
                shares[words >= 0] = table[words[words >= 0]]
        found.append(np.log(shares).astype(np.float32))
    return np.concatenate(found)
