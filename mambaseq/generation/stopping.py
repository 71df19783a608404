"""Text while its tokens come: whole characters only, and where a text ends that was to stop it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, shown
from mambaseq.generation.prompts import Prompts

_MOST, _LONGEST = 64, 1000  # stop strings, and characters in one
_CONTEXT = 8  # tokens before a new one that its text may depend on
_WINDOW = 64  # tokens that are decoded again for each new one, at most
_BYTES = 4  # at most, of a character
_PARTIAL = "\ufffd"  # what stands for the bytes of a character that is not whole


def check_stop(stop: Any) -> list[str]:
    """The texts that end a sequence. Raises ConfigError unless they are at most 64 texts of 1 to 1,000 characters."""
    found = [stop] if isinstance(stop, str) else list(stop)
    if len(found) > _MOST:
        raise ConfigError(f"stop must be at most {_MOST} texts, not {len(found):,}.")
    for one in found:
        if not isinstance(one, str) or not 1 <= len(one) <= _LONGEST:
            raise ConfigError(f"stop must be texts of 1 to {_LONGEST:,} characters, and {shown(one)} is none.")
    return found


class Text:
    """The text of tokens as they come.

    A character's last token gives it. A tokenizer that may still change the end of a text (`changes_later`) gives whole
    words.
    before: ids in front of them, which are no part of the text, but on which it may depend.
    """

    def __init__(self, tokenizer: Tokenizer, before: np.ndarray | Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._by_words = bool(getattr(tokenizer, "changes_later", False))
        self._ids = [int(one) for one in before[-_CONTEXT:]]
        self._given = len(self._decoded()) if self._ids else 0

    def add(self, ids: Sequence[int]) -> str:
        """The characters that are whole with the next ids."""
        self._ids += ids
        text = self._decoded()
        partial = min(len(text) - len(text.rstrip(_PARTIAL)), _BYTES - 1)
        if self._by_words and len(self._ids) <= _WINDOW:
            partial = max(partial, len(text) - max(text.rfind(" "), text.rfind("\n"), 0))
        new = self._up_to(text, len(text) - partial)
        if len(self._ids) > _WINDOW:
            self._ids = self._ids[-_CONTEXT:]
            self._given = max(len(self._decoded()) - partial, 0)
        return new

    def rest(self) -> str:
        """What is not whole, at the end: signs that stand for bytes which are no characters."""
        text = self._decoded()
        return self._up_to(text, len(text))

    def _up_to(self, text: str, end: int) -> str:
        new = text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(np.asarray(self._ids, dtype=np.int64)))


class StopStrings:
    """Texts that end a sequence, wherever the borders of its tokens are. Only what is generated is searched.

    Raises ConfigError for texts that are none (see `check_stop`), and a tokenizer that does not decode to text.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Tokenizer) -> None:
        self.strings, self.tokenizer = check_stop(strings), tokenizer
        self._longest = max(map(len, self.strings), default=0)
        if not isinstance(tokenizer.decode(np.zeros(0, dtype=np.int64)), str):
            raise ConfigError("stop is for models of text, and this one's tokenizer makes none. Leave it out.")

    def watch(self, prompts: Prompts, samples: int) -> Watch:
        """A search in each of the samples of prompts."""
        tails = [row[max(len(row) - _CONTEXT, 0) : len(row)] for row in prompts.rows]
        return Watch([Search(self, tail) for tail in tails for _ in range(samples)])

    def cut(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The generated ids `(n,)` before the first stop: their text ends where it begins. Within a token the text in
        front of the stop is encoded anew. All ids if there is no stop. before: the ids of the prompt."""
        search = Search(self, before)
        search.add(ids.tolist())
        search.finish()
        if search.at is None:
            return ids
        begin = search.lengths[bisect.bisect_right(search.lengths, search.at) - 1]
        kept = bisect.bisect_left(search.lengths, begin)  # without the first bytes of a character of the stop
        if begin == search.at:
            return ids[:kept]
        more = np.asarray(self.tokenizer.encode(search.text[begin : search.at]))
        if len(more) and more[0] == getattr(self.tokenizer, "bos_id", None):
            more = more[1:]
        return np.concatenate([ids[:kept], more.astype(ids.dtype)])


class Search:
    """The search for the first stop in one sequence's text.

    text: so far. lengths: its length after each number of tokens, from 0 on. at: where the stop begins, None without.
    """

    def __init__(self, stops: StopStrings, before: np.ndarray) -> None:
        self._stops, self._new = stops, Text(stops.tokenizer, before)
        self.text, self.lengths = "", [0]
        self.at: int | None = None

    @property
    def held(self) -> int:
        """How many of the last characters may be the beginning of a stop, at most."""
        return max(self._stops._longest - 1, 0)

    def add(self, ids: Sequence[int]) -> bool:
        """The next ids. Returns whether there is a stop by now; what comes after it is not read."""
        for one in ids:
            if self.at is not None:
                break
            self._find(self._new.add([one]))
            self.lengths.append(len(self.text))
        return self.at is not None

    def finish(self) -> None:
        """There are no more ids: what is not whole is text, too."""
        if self.at is None:
            self._find(self._new.rest())
            self.lengths[-1] = len(self.text)

    def _find(self, new: str) -> None:
        start = max(len(self.text) - self.held, 0)
        self.text += new
        found = [place for stop in self._stops.strings if (place := self.text.find(stop, start)) >= 0]
        self.at = min(found, default=None)


class Watch:
    """The search in all sequences of a batch."""

    def __init__(self, searches: list[Search]) -> None:
        self._searches = searches

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """The next tokens of each, `(batch, n)`. Returns which have ended, `(batch,)` bool."""
        return np.array([search.add(row) for search, row in zip(self._searches, tokens.tolist(), strict=True)])
