"""Labelled sequences of bases, end to end in one array: what baselines are fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.errors import DataError
from mambaseq.heads.base import Kind
from mambaseq_dna.tokenizer import fold_case


@dataclasses.dataclass
class Examples:
    """Sequences and their targets.

    ids: `(bases,)` uint8, A C G T N = 0..4. bounds: `(sequences + 1,)` int64, where each sequence begins. targets:
        `(sequences,)` int64 classes (-100 unknown), `(sequences, labels)` int64, or `(sequences, outputs)` float64; of
        positions, the same for each base or bin. kind, per_token, stride: as of a `Batch`.
    """

    ids: np.ndarray
    bounds: np.ndarray
    targets: np.ndarray
    kind: Kind = "labels"
    per_token: bool = False
    stride: int = 1

    @classmethod
    def of(cls, ids: np.ndarray, labels: np.ndarray | None = None) -> Examples:
        """Sequences of one length, `(sequences, length)`."""
        n, length = ids.shape
        targets = np.full(n, -100) if labels is None else np.asarray(labels, dtype=np.int64)
        return cls(np.ascontiguousarray(fold_case(ids), dtype=np.uint8).ravel(), np.arange(n + 1) * length, targets)

    @classmethod
    def read(cls, items: Iterable[Batch]) -> Examples:
        """From batches of one. Raises DataError if there is none, or one has no targets."""
        ids, targets, first = [], [], None
        for item in items:
            if item.targets is None:
                raise DataError("A sequence has no target. Baselines are fitted to labelled sequences.")
            first = first or item
            length = item.inputs.shape[1] if item.mask is None else int(item.mask.sum())
            ids.append(fold_case(item.inputs[0, :length].numpy().astype(np.uint8)))
            of = item.targets[0, : -(-length // item.stride)] if item.per_token else item.targets
            targets.append(of[..., None] if item.kind == "values" and of.dim() == 1 else of)
        if first is None:
            raise DataError("There is no sequence that a baseline could be fitted to.")
        bounds = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
        return cls(np.concatenate(ids), bounds, torch.cat(targets).numpy(), first.kind, first.per_token, first.stride)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def n_bases(self) -> int:
        return int(self.bounds[-1])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def take(self, index: Sequence[int] | np.ndarray) -> Examples:
        """Some of the sequences, in this order."""
        chosen = np.asarray(index)
        parts = [self.ids[self.bounds[i] : self.bounds[i + 1]] for i in chosen]
        bounds = np.concatenate([[0], np.cumsum(self.lengths[chosen])]).astype(np.int64)
        if self.per_token:
            bins = np.concatenate([[0], np.cumsum(-(-self.lengths // self.stride))])
            targets = np.concatenate([self.targets[bins[i] : bins[i + 1]] for i in chosen])
        else:
            targets = self.targets[chosen]
        ids = np.concatenate(parts) if parts else self.ids[:0]
        return dataclasses.replace(self, ids=ids, bounds=bounds, targets=targets)

    def parts(self, bases: int) -> Iterator[Examples]:
        """Without targets, neighbours together, of about so many bases each."""
        first = 0
        while first < len(self):
            last = max(int(np.searchsorted(self.bounds, self.bounds[first] + bases, side="right")) - 1, first + 1)
            begin, end = self.bounds[first], self.bounds[last]
            yield dataclasses.replace(
                self, ids=self.ids[begin:end], bounds=self.bounds[first : last + 1] - begin, targets=self.targets[:0]
            )
            first = last

    def known(self) -> Examples:
        """Without the sequences whose class is unknown."""
        if self.kind != "labels" or self.per_token or (self.targets >= 0).all():
            return self
        return self.take(np.flatnonzero(self.targets >= 0))

    def pieces(self, wanted: int, shortest: int) -> Examples:
        """Sequences cut into pieces of one class, so that there are about so many, each of at least so many bases."""
        size = max(self.n_bases // max(wanted, 1), shortest)
        counts = np.maximum(self.lengths // size, 1)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = np.repeat(self.bounds[:-1], counts) + number * size
        targets = self.targets.repeat(counts, axis=0)
        return dataclasses.replace(self, bounds=np.append(begins, self.n_bases), targets=targets)

    def split(self, share: float, seed: int = 0) -> tuple[Examples, Examples]:
        """All but a share of the sequences, and the share: a seeded draw."""
        order = np.random.default_rng(seed).permutation(len(self))
        count = max(round(share * len(self)), 1)
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def fewer(self, most: int, seed: int = 0) -> Examples:
        """At most so many of the sequences: a seeded draw."""
        if len(self) <= most:
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:most]))
