"""What a model of DNA must beat: counts of short words and a linear classifier."""

from __future__ import annotations

import dataclasses

import numpy as np

from mambaseq.data.windows import GridWindows, group_label
from mambaseq.errors import ConfigError
from mambaseq_dna.species import SpeciesData
from mambaseq_dna.tokenizer import fold_case


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Accuracy of a baseline on the test windows: `correct` of `n`, and Wilson's 95% interval."""

    name: str
    correct: int
    n: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    def __str__(self) -> str:
        return f"{self.name}: {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.n} windows"


def kmer_frequencies(ids: np.ndarray, k: int, both_strands: bool = True) -> np.ndarray:
    """The frequency of each word of k bases in a sequence.

    ids: `(length,)` or `(sequences, length)`, A C G T N = 0..4; words with N are left out.
    both_strands: a word and its reverse complement count as one, as in double-stranded DNA. Returns `(sequences,
        words)` float32, rows of sum 1; words is 4^k, or about half of it for both strands.
    """
    ids = np.atleast_2d(ids)
    n_sequences, length = ids.shape
    if length < k:
        raise ConfigError(f"Words of {k} bases need windows of at least as many, not {length}.")
    n_words = length - k + 1
    codes = np.zeros((n_sequences, n_words), dtype=np.int32)
    valid = np.ones((n_sequences, n_words), dtype=bool)
    for offset in range(k):
        base = ids[:, offset : offset + n_words]
        codes = codes * 4 + base
        valid &= base < 4
    counts = np.stack([np.bincount(row[ok], minlength=4**k) for row, ok in zip(codes, valid, strict=True)])
    if both_strands:
        place = 4 ** np.arange(k)
        words = np.arange(4**k)
        digits = words[:, None] // place % 4  # from the last base to the first
        partner = (3 - digits) @ place[::-1]
        own = words == partner
        counts = np.where(own, counts, counts + counts[:, partner])[:, words <= partner]
    return (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def _features(windows: GridWindows, k: int, both_strands: bool) -> tuple[np.ndarray, np.ndarray]:
    ids = np.stack([fold_case(interval.read(start, windows.span)) for interval, start, _ in windows.places()])
    labels = np.array([group for _, _, group in windows.places()])
    return kmer_frequencies(ids, k, both_strands), labels


def kmer_baseline(
    data: SpeciesData, k: int = 6, *, both_strands: bool = True, regularisation: float = 1e-3
) -> Baseline:
    """Logistic regression on k-mer frequencies, trained on the tiles of the training regions and tested on the same
    windows as a model of `data`.

    regularisation: C of scikit-learn's LogisticRegression on standardised frequencies; the default is the best on the
        validation windows of the shipped species, of 1e-5 ... 1e-2, at 1 kb and at 4 kb.
    """
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    test = data.test()
    if test is None:
        raise ConfigError("There is no test set to measure a baseline on; set data.test_records.")
    train = GridWindows(data.splits.train, data.length, group_label, what="training set")
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=regularisation, class_weight="balanced", max_iter=500)
    )
    classifier.fit(*_features(train, k, both_strands))
    features, labels = _features(test, k, both_strands)
    correct = int((classifier.predict(features) == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    name = f"{k}-mer logistic regression" + (", both strands" if both_strands else "")
    return Baseline(name, correct, len(labels), float(interval.low), float(interval.high))
