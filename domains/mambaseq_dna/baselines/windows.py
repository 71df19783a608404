"""Words and a linear classifier on the windows of species, as the demo and the benchmarks show them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from mambaseq.data.windows import GridWindows, group_label
from mambaseq.errors import ConfigError
from mambaseq.metrics.bootstrap import wilson
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.kmers import frequencies
from mambaseq_dna.baselines.linear import logistic
from mambaseq_dna.tokenizer import fold_case

if TYPE_CHECKING:
    from mambaseq_dna.species import SpeciesData


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


def _examples(windows: GridWindows) -> Examples:
    ids = np.stack([fold_case(interval.read(start, windows.span)) for interval, start, _ in windows.places()])
    return Examples.of(ids, np.array([group for _, _, group in windows.places()]))


def kmer_baseline(
    data: SpeciesData, k: int = 6, *, both_strands: bool = True, regularisation: float = 1e-3
) -> Baseline:
    """Logistic regression on k-mer frequencies, trained on the tiles of the training regions and tested on the same
    windows as a model of `data`.

    regularisation: C of scikit-learn's LogisticRegression on standardised frequencies; the default is the best on the
        validation windows of the shipped species, of 1e-5 ... 1e-2, at 1 kb and at 4 kb.

    Raises ConfigError for data without a test set.
    """
    test = data.test()
    if test is None:
        raise ConfigError("There is no test set to measure a baseline on; set data.test_records.")
    train = GridWindows(data.splits.train, data.length, group_label, what="training set")
    fitting, tested = _examples(train), _examples(test)
    fitted = logistic(
        frequencies(fitting, k, both_strands), fitting.targets, len(data.class_names), regularisation, balanced=True
    )
    labels = tested.targets
    correct = int((fitted(frequencies(tested, k, both_strands)).argmax(1) == labels).sum())
    name = f"{k}-mer logistic regression" + (", both strands" if both_strands else "")
    return Baseline(name, correct, len(labels), *wilson(correct, len(labels)))
