"""Tokens to text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_UNKNOWN = "\ufffd"  # what stands for bytes that are no character, or not a whole one yet
_BEFORE = 8  # tokens of the prompt that are decoded with the first ones, since blanks may depend on them
_HELD = 8  # tokens that are held back at most; those of one character are fewer
_CHARACTER = 3  # most tokens of a character that is not whole


class Text:
    """The text of an answer, which grows token by token.

    Args:
        decode: ids `(length,)` to text, such as a tokenizer's.
        prompt: ids before the answer.
        stops: strings that end the answer; what is given out ends before the first of them, also where it lies across
            tokens.
    """

    def __init__(self, decode: Callable[[Any], str], prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._ids = [int(one) for one in prompt[-_BEFORE:]]
        if self._text(0).endswith(_UNKNOWN):  # begins or ends within a character
            self._ids = []
        self._begin, self._told = 0, len(self._ids)
        self._pending = ""
        self.stopped = False

    def add(self, token: int) -> bool:
        """A further token. Returns whether a stop string is there; tokens after it are ignored."""
        if self.stopped:
            return True
        self._ids.append(token)
        if not self._text(self._begin).endswith(_UNKNOWN):
            self._advance(len(self._ids))
        elif len(self._ids) - self._told > _HELD:
            self._advance(len(self._ids) - _CHARACTER)
        return self.stopped

    def take(self, last: bool = False) -> str:
        """The text that is new since the last call. What may be the beginning of a stop string, or of a character, is
        held back, unless it is the last call."""
        if last and not self.stopped:
            self._advance(len(self._ids))
        held = 0 if last or self.stopped else self._held()
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _text(self, begin: int, end: int | None = None) -> str:
        return self._decode(np.array(self._ids[begin:end], dtype=np.int64))

    def _advance(self, end: int) -> None:
        """Decode the tokens before `end`, next to some that were decoded before."""
        before, both = self._text(self._begin, self._told), self._text(self._begin, end)
        self._pending += both[len(before) :]
        self._begin, self._told = self._told, end
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self._pending, self.stopped = self._pending[: min(found)], True

    def _held(self) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0
