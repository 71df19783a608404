"""Hashes of words of tokens, the same for either strand, of which a share is kept: everywhere the same words."""

from __future__ import annotations

import math

import numpy as np

from mambaseq.data.audited import WORD

BLOCK = 1 << 15
"""Letters that are hashed at once: what is computed on stays in a processor's cache."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of larger alphabets: odd, so that no letter is lost


def _joined(one: np.ndarray, other: np.ndarray, power: np.uint64, backwards: bool) -> np.ndarray:
    size = min(len(one), len(other))
    first, second = (other, one) if backwards else (one, other)
    found = first[:size] * power
    found += second[:size]
    return found


def _rolled(letters: np.ndarray, base: np.uint64, backwards: bool) -> np.ndarray:
    """A number for each word: its letters as digits to a base, modulo 2^64. Words of 2, 4, 8 ... letters are joined."""
    block, size, power = letters, 1, base
    found, done = letters[:0], 0
    while size <= WORD:
        if WORD & size:
            # the power of what is before in memory when backwards, of what comes behind otherwise
            shift = np.uint64(pow(int(base), done if backwards else size, 2**64))
            found = block if not done else _joined(found, block[done:], shift, backwards)
            done += size
        block = _joined(block, block[size:], power, backwards)
        size, power = 2 * size, power * power
    return found[: max(len(letters) - WORD + 1, 0)]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Values with all bits mixed (the finaliser of splitmix64: one to one). In place."""
    shifted = np.empty_like(values)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= np.right_shift(values, np.uint64(shift), out=shifted)
        values *= np.uint64(factor)
    values ^= np.right_shift(values, np.uint64(31), out=shifted)
    return values


class Words:
    """The words of `WORD` letters in sequences.

    complement: the letter that each letter is paired with, `(letters,)`; a word and its reverse complement are then
        one. share: of all different words, those whose hash is among the smallest are kept, above 0 and at most 1. A
        word is kept wherever it occurs or nowhere, so that shares of common words are told without bias.
    """

    def __init__(self, complement: np.ndarray | None = None, share: float = 1.0) -> None:
        # words of up to four letters fit into 64 bits: no two of them have one number
        exact = complement is not None and len(complement) <= 4
        self._base = np.uint64(4) if exact else _BASE
        self._complement = None if complement is None else np.asarray(complement, dtype=np.uint64)
        self._most = None if share >= 1 else np.uint64(math.floor(share * 2**64))

    def of(self, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the kept words, uint64, and where they start, int64.

        letters: `(length,)` integers; words with a letter below 0 are left out.
        """
        unknown = letters < 0
        digits = np.where(unknown, 0, letters).astype(np.uint64) if unknown.any() else letters.astype(np.uint64)
        with np.errstate(over="ignore"):
            hashes = _rolled(digits, self._base, False)
            if self._complement is not None:
                hashes = np.minimum(hashes, _rolled(self._complement[digits], self._base, True))
            hashes = _mixed(hashes.copy() if hashes.base is not None else hashes)
        kept = np.ones(len(hashes), dtype=bool) if self._most is None else hashes < self._most
        if unknown.any() and len(hashes):
            behind = np.concatenate(([0], np.cumsum(unknown)))
            kept &= behind[WORD:] == behind[: len(behind) - WORD]
        (starts,) = np.nonzero(kept)
        return hashes[starts], starts
