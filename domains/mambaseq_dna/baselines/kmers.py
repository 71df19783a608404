"""Counts of short words of DNA."""

from __future__ import annotations

import functools

import numpy as np
from scipy import sparse

from mambaseq.compiled import kept_njit
from mambaseq.errors import ConfigError
from mambaseq_dna.baselines.examples import Examples

LONGEST = 12
"""The longest words: all 16 million have a count in a table."""
_DENSE, _FILLED = 2**27, 1 / 16  # counts of so many numbers may be a dense matrix, if this share of them is not 0


@functools.lru_cache(maxsize=32)
def partners(k: int) -> np.ndarray:
    """`(4^k,)` int64: the reverse complement of each word."""
    words = np.arange(4**k)
    found = np.zeros_like(words)
    for _ in range(k):
        found = found * 4 + 3 - words % 4
        words = words // 4
    return found


@functools.lru_cache(maxsize=32)
def columns(k: int, both_strands: bool) -> tuple[np.ndarray, int]:
    """The column of each word, `(4^k,)` int32, and how many there are. both_strands: a word and its reverse complement
    have one."""
    words = np.arange(4**k)
    if not both_strands:
        return words.astype(np.int32), len(words)
    first = np.minimum(words, partners(k))
    names, place = np.unique(first, return_inverse=True)
    return place.astype(np.int32), len(names)


@kept_njit(nogil=True)
def _listed(ids, bounds, k, place, found, ends):  # type: ignore[no-untyped-def]
    """The column of every word, sequence by sequence, and where each sequence's end; words with N are left out."""
    mask, n = 4**k - 1, 0
    for sequence in range(len(bounds) - 1):
        code, run = 0, 0
        for at in range(bounds[sequence], bounds[sequence + 1]):
            base = ids[at]
            code = ((code << 2) | base) & mask
            run = run + 1 if base < 4 else 0
            if run >= k:
                found[n] = place[code]
                n += 1
        ends[sequence + 1] = n


@kept_njit(nogil=True)
def _counted(ids, bounds, k, place, counts):  # type: ignore[no-untyped-def]
    """How often each sequence has a word of each column, into `(sequences, columns)`."""
    mask = 4**k - 1
    for sequence in range(len(bounds) - 1):
        code, run = 0, 0
        for at in range(bounds[sequence], bounds[sequence + 1]):
            base = ids[at]
            code = ((code << 2) | base) & mask
            run = run + 1 if base < 4 else 0
            if run >= k:
                counts[sequence, place[code]] += 1


@kept_njit(nogil=True)
def _tallied(ids, bounds, labels, k, table):  # type: ignore[no-untyped-def]
    """How often the sequences of each class have each word, into `(4^k, classes)`."""
    mask = 4**k - 1
    for sequence in range(len(bounds) - 1):
        code, run, label = 0, 0, labels[sequence]
        if label < 0:
            continue
        for at in range(bounds[sequence], bounds[sequence + 1]):
            base = ids[at]
            code = ((code << 2) | base) & mask
            run = run + 1 if base < 4 else 0
            if run >= k:
                table[code, label] += 1


@kept_njit(nogil=True)
def _summed(ids, bounds, k, table, sums):  # type: ignore[no-untyped-def]
    """Sums of the rows of a table `(4^k, classes)` over the words of each sequence."""
    mask, n = 4**k - 1, table.shape[1]
    for sequence in range(len(bounds) - 1):
        code, run = 0, 0
        for at in range(bounds[sequence], bounds[sequence + 1]):
            base = ids[at]
            code = ((code << 2) | base) & mask
            run = run + 1 if base < 4 else 0
            if run >= k:
                for c in range(n):
                    sums[sequence, c] += table[code, c]


def tallied(examples: Examples, k: int, n_classes: int, both_strands: bool) -> np.ndarray:
    """How often the sequences of each class have each word of k bases, `(4^k, classes)` float32; words with N are left
    out. both_strands: on either strand."""
    table = np.zeros((4**k, n_classes), dtype=np.float32 if examples.n_bases < 2**24 else np.float64)
    _tallied(examples.ids, examples.bounds, examples.targets, k, table)
    return (table + table[partners(k)] if both_strands else table).astype(np.float32)


def summed(examples: Examples, k: int, table: np.ndarray) -> np.ndarray:
    """`(sequences, classes)` float64: sums of the rows of a table `(4^k, classes)` of floats over each sequence's
    words."""
    sums = np.zeros((len(examples), table.shape[1]))
    _summed(examples.ids, examples.bounds, k, table, sums)
    return sums


def frequencies(examples: Examples, k: int, both_strands: bool) -> np.ndarray | sparse.csr_matrix:
    """The frequency of each word of k bases in each sequence, `(sequences, words)` float32, rows of sum 1 (0 without
    words); words with N are left out. Short sequences have a sparse matrix."""
    place, width = columns(k, both_strands)
    n = len(examples)
    if n * width <= _DENSE and examples.n_bases > _FILLED * n * width:
        counts = np.zeros((n, width), dtype=np.float32)
        _counted(examples.ids, examples.bounds, k, place, counts)
        counts /= np.maximum(counts.sum(1, keepdims=True), 1)
        return counts
    found, ends = np.empty(examples.n_bases, dtype=np.int32), np.zeros(n + 1, dtype=np.int64)
    _listed(examples.ids, examples.bounds, k, place, found, ends)
    number = np.maximum(np.diff(ends), 1)
    shares = np.repeat(1 / number, np.diff(ends)).astype(np.float32)
    matrix = sparse.csr_matrix((shares, found[: ends[-1]], ends), shape=(n, width))
    matrix.sum_duplicates()
    return matrix


def kmer_frequencies(ids: np.ndarray, k: int, both_strands: bool = True) -> np.ndarray:
    """The frequency of each word of k bases in a sequence.

    ids: `(length,)` or `(sequences, length)`, A C G T N = 0..4; words with N are left out.
    both_strands: a word and its reverse complement count as one, as in double-stranded DNA. Returns `(sequences,
        words)` float32, rows of sum 1; words is 4^k, or about half of it for both strands.

    Raises ConfigError for sequences that are shorter than a word.
    """
    ids = np.atleast_2d(ids)
    length = ids.shape[1]
    if length < k:
        raise ConfigError(f"Words of {k} bases need windows of at least as many, not {length}.")
    found = frequencies(Examples.of(ids), k, both_strands)
    return found.toarray() if sparse.issparse(found) else found  # type: ignore[union-attr]
