"""Bases to ids: A C G T N = 0 1 2 3 4."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, shown

BASES = "ACGTN"
N = 4
_AMBIGUOUS = "RYSWKMBDHV"  # IUPAC codes of several bases (Cornish-Bowden, Nucleic Acids Res. 13, 1985)
_INVALID = 255


class InvalidBase(DataError):
    """A letter that is not a base: `letter` at `position` (from 0) of a sequence."""

    def __init__(self, letter: str, position: int) -> None:
        self.letter, self.position = letter, position
        super().__init__(
            f"The letter {shown(letter)} at position {position + 1} is not a base. Bases are A C G T U N and the "
            f"ambiguity codes {' '.join(_AMBIGUOUS)}, in either case; remove gaps (and a '*' at the end), and write N "
            "for unknown bases."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.letter, self.position)


def _encoding(lowercase: str) -> np.ndarray:
    table = np.full(256, _INVALID, dtype=np.uint8)
    for letters, base in (*((base, base) for base in BASES), ("U", "T"), (_AMBIGUOUS, "N")):
        for letter in letters:
            table[ord(letter)] = BASES.index(base)
            table[ord(letter.lower())] = BASES.index(base) + (len(BASES) if lowercase == "keep" else 0)
    return table


def fold_case(ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Ids of a `lowercase="keep"` tokenizer, of any shape, to ids of a `"fold"` one (0..4), of their dtype. out: where
    uint8 ids go, not `ids`."""
    ids = np.asarray(ids)
    if ids.dtype != np.uint8:
        return ids % len(BASES)
    # below 5, the difference wraps around: several times faster
    return np.minimum(ids, np.subtract(ids, np.uint8(len(BASES)), out=out), out=out)


def complement(folded: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Ids 0..4, uint8 of any shape, to ids of the complementary bases, in the same order. out: where they go, `folded`
    itself too."""
    # N, 4, becomes 7 first, and the other number is 4 there and larger elsewhere; NumPy's minimum of an array and a
    # single number is ten times slower than that of two arrays
    return np.minimum(np.bitwise_xor(folded, np.uint8(3)), np.bitwise_or(folded, np.uint8(N)), out=out)


def is_lowercase(ids: np.ndarray) -> np.ndarray:
    """Where a `lowercase="keep"` tokenizer saw lower case (repeats, in soft-masked genomes): bool, in the shape of the
    ids."""
    return ids >= len(BASES)


class BaseTokenizer(Tokenizer):
    """One token a base. U reads as T, IUPAC ambiguity codes as N.

    complement: `(vocab_size,)` uint8, the id of each base's partner; N is its own.
    table: the id of each of the 256 bytes; 255 for those that are not a base.

    Args:
        lowercase: `"fold"` reads lower case as upper case (5 ids: A C G T N); `"keep"` gives it ids of its own (10 ids:
            A C G T N a c g t n), which is how a soft mask is kept (see `fold_case`, `is_lowercase`).
    """

    def __init__(self, lowercase: Literal["fold", "keep"] = "fold") -> None:
        if lowercase not in ("fold", "keep"):
            raise ConfigError(f"lowercase must be 'fold' or 'keep', not {shown(lowercase)}.")
        self.lowercase = lowercase
        self.letters = BASES if lowercase == "fold" else BASES + BASES.lower()
        self.vocab_size = len(self.letters)
        self.complement = np.array([3, 2, 1, 0, 4, 8, 7, 6, 5, 9][: self.vocab_size], dtype=np.uint8)
        self._encoding = _encoding(lowercase)
        self.table = self._encoding.tobytes()
        self._decoding = np.frombuffer(self.letters.encode(), dtype=np.uint8)

    @property
    def options(self) -> dict[str, Any]:
        return {"lowercase": self.lowercase}

    def encode(self, raw: str) -> np.ndarray:
        """Ids of a sequence of letters, `(length,)` uint8. Raises InvalidBase for a letter that is not a base."""
        ids = self._encoding[np.frombuffer(raw.encode("latin-1", "replace"), dtype=np.uint8)]
        if len(wrong := np.flatnonzero(ids == _INVALID)):
            raise InvalidBase(raw[wrong[0]], int(wrong[0]))
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Letters of ids; N for those of no base, which vocabularies of published models have as well."""
        ids = np.asarray(ids)
        return self._decoding[np.where(ids < self.vocab_size, ids, N)].tobytes().decode("ascii")

    def reverse_complement(self, ids: np.ndarray) -> np.ndarray:
        """The other strand, read in its own direction: `(..., length)` ids → the same shape."""
        return self.complement[np.asarray(ids)][..., ::-1]
