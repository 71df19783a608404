"""What the recipes on DNA share: bases on the device, batches drawn there, both strands, linear baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.benchmarking.block import autocast
from mambaseq.data.drawing import below, words
from mambaseq.errors import DataError
from mambaseq.reproduction.batches import numbers
from mambaseq.reproduction.training import BatchOf
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.kmers import summed, tallied
from mambaseq_dna.baselines.linear import logistic
from mambaseq_dna.tokenizer import N

MASK = N + 1
"""The id of the mask token, behind the bases."""
VOCABULARY = MASK + 1


def other_strand(ids: Tensor) -> Tensor:
    """`(..., length)` ids of bases, N and masks → the reverse complement."""
    return torch.where(ids < N, 3 - ids, ids).flip(-1)


def turned(ids: Tensor, drawn: Tensor) -> Tensor:
    """Rows of `(batch, length)` ids, of the other strand where the 32-bit random number `(batch,)` says so."""
    return torch.where((drawn < 2**31)[:, None], other_strand(ids), ids)


class Stretches:
    """Windows of any length from stretches of bases of several classes, drawn uniformly over classes, then places.

    tokens: `(bases,)` uint8 ids on the device. places: for each class `(stretches, 2)` int64 of starts and stops.

    Raises DataError for a class that has no window of `length`.
    """

    def __init__(self, tokens: Tensor, places: Sequence[np.ndarray], length: int) -> None:
        self.tokens, self.length, self.n_classes = tokens, length, len(places)
        starts, counts, bases, sizes, total = [], [], [], [], 0
        for number, of in enumerate(places):
            room = of[:, 1] - of[:, 0] - length + 1
            of, room = of[room > 0], room[room > 0]
            if not len(of):
                raise DataError(f"Class {number} has no stretch of {length:,} bases without N.")
            bases.append(total)
            sizes.append(int(room.sum()))
            starts.append(of[:, 0] - np.cumsum(room) + room - total)  # so that drawn number + start is a place
            counts.append(np.cumsum(room) + total)
            total += sizes[-1]
        if max(sizes) >= 2**31:
            raise DataError("A class has more than 2^31 places for windows.")
        device = tokens.device
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        self.ends = torch.from_numpy(np.concatenate(counts)).to(device)
        self.bases = torch.tensor(bases, device=device)
        self.sizes = torch.tensor(sizes, device=device)
        self.within = torch.arange(length, device=device)

    def draw(self, seed: int, items: Tensor, flip: bool = True) -> tuple[Tensor, Tensor]:
        """Items' windows `(batch, length)` int64, on either strand if `flip`, and their classes `(batch,)` int64."""
        drawn = words(seed, items, 3)
        label = below(drawn[:, 0], self.n_classes)
        number = self.bases[label] + ((drawn[:, 1] * self.sizes[label]) >> 32)
        first = number + self.starts[torch.searchsorted(self.ends, number, right=True)]
        ids = self.tokens[first[:, None] + self.within].long()
        return (turned(ids, drawn[:, 2]) if flip else ids), label

    def labelled(self, batch_size: int, seed: int) -> BatchOf:
        """Batches of windows and their classes."""

        def batch_of(step: Tensor) -> Batch:
            ids, label = self.draw(seed, numbers(step, batch_size))
            return Batch(inputs=ids, targets=label)

        return batch_of

    def masked(self, batch_size: int, seed: int, share: float = 0.15) -> BatchOf:
        """Batches for masked modelling: of the `share` of bases that are asked for, 80 % become the mask, 10 % a random
        base, 10 % stay (BERT, arXiv:1810.04805)."""

        def batch_of(step: Tensor) -> Batch:
            items = numbers(step, batch_size)
            ids, _ = self.draw(seed, items)
            drawn = words(seed + 1, items, self.length)
            asked = drawn < int(share * 2**32)
            kind = words(seed + 2, items, self.length)
            hidden = torch.where(kind < int(0.8 * 2**32), MASK, torch.where(kind < int(0.9 * 2**32), kind % 4, ids))
            return Batch(inputs=torch.where(asked, hidden, ids), targets=torch.where(asked & (ids < N), ids, -100))

        return batch_of

    def causal(self, batch_size: int, seed: int) -> BatchOf:
        """Batches for next-base modelling, of length - 1 inputs."""

        def batch_of(step: Tensor) -> Batch:
            ids, _ = self.draw(seed, numbers(step, batch_size))
            return Batch(inputs=ids[:, :-1], targets=ids[:, 1:])

        return batch_of


