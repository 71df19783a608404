"""Baselines of a dataset: simple methods that a model must beat, on the very same records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.errors import DataError

_ITEMS, _POSITIONS = 4096, 2**24  # of the training set, for what is constant


@dataclasses.dataclass
class Told:
    """What a baseline answers.

    outputs: `(sequences, n)` float, as a head of the data would give them: logits of classes (log probabilities, where
        it has any), log odds of labels, or values; for data with a target a position or bin, an array `(bins, n)` for
        each sequence. note: how it was fitted, in a few words.
    """

    outputs: Any
    note: str = ""


Baseline = Callable[[Sequence[Batch]], Told]
"""Fits itself to the training set, chooses what there is to choose on the validation set, and answers the records of a
test set: batches of one, with their targets."""


class Records(Sequence[Batch]):
    """Items of a set by their numbers, each read when it is asked for."""

    def __init__(self, items: Any, numbers: Sequence[int]) -> None:
        self._items, self._numbers = items, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._items[self._numbers[index]]


def spread(items: Any, most_items: int, most_positions: int) -> Iterator[Batch]:
    """Items of a set, all of them or at most so many, evenly spread over it; no more are read once they hold so many
    positions. An endless set gives an epoch. Raises DataError for a stream."""
    if isinstance(items, torch.utils.data.IterableDataset):
        raise DataError("The training set is a stream, to which no baseline is fitted. Set data.streaming to false.")
    count, read = len(items), 0
    chosen = min(count, most_items)
    if chosen and not getattr(items, "endless", False):
        length = max(items[index].inputs.shape[1] for index in {0, count // 2, count - 1})
        chosen = max(min(chosen, most_positions // max(length, 1)), 1)
    for index in np.unique(np.linspace(0, count - 1, chosen).astype(np.int64)) if chosen else ():
        item = items[int(index)]
        yield item
        read += item.inputs.shape[1]
        if read >= most_positions:
            return


def constant(train: Any, records: Sequence[Batch], n_outputs: int) -> Told:
    """The same answer for all: the training set's share of each class or label, or its mean values.

    n_outputs: classes, labels or values."""
    items = list(spread(train, _ITEMS, _POSITIONS))
    kind, per_token = items[0].kind, items[0].per_token
    rows = torch.cat([_rows(item) for item in items])
    if kind == "labels":
        counts = torch.bincount(rows[rows >= 0], minlength=n_outputs)[:n_outputs].double() + 1e-3
        answer = (counts / counts.sum()).log()
    elif kind == "multilabels":
        answer = (((rows == 1).sum(0) + 1e-3) / ((rows == 0).sum(0) + 1e-3)).log()
    else:
        answer = rows.double().nanmean(0)
    answer = answer.float().expand(n_outputs)
    if not per_token:
        return Told(answer.expand(len(records), -1))
    return Told([answer.expand(-(-one.inputs.shape[1] // one.stride), -1) for one in records])


def _rows(item: Batch) -> torch.Tensor:
    """Targets, `(rows,)` or `(rows, n)`."""
    targets = item.targets
    assert targets is not None
    rows = targets.flatten(0, 1) if item.per_token else targets
    return rows[:, None] if item.kind == "values" and rows.dim() == 1 else rows


def pair_counts(rows: Iterable[np.ndarray], n_tokens: int) -> np.ndarray:
    """How often each token follows each other one, `(n_tokens, n_tokens)` int64: the one before is the row.

    rows: sequences of tokens, `(length,)` whole numbers below n_tokens.
    """
    counts = np.zeros(n_tokens * n_tokens, dtype=np.int64)
    for row in rows:
        tokens = row.astype(np.int64)
        counts += np.bincount(tokens[:-1] * n_tokens + tokens[1:], minlength=n_tokens * n_tokens)
    return counts.reshape(n_tokens, n_tokens)


def unigram_bigram(
    train: Iterable[np.ndarray], test: Iterable[np.ndarray], n_tokens: int, smoothing: float
) -> dict[str, float]:
    """Bits a token on `test` of the unigram and the bigram model of `train`, which count all tokens but the first of
    each sequence.

    train, test: as for `pair_counts`. smoothing: added to every count, above 0.

    Raises ValueError for a test set without a pair of tokens.
    """
    counts, pairs = pair_counts(train, n_tokens), pair_counts(test, n_tokens)
    if not (n := pairs.sum()):
        raise ValueError("The test set has no pair of tokens.")
    frequency = counts.sum(axis=0) + smoothing
    unigram = np.log2(frequency / frequency.sum())
    smoothed = counts + smoothing
    bigram = np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    return {
        "unigram": float(-(pairs.sum(axis=0) * unigram).sum() / n),
        "bigram": float(-(pairs * bigram).sum() / n),
    }
