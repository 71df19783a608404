"""What is compiled and captured before requests come: few shapes, into which all that they need is filled up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class WarmUp(NamedTuple):
    """What was prepared: so many shapes `of` all, in how many seconds. why_not: the reasons why some are not captured
    in CUDA graphs."""

    made: int
    of: int
    seconds: float
    why_not: str

    def __str__(self) -> str:
        rest = f", the other {self.of - self.made} when they are needed" if self.made < self.of else ""
        slow = f"; some without CUDA graphs, since {self.why_not}" if self.why_not else ""
        return f"{self.made} shapes of steps and prompts prepared in {self.seconds:.1f} s{rest}{slow}"


def prepared(shapes: Sequence[Callable[[], str | None]], seconds: float) -> WarmUp:
    """Prepare shapes, each of which says why it is not captured, if so; none is begun after so many seconds."""
    begun, made, why_not = time.monotonic(), 0, set[str]()
    for prepare in shapes:
        if time.monotonic() - begun > seconds:
            break
        if (reason := prepare()) is not None:
            why_not.add(reason)
        made += 1
    return WarmUp(made, len(shapes), time.monotonic() - begun, "; ".join(sorted(why_not)))


def sizes_up_to(most: int, first: int) -> list[int]:
    """Sizes that others are filled up to: powers of two times `first`, from the fifth on also what lies halfway to the
    next, and `most`."""
    powers = [first << number for number in range(32) if first << number < most]
    halves = [3 * size // 2 for size in powers[4:] if 3 * size // 2 < most]
    return [*sorted([*powers, *halves]), most]
