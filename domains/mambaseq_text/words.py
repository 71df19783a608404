"""Byte-pair encoding of long texts, several times faster than by the library alone and with the same ids: most words of
a text have been met before.

Byte counts are those of the library too, but for what it drops at the end of a piece, such as an accent that it joins
with its letter: that belongs to the token before it, not to the next."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

_PIECE = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")
"""What is white to the library: Python's own white, but for four control characters."""

# of all bytes that UTF-8 has: one that the vocabulary lacks would be dropped
_LETTERS = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set("ÀÁõö÷øùúûüýþÿ")
_KEPT = 1 << 19  # pieces; about 100 MB
_LONG = 64  # characters of a piece that is not kept
_BLOCK = 1 << 18  # characters that are cut into pieces at once: what they are made of stays in a processor's cache

Encoded = tuple[np.ndarray, np.ndarray]


def by_words(tokenizer: Any) -> bool:
    """Whether a tokenizer of `tokenizers` gives a text the ids of its pieces `_PIECE`, end to end: byte-level BPE as
    that of GPT-2 and GPT-NeoX, which cuts a text where something white follows something that is not."""
    told = json.loads(tokenizer.to_str())
    before, model = told["pre_tokenizer"] or {}, told["model"]
    marks = [token["content"] for token in told["added_tokens"]]
    plain = not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in told["added_tokens"])
    return bool(
        model["type"] == "BPE"
        and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token")
        )
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and (told["normalizer"] is None or told["normalizer"] == {"type": "NFC"})
        and plain
        and all(letter in model["vocab"] for letter in _LETTERS)
        and all(len(_PIECE.findall(mark)) == 1 for mark in marks)
    )


def byte_counts(text: str, ends: np.ndarray) -> np.ndarray:
    """The UTF-8 bytes from each place in a text to the next, uint32. ends: places, in characters, that do not fall."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.diff(np.concatenate([[0], np.cumsum(sizes)])[ends], prepend=0).astype(np.uint32)


class Words:
    """The ids and byte counts of texts, piece by piece; those of pieces that were met before are looked up.

    encode: of a text the ids, and the characters behind which each ends. dtype: of the ids.
    Threads may share one; they wait for each other.
    """

    def __init__(self, encode: Callable[[str], tuple[np.ndarray, np.ndarray]], dtype: str) -> None:
        self._encode, self._dtype = encode, dtype
        self._lock = threading.Lock()  # a server's requests come on threads of their own
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, int] = {}
        self._ids, self._counts = np.zeros(1 << 12, self._dtype), np.zeros(1 << 12, np.uint32)
        self._starts = np.zeros(1 << 10, np.int64)  # of piece n its ids, and behind the last one the end of all
        self._n = 0

    def __call__(self, text: str) -> Encoded:
        """Ids `(length,)` and counts `(length,)` uint32 of a text of any length."""
        found: list[Encoded] = [(np.zeros(0, self._dtype), np.zeros(0, np.uint32))]
        start = 0
        while start < len(text):
            end = _border(text, start, start + _BLOCK)
            with self._lock:
                found.append(self._block(text[start:end]))
            start = end
        if len(found) == 2:
            return found[1]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([counts for _, counts in found])

    def _block(self, text: str) -> Encoded:
        pieces = _PIECE.findall(text)
        if self._n > _KEPT:
            self._forget()
        places = list(map(self._places.get, pieces))
        kept = self._n
        if None in places:
            new = list(dict.fromkeys(piece for piece, place in zip(pieces, places, strict=True) if place is None))
            new.sort(key=lambda piece: len(piece) > _LONG)
            kept += sum(len(piece) <= _LONG for piece in new)
            self._learn(new)
            places = list(map(self._places.__getitem__, pieces))
        which = np.array(places, dtype=np.int64)
        starts = self._starts[which]
        sizes = self._starts[which + 1] - starts
        ends = np.cumsum(sizes)
        among = np.repeat(starts - ends + sizes, sizes) + np.arange(int(ends[-1]))
        if kept < self._n:
            for piece in new[kept - self._n :]:
                del self._places[piece]
            self._n = kept
        return self._ids[among], self._counts[among]

    def _learn(self, pieces: list[str]) -> None:
        ids, counts, sizes = self._encoded(pieces)
        start = int(self._starts[self._n])
        ends = start + np.cumsum(sizes)
        stop = start + len(ids)
        self._ids, self._counts = _longer(self._ids, stop), _longer(self._counts, stop)
        self._starts = _longer(self._starts, self._n + len(sizes) + 1)
        self._ids[start:stop], self._counts[start:stop] = ids, counts
        self._starts[self._n + 1 : self._n + 1 + len(sizes)] = ends
        self._places.update(zip(pieces, range(self._n, self._n + len(sizes)), strict=True))
        self._n += len(sizes)

    def _encoded(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and counts of pieces end to end, and how many each has. Encoded as one text where what is joined is cut
        again: the library takes longer for many texts than for a long one."""
        alone = [number for number, one in enumerate(pieces) if not _is_white(one[0]) or _is_white(one[-1])]
        if alone:
            kept = set(alone)
            joined = [number for number in range(len(pieces)) if number not in kept]
            parts = [self._joined([pieces[number]]) for number in alone]
            parts += [self._joined([pieces[number] for number in joined])] if joined else []
            sizes = np.concatenate([size for _, _, size in parts])
            starts = np.cumsum(sizes) - sizes
            order = np.argsort(np.array([*alone, *joined]))
            among = np.concatenate([np.arange(starts[at], starts[at] + sizes[at]) for at in order])
            ids, counts = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
            return ids[among], counts[among], sizes[order]
        return self._joined(pieces)

    def _joined(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text, stops = "".join(pieces), np.cumsum([len(one) for one in pieces])
        ids, ends = self._encode(text)
        sizes = np.bincount(np.searchsorted(stops, ends), minlength=len(pieces))
        ends[np.cumsum(sizes) - 1] = stops
        return ids, byte_counts(text, ends), sizes


def _longer(values: np.ndarray, size: int) -> np.ndarray:
    """The array with room for `size` values, for which it is not copied each time."""
    if size <= len(values):
        return values
    grown = np.zeros(max(size, 2 * len(values)), values.dtype)
    grown[: len(values)] = values
    return grown


def _is_white(letter: str) -> bool:
    return letter.isspace() and letter not in "\x1c\x1d\x1e\x1f"


def _border(text: str, start: int, near: int) -> int:
    """A border of pieces behind `start`: the last one up to `near`, otherwise the first one after it."""
    if near >= len(text):
        return len(text)
    places = itertools.chain(range(near, start, -1), range(near + 1, len(text)))
    return next((at for at in places if _is_white(text[at]) and not _is_white(text[at - 1])), len(text))
