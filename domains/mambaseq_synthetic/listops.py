"""ListOps (Nangia and Bowman, arXiv:1804.06028) as in the Long Range Arena (Tay et al., arXiv:2011.04006)."""

from __future__ import annotations

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError, DataError
from mambaseq_synthetic.drawing import TEST, VALIDATION, check_sets

TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
MIN, MAX, MED, SM, END = range(10, 15)
OPERATOR_SHARE = 0.25
"""The probability that an argument is itself an expression, as published."""

_ATTEMPTS = 100_000


def encode(expression: str) -> np.ndarray:
    """Token ids of an expression, `(length,)` int64.

    >>> encode("[MAX 2 9 [MIN 4 7 ] 0 ]").tolist()
    [11, 2, 9, 10, 4, 7, 14, 0, 14]
    """
    return np.array([TOKENS.index(token) for token in expression.split()], dtype=np.int64)


def decode(ids: np.ndarray) -> str:
    """The expression of `(length,)` token ids.

    >>> decode(encode("[SM 1 2 ]"))
    '[SM 1 2 ]'
    """
    return " ".join(TOKENS[token] for token in ids)


@inner_njit(nogil=True)
def _apply(operator: int, arguments: np.ndarray) -> int:
    """Sorts the arguments. By loops, since Numba takes seconds to compile NumPy's sort."""
    n, total = len(arguments), 0
    for i in range(n):
        total += arguments[i]
        for j in range(i, 0, -1):
            if arguments[j - 1] <= arguments[j]:
                break
            arguments[j - 1], arguments[j] = arguments[j], arguments[j - 1]
    if operator == MIN:
        return arguments[0]
    if operator == MAX:
        return arguments[n - 1]
    if operator == SM:
        return total % 10
    return (arguments[(n - 1) // 2] + arguments[n // 2]) // 2


@kept_njit(nogil=True)
def value(ids: np.ndarray) -> int:
    """The value, 0 to 9, of a well-formed expression `(length,)` int64. The median of an even number of arguments is
    the mean of the middle two, rounded down, as published.

    >>> value(encode("[MAX 2 9 [MIN 4 7 ] 0 ]")), value(encode("[MED 1 4 9 8 ]")), value(encode("[SM 7 8 9 ]"))
    (9, 6, 4)
    """
    stack = np.zeros(len(ids) + 1, dtype=np.int64)
    opened = np.zeros(len(ids) + 1, dtype=np.int64)  # for each open expression, the place of its operator on the stack
    top = depth = 0
    for token in ids:
        if token == END:
            depth -= 1
            start = opened[depth]
            stack[start] = _apply(stack[start], stack[start + 1 : top])
            top = start + 1
        else:
            if token >= MIN:
                opened[depth] = top
                depth += 1
            stack[top] = token
            top += 1
    return stack[0]


@inner_njit(nogil=True)
def _grow(rng: np.random.Generator, out: np.ndarray, max_depth: int, max_args: int) -> int:
    """Write one random expression into `out`; returns its length, 0 if it does not fit."""
    missing = np.zeros(max_depth + 1, dtype=np.int64)  # arguments still to come at each level
    depth = length = 0
    needed = 1  # the fewest tokens that must follow
    missing[0] = 1
    while True:
        if missing[depth] == 0:
            out[length] = END
            length += 1
            needed -= 1
            depth -= 1
            if depth == 0:
                return length
            continue
        missing[depth] -= 1
        # the root is an expression, since a single digit is too short
        if depth == 0 or (depth + 1 < max_depth and rng.random() < OPERATOR_SHARE):
            arguments = int(rng.integers(2, max_args + 1))
            needed += arguments + 1
            depth += 1
            missing[depth] = arguments
            out[length] = rng.integers(MIN, END)
        else:
            out[length] = rng.integers(0, MIN)
        length += 1
        needed -= 1
        if length + needed > len(out):
            return 0


@kept_njit(nogil=True)
def _sample(
    rng: np.random.Generator, out: np.ndarray, min_length: int, max_depth: int, max_args: int, attempts: int
) -> int:
    for _ in range(attempts):
        length = _grow(rng, out, max_depth, max_args)
        if length >= min_length:
            return length
    return 0


def draw(
    rng: np.random.Generator,
    *,
    min_length: int = 50,
    max_length: int = 200,
    max_depth: int = 10,
    max_args: int = 10,
) -> np.ndarray:
    """A random expression, `(length,)` int64.

    An argument is an expression with probability 1/4, otherwise a digit; at depth `max_depth` (the whole expression has
    depth 1) it is always a digit. The operator and the number of arguments, 2 to `max_args`, are uniform. Expressions
    shorter than `min_length` or longer than `max_length` tokens are drawn again.
    Raises DataError if none of 100,000 fits.

    >>> decode(draw(np.random.default_rng(0), min_length=10, max_length=20))
    '[MED 0 [SM 0 2 ] [MIN 5 6 ] 4 9 9 6 8 1 ]'
    """
    out = np.zeros(max_length, dtype=np.int64)
    depth = min(max_depth, max_length)  # bounds that every expression keeps
    length = _sample(rng, out, min_length, depth, max_args, _ATTEMPTS)
    if length == 0:
        raise DataError(
            f"No expression of {min_length} to {max_length} tokens was found with at most {max_args} arguments and "
            f"depth {max_depth}. Lower data.min_length, or raise data.max_depth or data.max_args."
        )
    return out[:length]


class Expressions:
    """Random expressions and their values; item i depends only on `(seed + 2, i)`; the seeds of validation and test
    sets are -1 and -2."""

    def __init__(self, seed: int, size: int, *, endless: bool = False, **options: int) -> None:
        self.seed, self.size, self.endless, self.options = seed, size, endless, options

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        if not self.endless and not 0 <= index < self.size:
            raise IndexError(f"The set has {self.size} items; asked for {index}.")
        ids = draw(np.random.default_rng((self.seed + 2, index)), **self.options)
        return Batch(inputs=torch.from_numpy(ids)[None], targets=torch.tensor([value(ids)]))


class ListOpsData(SequenceData):
    """ListOps: the value of a nested expression of MIN, MAX, MED (median) and SM (sum modulo 10) over digits.

    15 tokens: the digits 0 to 9 as themselves, the four operators with their opening bracket, and the closing bracket.
    10 classes: the value. The Long Range Arena's lengths are `min_length: 500`, `length: 2000`; its training set has
    96,000 expressions, here every epoch has new ones.

    Args:
        length: tokens of the longest expression.
        min_length: tokens of the shortest expression.
        max_depth: depth at which there are only digits; the whole expression has depth 1.
        max_args: most arguments of an operator.
        samples_per_epoch: training expressions that make an epoch.
        n_validation: validation expressions.
        n_test: test expressions.
        seed: of the training expressions; validation and test expressions are the same for any seed.
    """

    class_names = tuple("0123456789")
    vocab_size = len(TOKENS)

    def __init__(
        self,
        length: int = 200,
        min_length: int = 50,
        max_depth: int = 10,
        max_args: int = 10,
        samples_per_epoch: int = 96000,
        n_validation: int = 2000,
        n_test: int = 2000,
        seed: int = 0,
    ) -> None:
        if not 4 <= min_length <= length:
            raise ConfigError(
                f"data.min_length must be at least 4 and at most data.length; they are {min_length} and {length}."
            )
        if max_depth < 2 or max_args < 2:
            raise ConfigError(
                f"data.max_depth and data.max_args must be at least 2; they are {max_depth} and {max_args}."
            )
        check_sets(seed, samples_per_epoch, n_validation, n_test, max(length, max_args, max_depth))
        self.length, self.min_length, self.max_depth, self.max_args = length, min_length, max_depth, max_args
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self.seed = seed

    def setup(self) -> None:
        """Nothing is read."""

    def _set(self, seed: int, size: int, endless: bool = False) -> Expressions:
        return Expressions(
            seed,
            size,
            endless=endless,
            min_length=self.min_length,
            max_length=self.length,
            max_depth=self.max_depth,
            max_args=self.max_args,
        )

    def train(self) -> Expressions:
        return self._set(self.seed, self.samples_per_epoch, endless=True)

    def validation(self) -> Expressions:
        return self._set(VALIDATION, self.n_validation)

    def test(self) -> Expressions:
        return self._set(TEST, self.n_test)
