"""States of prompts that were read, found again by the tokens that lead to them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor

from mambaseq.limits import check_whole
from mambaseq.serving.states import Groups


@dataclasses.dataclass(frozen=True)
class Entry:
    """The state behind `length` tokens, which nobody may change.

    state: of one sequence. hidden `(1, 1, d_model)`: the backbone's output at the last of the
    tokens; None where it is not known. bytes: of all of it.
    """

    length: int
    state: Groups
    hidden: Tensor | None
    bytes: int


class PrefixCache:
    """States by the tokens that lead to them: one every `every` tokens and one where a prompt ends.

    A prompt that shares its first n tokens with an earlier one so finds a state behind at least n - every + 1 of them,
    whatever n is, as long as the state is held. Tokens are compared by a hash of 32 bytes (BLAKE2b).

    Args:
        every: K, tokens between two states.
        budget: bytes of all states together; the least recently used go first. 0 keeps nothing.

    Raises ConfigError for an `every` below 1 or a negative budget.
    """

    def __init__(self, every: int, budget: int) -> None:
        check_whole("The tokens between two states of the prefix cache", every, 1)
        check_whole("The bytes of the prefix cache", budget, 0)
        self.every, self.budget, self.bytes = every, budget, 0
        self._entries: collections.OrderedDict[bytes, Entry] = collections.OrderedDict()  # the last used at the end
        self._roots: dict[bytes, bytes] = {}  # of an entry's key: that of its tokens' whole blocks
        # by the key of whole blocks: how many tokens further states are
        self._further: dict[bytes, collections.Counter[int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, tokens: np.ndarray) -> Entry | None:
        """The state behind the most of the first tokens of `(length,)` int64, None if there is none. One behind all of
        them has `hidden`."""
        if not self._entries:
            return None
        blocks = _Blocks(tokens, self.every)
        for number in range(len(tokens) // self.every, -1, -1):
            for further in sorted(self._further.get(blocks.key(number * self.every), ()), reverse=True):
                length = number * self.every + further
                if length > len(tokens):
                    continue
                key = blocks.key(length)
                entry = self._entries.get(key)
                if entry is not None and (length < len(tokens) or entry.hidden is not None):
                    self._entries.move_to_end(key)
                    return entry
        return None

    def keep(self, tokens: np.ndarray, state: Groups, hidden: Tensor | None) -> None:
        """Hold the state behind `(length,)` int64 tokens. Nobody may change it afterwards."""
        size = sum(tensor.nbytes for tensor in (*state, *(() if hidden is None else (hidden,))))
        if size > self.budget:
            return
        state, hidden = [_owned(tensor) for tensor in state], None if hidden is None else _owned(hidden)
        blocks = _Blocks(tokens, self.every)
        key, root = blocks.key(len(tokens)), blocks.root(len(tokens))
        if (known := self._entries.get(key)) is not None:
            if known.hidden is not None or hidden is None:
                self._entries.move_to_end(key)
                return
            self._drop(key)
        self._entries[key] = Entry(len(tokens), state, hidden, size)
        self._roots[key] = root
        self._further.setdefault(root, collections.Counter())[len(tokens) % self.every] += 1
        self.bytes += size
        while self.bytes > self.budget:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        root = self._roots.pop(key)
        self.bytes -= entry.bytes
        counts = self._further[root]
        counts[entry.length % self.every] -= 1
        if not counts[entry.length % self.every]:
            del counts[entry.length % self.every]
        if not counts:
            del self._further[root]


class _Blocks:
    """Keys of the prefixes of `(length,)` int64 tokens; those of long ones go on from those of whole blocks."""

    def __init__(self, tokens: np.ndarray, every: int) -> None:
        self._tokens, self._every = tokens.astype("<i8", copy=False), every
        self._hashes = [hashlib.blake2b(digest_size=32)]

    def key(self, length: int) -> bytes:
        """Of the first `length` tokens."""
        number = length // self._every
        while len(self._hashes) <= number:
            begin = (len(self._hashes) - 1) * self._every
            further = self._hashes[-1].copy()
            further.update(self._tokens[begin : begin + self._every].tobytes())
            self._hashes.append(further)
        found = self._hashes[number]
        if length % self._every:
            found = found.copy()
            found.update(self._tokens[number * self._every : length].tobytes())
        return found.digest()

    def root(self, length: int) -> bytes:
        """Of the whole blocks among the first `length` tokens."""
        return self.key(length - length % self._every)


def _owned(tensor: Tensor) -> Tensor:
    """The same values in memory of their own and of just their size: a view would hold all that it is a part of."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
