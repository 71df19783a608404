"""Which labelled sequences are equal, on either strand."""

from __future__ import annotations

import numpy as np

from mambaseq.data.store import TokenStore
from mambaseq_dna.files.fasta import strand_checksums
from mambaseq_dna.labelled.items import Align, Sequences, fitted
from mambaseq_dna.tokenizer import N, fold_case


def equal_contents(sequences: Sequences, intervals: np.ndarray, length: int | None, align: Align) -> np.ndarray:
    """The same number for sequences that are equal, or the reverse complement of each other, after they are cut;
    `(sequences,)` int64, -1 for those without a base that is known.

    sequences: whole ones. intervals: `(sequences,)` bool, which are intervals of an assembly; the others are all
    records of their stores, whose checksums are kept there. length, align: see `fitted`; padding makes no difference.
    """
    found = np.zeros(len(sequences), dtype=np.uint64)
    known = np.ones(len(sequences), dtype=bool)
    for number, store in enumerate(sequences.stores):
        mine = ~intervals & (sequences.places[:, 0] == number)
        if not mine.any():
            continue
        records = sequences.places[mine, 1]
        found[mine] = _of_records(store, length, align)[records]
        known[mine] = np.logical_or.reduceat(fold_case(store.tokens) != N, store.starts)[records]
    cut = sequences if length is None else Sequences(sequences.stores, fitted(sequences.places, length, align, False))
    for row in np.flatnonzero(intervals).tolist():
        ids = np.ascontiguousarray(cut.read(row))
        found[row] = min(strand_checksums(ids))
        known[row] = bool((fold_case(ids) != N).any())
    return np.where(known, np.unique(found, return_inverse=True)[1].reshape(-1), -1)


def _of_records(store: TokenStore, length: int | None, align: Align) -> np.ndarray:
    """A checksum of each record, the same on either strand, `(records,)` uint64."""
    whole = store.checksums.min(axis=1)
    if length is None or not (longer := store.lengths > length).any():
        return whole

    def made() -> np.ndarray:
        places = np.zeros((len(store), 5), dtype=np.int64)
        places[:, 1], places[:, 3] = np.arange(len(store)), store.lengths
        cut = Sequences([store], fitted(places, length, align, False))
        sums = whole.copy()
        for record in np.flatnonzero(longer).tolist():
            sums[record] = min(strand_checksums(np.ascontiguousarray(cut.read(record))))
        return sums.view(np.int64)

    return store.kept(f"cut-{length}-{align}", made).view(np.uint64)
