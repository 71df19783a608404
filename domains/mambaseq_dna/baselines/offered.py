"""The baselines that a reviewer of a model of DNA asks for, for any data of labelled sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mambaseq.batch import Batch
from mambaseq.data.baselines import Baseline, Told, spread
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.errors import DataError
from mambaseq_dna.baselines import kmers, linear, network
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.positions import around
from mambaseq_dna.tokenizer import BaseTokenizer, N

_ITEMS, _BASES = 2**17, 2**26  # of a training set that are read
_LABELLED_BASES = 2**23  # of one with a class for each base
_TRIED = 5000  # sequences by which the length of words is chosen
_WORDS = (4, 5, 6)
_PIECES, _PIECE = 1000, 1024  # of validation sequences, by which words of naive Bayes are chosen; bases of each
_BAYES = (4, 6, 8, 10)
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of logistic regressions
_RIDGES = (1.0, 1e1, 1e2, 1e3, 1e4)
_RIDGE_WORDS = (3, 4, 5)  # more have a matrix of words by words that takes long to turn
_SMOOTHINGS = (1.0, 0.1, 0.01)
_ONE_HOT = 512  # bases: longer sequences have no logistic regression of positions


def baselines_of(data: SequenceData, train: Any = None, *, balanced: bool = False) -> dict[str, Baseline]:
    """Baselines of a dataset of bases, by name; none where the tokens are no single bases.

    train: the set to fit to, instead of `data.train()`. balanced: let all classes weigh alike in fitting.
    """
    if not isinstance(data.tokenizer, BaseTokenizer):
        return {}
    first = next(iter(spread(data.train() if train is None else train, 1, 1)), None)
    if first is None or first.targets is None:
        return {}
    fitting = Fitting(data, train, balanced)
    if first.per_token:
        fits = first.kind == "labels" and first.stride == 1
        named: dict[str, Callable[[Examples], Told]] = {"k-mer around each base": fitting.around} if fits else {}
    else:
        model = "logistic regression" if first.kind == "labels" else "ridge regression"
        named = {
            "GC alone": lambda test: fitting.alone(test, gc_shares),
            "N alone": lambda test: fitting.alone(test, n_shares),
            "length alone": lambda test: fitting.alone(test, lengths),
            f"k-mer {model}": fitting.words,
            **({f"one-hot {model}": fitting.one_hot} if first.inputs.shape[1] <= _ONE_HOT else {}),
            **({"k-mer naive Bayes": fitting.bayes} if first.kind == "labels" else {}),
            "small CNN": fitting.network,
        }

    def answer(name: str) -> Baseline:
        return lambda records: named[name](fitting.test(records))

    return {name: answer(name) for name in named}


@dataclasses.dataclass
class Fitting:
    """A training, a validation and a test set, read once for all baselines."""

    data: SequenceData
    given: Any = None
    balanced: bool = False
    _test: tuple[Sequence[Batch], Examples] | None = None

    @cached_property
    def _sets(self) -> tuple[Examples, Examples]:
        train = self.data.train() if self.given is None else self.given
        bases = _LABELLED_BASES if next(spread(train, 1, 1)).per_token else _BASES
        fitted = Examples.read(spread(train, _ITEMS, bases)).known()
        held_out = next(iter(named_sets(self.data.validation()).values()), None)
        if held_out is None or not len(held_out):
            return fitted.split(0.1)
        chosen = Examples.read(spread(held_out, _ITEMS // 8, bases // 4)).known()
        return (fitted, chosen) if len(chosen) else fitted.split(0.1)

    @property
    def train(self) -> Examples:
        """Sequences to fit to."""
        return self._sets[0]

    @property
    def validation(self) -> Examples:
        """Sequences to choose by: of the first validation set, or a tenth of the training set."""
        return self._sets[1]

    def test(self, records: Sequence[Batch]) -> Examples:
        """The records that are asked for."""
        if self._test is None or self._test[0] is not records:
            self._test = records, Examples.read(records[index] for index in range(len(records)))
        return self._test[1]

    @property
    def n_outputs(self) -> int:
        """Classes, labels or values."""
        targets = self.train.targets
        return targets.shape[1] if targets.ndim > 1 else max(len(self.data.class_names), int(targets.max()) + 1)

    def _fits(self, features: linear.Matrix, examples: Examples, strengths: Sequence[float]) -> list[linear.Fitted]:
        if examples.kind == "labels":
            return [
                linear.logistic(features, examples.targets, self.n_outputs, strength, self.balanced)
                for strength in strengths
            ]
        return linear.ridge(features, linear.as_values(examples.targets, examples.kind), strengths)

    def _good(self, outputs: np.ndarray) -> float:
        return linear.goodness(outputs, self.validation.targets, self.validation.kind)

    def alone(self, test: Examples, feature: Callable[[Examples], np.ndarray]) -> Told:
        """A linear model of one number of each sequence and of its square."""
        train, of_test = feature(self.train), feature(test)
        fitted = self._fits(train, self.train, [1.0 if self.train.kind == "labels" else 1e-3])[0]
        return Told(fitted(of_test), "" if np.ptp(train[:, 0]) > 0 else "all training sequences are alike")

    def words(self, test: Examples) -> Told:
        """Logistic or ridge regression on the frequencies of words; length of the words, strands and strength are
        chosen on the validation set."""
        logistic, length = self.train.kind == "labels", int(np.median(self.train.lengths))
        few, strength = self.train.fewer(_TRIED), _STRENGTHS[1] if logistic else 1e2
        tried: dict[tuple[int, bool], float] = {}

        def good(k: int, both: bool) -> float:
            if (k, both) not in tried:
                fitted = self._fits(kmers.frequencies(few, k, both), few, [strength])[0]
                tried[k, both] = self._good(fitted(kmers.frequencies(self.validation, k, both)))
            return tried[k, both]

        words = [k for k in (_WORDS if logistic else _RIDGE_WORDS) if k <= length]
        if not words:
            raise DataError(f"Sequences of {length} bases are too short for words.")
        both = max((True, False), key=lambda both: good(words[-2:][0], both))
        k = max(words, key=lambda k: good(k, both))
        features, held_out = (kmers.frequencies(of, k, both) for of in (self.train, self.validation))
        strength, fitted = self._strongest(features, held_out, _STRENGTHS if logistic else _RIDGES)
        note = f"words of {k} bases, {'both strands' if both else 'one strand'}, "
        return Told(fitted(kmers.frequencies(test, k, both)), note + _told(logistic, strength))

    def _strongest(
        self, features: linear.Matrix, held_out: linear.Matrix, strengths: Sequence[float]
    ) -> tuple[float, linear.Fitted]:
        """The strength that is best on the validation set, and the model of it. A logistic regression of each takes
        long: from the second on, strengths are tried upwards, or else downwards, while they get better."""
        if self.train.kind != "labels":
            fits = self._fits(features, self.train, strengths)
            values = [self._good(fitted(held_out)) for fitted in fits]
            return strengths[int(np.argmax(values))], fits[int(np.argmax(values))]
        found: list[tuple[float, float, linear.Fitted]] = []

        def better(place: int) -> bool:
            fitted = self._fits(features, self.train, [strengths[place]])[0]
            value = self._good(fitted(held_out))
            ahead = not found or value > found[-1][0]
            if ahead:
                found.append((value, strengths[place], fitted))
            return ahead

        place, last = 1, len(strengths) - 1
        better(place)
        while place < last and better(place + 1):
            place += 1
        if place == 1:
            better(0)
        return found[-1][1:]

    def one_hot(self, test: Examples) -> Told:
        """Logistic or ridge regression on which base stands where, for sequences of one length."""
        sizes = np.unique(np.concatenate([of.lengths for of in (self.train, self.validation, test)]))
        if len(sizes) != 1:
            raise DataError(
                f"The sequences have {len(sizes):,} lengths; positions are those of sequences of one length."
            )
        logistic = self.train.kind == "labels"
        features, held_out, of_test = (one_hot(of, int(sizes[0])) for of in (self.train, self.validation, test))
        strength, fitted = self._strongest(features, held_out, _STRENGTHS if logistic else _RIDGES)
        return Told(fitted(of_test), _told(logistic, strength))

    def bayes(self, test: Examples) -> Told:
        """Multinomial naive Bayes on words of up to 10 bases; their length, strands and smoothing are chosen on the
        validation set."""
        n, train = self.n_outputs, self.train
        shares = np.bincount(train.targets, minlength=n) + 1e-9
        prior = np.zeros(n) if self.balanced else np.log(shares / shares.sum())
        best: tuple[float, int, bool, float] | None = None
        held_out = self.validation.pieces(_PIECES, _PIECE)  # a few long sequences tell little
        for k in (k for k in _BAYES if k <= np.median(train.lengths)):
            for both in (True, False):
                counts = kmers.tallied(train, k, n, both)
                for smoothing in _SMOOTHINGS:
                    told = prior + kmers.summed(held_out, k, _log_shares(counts, smoothing))
                    value = linear.goodness(told, held_out.targets, "labels")
                    if best is None or value > best[0]:
                        best = value, k, both, smoothing
        if best is None:
            raise DataError("The sequences are too short for words.")
        _, k, both, smoothing = best
        table = _log_shares(kmers.tallied(train, k, n, both), smoothing)
        strands = "both strands" if both else "one strand"
        return Told(prior + kmers.summed(test, k, table), f"words of {k} bases, {strands}, smoothing {smoothing:g}")

    def network(self, test: Examples) -> Told:
        """The small convolutional network."""
        turn = bool(getattr(self.data, "reverse_complement", False))
        if self.train.kind != "values":
            model, note = network.trained(self.train, self.validation, self.n_outputs, turn=turn)
            return Told(network.answered(model, test), note)
        mean, scale = network.scaled_values(self.train)
        train, validation = (
            dataclasses.replace(of, targets=(of.targets - mean) / scale) for of in (self.train, self.validation)
        )
        model, note = network.trained(train, validation, self.n_outputs, turn=turn)
        return Told(network.answered(model, test) * scale + mean, note)

    def around(self, test: Examples) -> Told:
        """The classes that bases had in the training set, by the word around them."""
        return around(self.train, self.validation, test, self.n_outputs)


def _told(logistic: bool, strength: float) -> str:
    return f"{'C' if logistic else 'strength'} {strength:g}"


def _log_shares(counts: np.ndarray, smoothing: float) -> np.ndarray:
    """Log shares of words `(words, classes)` float32 of each class, of counts with `smoothing` added to each."""
    return np.log(counts + smoothing) - np.log(counts.sum(0, dtype=np.float64) + smoothing * len(counts)).astype(
        np.float32
    )


def _summary(examples: Examples, values: np.ndarray) -> np.ndarray:
    """A number of each sequence, its mean over bases, and the square of it."""
    sums = np.add.reduceat(np.append(values, 0.0), examples.bounds[:-1]) * (examples.lengths > 0)
    share = sums / np.maximum(examples.lengths, 1)
    return np.stack([share, share**2], 1)


def gc_shares(examples: Examples) -> np.ndarray:
    """`(sequences, 2)`: the share of G and C, and its square."""
    return _summary(examples, ((examples.ids == 1) | (examples.ids == 2)).astype(np.float64))


def n_shares(examples: Examples) -> np.ndarray:
    """`(sequences, 2)`: the share of N, and its square."""
    return _summary(examples, (examples.ids == N).astype(np.float64))


def lengths(examples: Examples) -> np.ndarray:
    """`(sequences, 2)`: the logarithm of the length, and its square."""
    found = np.log(np.maximum(examples.lengths, 1).astype(np.float64))
    return np.stack([found, found**2], 1)


def one_hot(examples: Examples, length: int) -> Any:
    """`(sequences, 4 * length)` sparse: 1 for the base at each position; N has none."""
    from scipy import sparse

    ids = examples.ids.reshape(len(examples), length)
    known = ids < N
    columns = (np.arange(length) * 4 + ids)[known]
    bounds = np.concatenate([[0], np.cumsum(known.sum(1))])
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, bounds), shape=(len(ids), 4 * length))
