"""All sequences of all splits, laid end to end, so that one number says where a word is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import xxhash
from tqdm import tqdm

from mambaseq.auditing.words import BLOCK, Words
from mambaseq.data.audited import WORD, Audited, AuditedSequence
from mambaseq.errors import DataError
from mambaseq.limits import AUDITED_WORDS

_TOLD = 1 << 26  # tokens; more are read behind a bar


@dataclasses.dataclass(frozen=True)
class Place:
    """Where tokens are: a split, a class (None without), a file, a record, and a position from 0."""

    split: str
    label: str | None
    source: str
    record: str
    start: int


class Layout:
    """Sequences one behind the other, an unknown letter behind each.

    splits, labels: their names. split, label: of each sequence, the number of its split, and of its class, -1 without
    one. lengths, offsets: of each sequence, int64. record: the same number for sequences of one record. contents:
    `(sequences, 2)` uint64, checksums of each sequence's record and of its other strand.

    Raises DataError without any token.
    """

    def __init__(self, audited: Audited) -> None:
        self.audited = audited
        self.splits = list(audited.splits)
        letters = audited.letters
        self._letters = (
            None if letters is None else np.asarray(letters).astype(np.int8 if max(letters) < 127 else np.int64)
        )
        self._complement = None if audited.complement is None else np.asarray(audited.complement)
        labels: dict[str, int] = {}
        records: dict[tuple[str, str], int] = {}
        rows: list[tuple[int, int, int, int]] = []
        contents: list[tuple[int, int]] = []
        for split, name in enumerate(self.splits):
            for sequence in audited.splits[name]:
                label = -1 if sequence.label is None else labels.setdefault(sequence.label, len(labels))
                given = sequence.checksums
                number = len(rows)
                if given is not None:  # of a record, of which other sequences may be parts
                    number = records.setdefault((sequence.source, sequence.record), len(records))
                rows.append((split, label, len(sequence), number))
                contents.append(self._content(sequence.ids) if given is None else given)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self.split, self.label, self.lengths, self.record = table.T
        self.contents = np.array(contents, dtype=np.uint64).reshape(-1, 2)
        self.labels = list(labels)
        self.offsets = np.cumsum(self.lengths + 1) - (self.lengths + 1)
        self.first = np.searchsorted(self.split, np.arange(len(self.splits) + 1))
        self.tokens = int(self.lengths.sum())
        if not self.tokens:
            raise DataError("There is nothing to audit: no split has a token.")

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, number: int) -> AuditedSequence:
        split = int(self.split[number])
        return self.audited.splits[self.splits[split]][number - int(self.first[split])]

    def letters(self, ids: np.ndarray) -> np.ndarray:
        """The letters of ids, of a signed type."""
        if self._letters is not None:
            return self._letters[ids]
        return ids.astype(np.int64)

    def turned(self, letters: np.ndarray) -> np.ndarray:
        """The other strand of letters; themselves without one."""
        if self._complement is None:
            return letters
        return np.where(letters < 0, letters, self._complement[letters].astype(letters.dtype))[::-1]

    def _content(self, ids: np.ndarray) -> tuple[int, int]:
        letters = self.letters(ids)
        one = xxhash.xxh3_64_intdigest(letters.tobytes())
        if self._complement is None:
            return one, one
        return one, xxhash.xxh3_64_intdigest(np.ascontiguousarray(self.turned(letters)).tobytes())

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of the sequences that hold these positions."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def place(self, number: int, inside: int) -> Place:
        """Where token `inside` of a sequence is."""
        sequence, label = self.sequence(number), int(self.label[number])
        name = self.labels[label] if label >= 0 else None
        split = self.splits[int(self.split[number])]
        return Place(split, name, sequence.source, sequence.record, sequence.start + inside)

    def words(self) -> SampledWords:
        """The words of all sequences: all of them, or a share, so that there are at most MAMBASEQ_MAX_AUDITED_WORDS."""
        most = AUDITED_WORDS.value
        share = min(1.0, most / self.tokens)
        words = Words(self.audited.complement, share)
        found = []
        for begin, block in self._blocks():
            hashes, starts = words.of(block)
            found.append((hashes, starts + begin))
        return SampledWords(
            np.concatenate([hashes for hashes, _ in found]), np.concatenate([starts for _, starts in found]), share
        )

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Where a block of letters begins, and the block; each begins with the last word but one letter of the block
        before."""
        behind = np.full(1, -1, dtype=np.int8)
        pending: list[np.ndarray] = []
        begin = size = 0
        with tqdm(
            desc="words", total=self.tokens, unit=self.audited.unit, unit_scale=True, disable=self.tokens < _TOLD
        ) as bar:
            for part in self._parts(behind):
                pending.append(part)
                size += len(part)
                if size >= BLOCK:
                    block = np.concatenate(pending)
                    yield begin, block
                    bar.update(len(block))
                    pending = [block[len(block) - WORD + 1 :]]
                    begin += len(block) - WORD + 1
                    size = WORD - 1
            yield begin, np.concatenate(pending)

    def _parts(self, behind: np.ndarray) -> Iterator[np.ndarray]:
        for sequences in self.audited.splits.values():
            for sequence in sequences:
                for start in range(0, len(sequence), BLOCK):
                    yield self.letters(sequence.ids[start : start + BLOCK])
                yield behind

    def extended(self, one: int, other: int) -> tuple[int, int, int, bool]:
        """The longest equal stretch around two equal words: where it starts in the one sequence and in the other, its
        length, and whether the other's is the other strand.

        one, other: positions of the words.
        """
        first, second = int(self.of(np.array([one]))[0]), int(self.of(np.array([other]))[0])
        a, b = one - int(self.offsets[first]), other - int(self.offsets[second])
        here, there = self.sequence(first).ids, self.sequence(second).ids
        turned = self._complement is not None and not np.array_equal(
            self.letters(here[a : a + WORD]), self.letters(there[b : b + WORD])
        )
        if not turned:
            ahead = self._equal(here[a + WORD :], there[b + WORD :])
            before = self._equal(here[:a][::-1], there[:b][::-1])
            return a - before, b - before, before + WORD + ahead, False
        ahead = self._equal(here[a + WORD :], there[:b][::-1], turned=True)
        before = self._equal(here[:a][::-1], there[b + WORD :], turned=True)
        return a - before, b - ahead, before + WORD + ahead, True

    def _equal(self, one: np.ndarray, other: np.ndarray, turned: bool = False) -> int:
        """How many letters two arrays of ids have in common from their beginning on. turned: pairs are compared."""
        most, done, step = min(len(one), len(other)), 0, 256
        while done < most:
            a, b = self.letters(one[done : done + step]), self.letters(other[done : done + step])
            a, b = a[: len(b)], b[: len(a)]
            if turned:
                b = self.turned(b)[::-1]
            if (differ := (a != b) | (a < 0)).any():
                return done + int(differ.argmax())
            done += len(a)
            step = min(2 * step, 1 << 20)
        return most


@dataclasses.dataclass(frozen=True)
class SampledWords:
    """hashes: uint64, and positions: int64, of words in the order of the layout. share: of all different words."""

    hashes: np.ndarray
    positions: np.ndarray
    share: float

    @property
    def found_surely(self) -> int:
        """A shared stretch of so many tokens is overlooked once in a thousand times at most."""
        return WORD if self.share >= 1 else WORD + int(np.ceil(np.log(1e-3) / np.log1p(-self.share)))
