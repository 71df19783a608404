"""How many tokens are worth drafting, by what calls take and how often guesses were right."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable

# Measurements of one kind that are looked at; their median counts, since a machine does other things, too.
_LATEST = 5
_PREPARE = 2  # the first calls compile, or are captured
_NUMBERS = (1, 3, 7, 15)  # of guesses that are thought about
_FORGOTTEN = 0.9  # of what was right and wrong, at each round
_BEGINNING = (2.0, 1.0)  # right and wrong, before anything is known
# Tokens without drafts of a kind that did not pay, the first time and at most; then it is tried once more.
_REST, _LONGEST_REST = 16, 512
# How much faster drafting must promise to be.
_MARGIN = 1.05
# How often guesses are right, where they are tried once more, and what is known then.
_HOPE, _AGAIN = 0.9, (0.5, 0.25)


class Timed:
    """What one kind of call takes, in seconds."""

    def __init__(self) -> None:
        self._seen = 0
        self._latest: collections.deque[float] = collections.deque(maxlen=_LATEST)

    def add(self, seconds: float) -> None:
        """One more measurement."""
        self._seen += 1
        if self._seen > _PREPARE:
            self._latest.append(seconds)

    @property
    def seconds(self) -> float | None:
        """None before it is known."""
        return statistics.median(self._latest) if self._latest else None


class Pace:
    """Chooses the number of guesses of a round.

    most: guesses at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.step, self.guess = Timed(), Timed()
        self._calls: collections.defaultdict[int, Timed] = collections.defaultdict(Timed)  # by size
        self._right: dict[int, tuple[float, float]] = {}
        self._rests: dict[int, int] = {}  # how long each kind last rested
        self._until: dict[int, int] = {}  # up to which token

    def begin(self) -> None:
        """Another sequence begins."""
        self._rests.clear()
        self._until.clear()

    def guesses(self, kind: int, left: int, made: int, size: Callable[[int], int]) -> int:
        """How many are worth it; 0 for a plain step.

        left: guesses that are wanted at most. made: tokens so far. size: of a call with so many guesses; 0 where there
        is none.
        """
        plain = self.step.seconds
        if plain is None or made < self._until.get(kind, 0):
            return 0
        again = kind in self._until
        right, wrong = self._right.get(kind, _BEGINNING)
        share = _HOPE if again else right / (right + wrong)
        best, found = _MARGIN / plain, 0
        guess = self.guess.seconds
        for n in sorted({min(number, self.most, left) for number in _NUMBERS}):
            if (of_size := size(n)) == 0:
                continue
            expected = (1 - share ** (n + 1)) / (1 - share)
            takes = self._call(of_size, plain) + n * (plain / 4 if guess is None else guess)
            if expected / takes > best:
                best, found = expected / takes, n
                if again:  # the fewest that may pay
                    break
        if found:
            if again:
                del self._until[kind]
                self._right[kind] = _AGAIN
            elif kind in self._rests:  # it has to pay for as long as it rested
                self._rests[kind] = max(self._rests[kind] - 1, _REST // 2)
        else:
            self._rests[kind] = min(2 * self._rests.get(kind, _REST // 2), _LONGEST_REST)
            self._until[kind] = made + self._rests[kind]
        return found

    def _call(self, size: int, plain: float) -> float:
        """What a call takes; before that is known, at least what a smaller one does."""
        known = [seconds for other, timed in self._calls.items() if other <= size and (seconds := timed.seconds)]
        own = self._calls[size].seconds
        return max([plain, *known]) if own is None else own

    def resting(self, kind: int, made: int) -> int:
        """Tokens that a kind still rests."""
        return self._until.get(kind, 0) - made

    def called(self, size: int, seconds: float) -> None:
        """What a call of a size took."""
        self._calls[size].add(seconds)

    def came_of(self, kind: int, right: int, n: int) -> None:
        """How many of n guesses were right."""
        before = self._right.get(kind, _BEGINNING)
        self._right[kind] = before[0] * _FORGOTTEN + right, before[1] * _FORGOTTEN + (right < n)