def stretches_of(tokens: Tensor, bounds: np.ndarray) -> np.ndarray:
    """Stretches without N of pieces that follow each other, `(stretches, 2)` int64.

    tokens: `(bases,)` uint8. bounds: `(pieces + 1,)` int64; no stretch crosses one.
    """
    ids = tokens[int(bounds[0]) : int(bounds[-1])].cpu().numpy()
    change = np.flatnonzero(np.diff(ids == N)) + 1 + bounds[0]
    edges = np.union1d(bounds, change)
    places = np.stack((edges[:-1], edges[1:]), axis=1)
    return places[ids[places[:, 0] - bounds[0]] != N]


def tiles(
    places: Sequence[np.ndarray], length: int, at_most: int | None = None, stride: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of stretches, disjoint unless a stride is given: starts and classes, `(windows,)` int64 each, equally
    many of each class.

    at_most: windows a class, spread evenly over those that there are.
    """
    found = []
    for of in places:
        starts = [np.arange(start, stop - length + 1, stride or length) for start, stop in of]
        found.append(np.concatenate(starts) if starts else np.zeros(0, np.int64))
    n = min(min(len(starts) for starts in found), at_most or 2**62)
    chosen = [starts[np.linspace(0, len(starts) - 1, n).round().astype(int)] if n else starts[:0] for starts in found]
    return np.concatenate(chosen).astype(np.int64), np.repeat(np.arange(len(places)), n)


def windows(tokens: Tensor, starts: np.ndarray, length: int) -> Tensor:
    """`(windows, length)` uint8 on the device."""
    first = torch.from_numpy(starts).to(tokens.device)
    return tokens[first[:, None] + torch.arange(length, device=tokens.device)]


@torch.no_grad()
def probabilities(model: Any, inputs: Tensor, batch_tokens: int, both_strands: bool) -> np.ndarray:
    """Of the classes, `(examples, classes)` float64; both_strands: the mean of the answers to both.

    inputs: `(examples, length)` uint8. batch_tokens: bases that are read together.
    """
    found = []
    for some in inputs.split(max(batch_tokens // inputs.shape[1], 1)):
        ids = some.long()
        with autocast(ids.device):
            answer = model(ids).logits.float().softmax(-1)
            if both_strands:
                answer = (answer + model(other_strand(ids)).logits.float().softmax(-1)) / 2
        found.append(answer)
    return torch.cat(found).double().cpu().numpy()


class Score(NamedTuple):
    """Of a classifier on test sequences."""

    accuracy: float
    mcc: float
    auc: float


def score(probability: np.ndarray, labels: np.ndarray) -> Score:
    """Accuracy, Matthews correlation, and area under the ROC curve (two classes; NaN for more)."""
    from sklearn.metrics import matthews_corrcoef, roc_auc_score

    said = probability.argmax(1)
    auc = float(roc_auc_score(labels, probability[:, 1])) if probability.shape[1] == 2 else float("nan")
    return Score(float((said == labels).mean()), float(matthews_corrcoef(labels, said)), auc)


def linear_score(features: dict[str, np.ndarray], labels: dict[str, np.ndarray], strengths: Sequence[float]) -> Score:
    """Logistic regression on standardised features of "train", its C chosen on "dev", scored on "test"."""
    n_classes = 1 + max(int(of.max()) for of in labels.values())
    fitted = [logistic(features["train"], labels["train"], n_classes, c) for c in strengths]
    best = max(fitted, key=lambda one: float((one(features["dev"]).argmax(1) == labels["dev"]).mean()))
    return score(softmax(best(features["test"]), axis=1), labels["test"])


def pieces(ids: np.ndarray, places: Sequence[np.ndarray]) -> Examples:
    """The stretches of several classes, for baselines. ids: `(bases,)` uint8. places: for each class `(stretches, 2)`
    int64 of starts and stops."""
    every = np.concatenate(places)
    bounds = np.concatenate([[0], np.cumsum(every[:, 1] - every[:, 0])])
    parts = [ids[start:stop] for start, stop in every]
    return Examples(np.concatenate(parts), bounds, np.repeat(np.arange(len(places)), [len(of) for of in places]))


def naive_bayes(tokens: Tensor, places: Sequence[np.ndarray], inputs: np.ndarray, k: int) -> np.ndarray:
    """Log probabilities, up to a constant, of the classes for windows, by naive Bayes on words of k bases with one
    added to each count: `(windows, classes)` float64. places: the classes' training stretches."""
    counts = tallied(pieces(tokens.cpu().numpy(), places), k, len(places), both_strands=False).astype(np.float64) + 1
    return summed(Examples.of(inputs), k, np.log(counts / counts.sum(0)))
