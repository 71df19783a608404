"""Byte-pair encoding of long texts, many times faster than by the library alone and with the same ids: most words of a
text have been met before.

Byte counts are those of the library too, but for what it drops at the end of a piece, such as an accent that it joins
with its letter: that belongs to the token before it, not to the next."""

from __future__ import annotations

import itertools
import json
import os
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
        from mambaseq_text import word_kernels  # Numba takes longer to import than a tokenizer to read

        self._encode, self._dtype, self._kernels = encode, dtype, word_kernels
        self._lock = threading.Lock()  # a server's requests come on threads of their own
        self._seed = np.uint64(int.from_bytes(os.urandom(8)))  # nobody can write pieces that all collide
        self._forget()

    def _forget(self) -> None:
        self._n = 0
        self._table, self._hashes = np.full(1 << 11, -1, np.int32), np.zeros(1 << 10, np.uint64)
        # of piece n its code points and ids, and behind the last one the end of all
        self._begins, self._starts = np.zeros(1 << 10, np.int64), np.zeros(1 << 10, np.int64)
        self._points = np.zeros(1 << 12, np.uint32)
        self._ids, self._counts = np.zeros(1 << 12, np.uint32), np.zeros(1 << 12, np.uint32)

    def __call__(self, text: str) -> Encoded:
        """Ids `(length,)` and counts `(length,)` uint32 of a text of any length."""
        found: list[Encoded] = [(np.zeros(0, self._dtype), np.zeros(0, np.uint32))]
        start = 0
        while start < len(text):
            end = _border(text, start, start + _BLOCK)
            with self._lock:
                try:
                    found.append(self._block(text[start:end]))
                except BaseException:  # pieces that are known, but not what they are made of
                    self._forget()
                    raise
            start = end
        if len(found) == 2:
            return found[1]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([counts for _, counts in found])

    def _block(self, text: str) -> Encoded:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        if self._n > _KEPT:
            self._forget()
        most = len(points) // 2 + 2  # pieces: all but the first and the last have something white and something else
        self._make_room(self._n + most, int(self._begins[self._n]) + len(points))
        numbers, long = np.empty(most, np.int64), np.empty((len(points) // (_LONG + 1) + 1, 2), np.int64)
        known, count, n_long = self._kernels.cut(
            *(points, _WHITE, self._seed, _LONG, self._n),
            *(self._table, self._hashes, self._begins, self._points, numbers, long),
        )
        numbers = numbers[:count]
        if known > self._n or n_long:
            first = int(self._begins[self._n])
            pieces = [self._points[first : self._begins[known]], *(points[begin:end] for begin, end in long[:n_long])]
            lengths = [np.diff(self._begins[self._n : known + 1]), long[:n_long, 1] - long[:n_long, 0]]
            self._learn(np.concatenate(pieces), np.concatenate(lengths))
            numbers = np.where(numbers < 0, known - 1 - numbers, numbers)  # what is long, behind what is kept
        self._n = known
        size = self._kernels.size_of(numbers, self._starts)
        ids, counts = np.empty(size, np.uint32), np.empty(size, np.uint32)
        self._kernels.gather(numbers, self._starts, self._ids, self._counts, ids, counts)
        return ids.astype(self._dtype, copy=False), counts

    def _make_room(self, pieces: int, points: int) -> None:
        """For so many pieces, whose table is at most half full, and so many code points of them."""
        self._hashes, self._begins = _longer(self._hashes, pieces), _longer(self._begins, pieces + 1)
        self._points = _longer(self._points, points)
        if 2 * pieces > len(self._table):
            self._table = np.full(1 << (2 * pieces - 1).bit_length(), -1, np.int32)
            self._kernels.place_again(self._table, self._hashes, self._n)

    def _learn(self, points: np.ndarray, lengths: np.ndarray) -> None:
        """Keep the ids of pieces, which lie end to end, behind those of the first `_n`."""
        ids, counts, sizes = self._encoded(points, lengths)
        start = int(self._starts[self._n])
        ends = start + np.cumsum(sizes)
        stop = start + len(ids)
        self._ids, self._counts = _longer(self._ids, stop), _longer(self._counts, stop)
        self._starts = _longer(self._starts, self._n + len(sizes) + 1)
        self._ids[start:stop], self._counts[start:stop] = ids, counts
        self._starts[self._n + 1 : self._n + 1 + len(sizes)] = ends

    def _encoded(self, points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and counts of pieces end to end, and how many each has. Encoded as one text where what is joined is cut
        again: the library takes longer for many texts than for a long one."""
        stops = np.cumsum(lengths)
        alone = ~_white(points[stops - lengths]) | _white(points[stops - 1])
        if not alone.any():
            return self._joined(points, lengths)
        of_alone, of_joined = np.flatnonzero(alone), np.flatnonzero(~alone)
        parts = [self._joined(points[stops[at] - lengths[at] : stops[at]], lengths[at : at + 1]) for at in of_alone]
        if len(of_joined):
            parts.append(self._joined(points[np.repeat(~alone, lengths)], lengths[of_joined]))
        sizes = np.concatenate([size for _, _, size in parts])
        order = np.argsort(np.concatenate([of_alone, of_joined]))
        starts = (np.cumsum(sizes) - sizes)[order]
        sizes = sizes[order]
        ends = np.cumsum(sizes)
        among = np.repeat(starts - ends + sizes, sizes) + np.arange(int(ends[-1]))
        ids, counts = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
        return ids[among], counts[among], sizes

    def _joined(self, points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text, stops = points.tobytes().decode("utf-32-le", "surrogatepass"), np.cumsum(lengths)
        ids, ends = self._encode(text)
        sizes = np.bincount(np.searchsorted(stops, ends), minlength=len(stops))
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


# the last is not, and no letter behind it
_WHITE = np.array([_is_white(chr(point)) for point in range(0x3002)])


def _white(points: np.ndarray) -> np.ndarray:
    """Which code points are white."""
    return _WHITE[np.minimum(points, len(_WHITE) - 1)]


def _border(text: str, start: int, near: int) -> int:
    """A border of pieces behind `start`: the last one up to `near`, otherwise the first one after it."""
    if near >= len(text):
        return len(text)
    places = itertools.chain(range(near, start, -1), range(near + 1, len(text)))
    return next((at for at in places if _is_white(text[at]) and not _is_white(text[at - 1])), len(text))
