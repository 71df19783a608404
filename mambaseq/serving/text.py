"""An answer's text as it comes: whole characters only, up to a stop string."""

from __future__ import annotations

import numpy as np

from mambaseq.generation.stopping import Search, StopStrings


class Answer:
    """The text of an answer, which grows token by token.

    stops: texts that end it, and the tokenizer. prompt: ids `(length,)` before it.
    """

    def __init__(self, stops: StopStrings, prompt: np.ndarray) -> None:
        self._strings, self._search = stops.strings, Search(stops, prompt)
        self._given = 0

    def add(self, token: int) -> bool:
        """A further token. Returns whether a stop string is there; tokens after it are ignored."""
        return self._search.add([token])

    def take(self, last: bool = False) -> str:
        """The text that is new since the last call, up to the first stop string. What may be the beginning of one, or
        of a character, is held back, unless it is the last call."""
        if last:
            self._search.finish()
        text, end = self._search.text, self._search.at
        if end is None:
            end = len(text) - (0 if last else self._held(text))
        begin, self._given = self._given, max(end, self._given)
        return text[begin:end]

    def _held(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._strings):
                return size
        return 0
