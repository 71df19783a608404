"""What the tests of tokenising share, also with the processes, which are to import little for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mambaseq_text.rows import BadRow
from mambaseq_text.tokenising import Piece, Reading
from mambaseq_text.tokenization import HFTokenizer

from mambaseq.data.store import TokenStore

NONE = {"validation_fraction": 0.0, "test_fraction": 0.0}


class Numbers(Reading):
    """Twenty texts, of which the last ones may not come."""

    def __init__(self, stops_at: int = 20) -> None:
        self.stops_at, self.read = stops_at, 0

    def pieces(self, place: Any) -> Iterator[Piece]:
        for number in range(place or 0, 20):
            if number >= self.stops_at:
                raise KeyboardInterrupt
            self.read += 1
            yield Piece(f"{number}", f"text {number} " * 5, number + 1)


def same(one: TokenStore, other: TokenStore) -> bool:
    return one.names == other.names and np.array_equal(one.tokens, other.tokens) and one.found == other.found


class Ends(HFTokenizer):
    def __reduce__(self) -> Any:
        return (exit, ())


class Strange(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Refuses(HFTokenizer):
    def part(self, *given: Any) -> Any:
        raise BadRow("Row 3 of a.jsonl is bad.", "a.jsonl", 3, "bad") if self.eos else Strange("this", "that")
