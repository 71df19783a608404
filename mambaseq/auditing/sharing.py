"""What splits and classes have in common: copies of whole sequences, words, and the longest equal stretches."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from mambaseq.auditing.layout import Layout, Place, SampledWords

_RUNS, _TRIED, _OTHERS = 24, 3, 4  # runs of common words that are looked at; words of each; places of each word
_STRETCHES = 5
_PAIRS = 12
_EXAMPLES = 5
_CLASSES = 500
_RECORDS = 5


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Equal tokens in two places. reverse: the other is the other strand."""

    one: Place
    other: Place
    length: int
    reverse: bool


@dataclasses.dataclass(frozen=True)
class Copies:
    """Sequences (records, where datasets know them) of one split that are in another as a whole.

    sequences: how many there are; exact, reverse: how many have a copy on the same strand, and on the other one;
    another_label: how many have a copy of another class. examples: a few, (this, the copy).
    """

    sequences: int
    exact: int
    reverse: int
    another_label: int
    examples: list[tuple[Place, Place]]

    @property
    def copied(self) -> int:
        return self.exact + self.reverse


@dataclasses.dataclass(frozen=True)
class Part:
    """How much of a record is in another split: the share of its words, and about how many tokens that makes."""

    place: Place
    share: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Shared:
    """What a split has in common with another one.

    words: how many were compared; in_other: how many of these are in the other split, same_label: in the same class
    there, another_only: in other classes only. tokens: about how many tokens that makes. pieces: windows or whole
    sequences with a word, touched: those with at least one common word, touched_another: with one that the other split
    has in another class, half: those of which more than half of the words are common. shares: of each piece. records:
    those that have most in common, if the data are windows of records.
    """

    split: str
    other: str
    words: int
    in_other: int
    same_label: int
    another_only: int
    tokens: int
    pieces: int
    touched: int
    touched_another: int
    half: int
    shares: np.ndarray
    records: list[Part]
    copies: Copies
    stretches: list[Stretch]

    @property
    def share(self) -> float:
        """Of the words, which are in the other split."""
        return self.in_other / max(self.words, 1)


@dataclasses.dataclass(frozen=True)
class Crossed:
    """What a class has in common with another one, all splits together. share: of its words. sequences: of the class
    that are in the other as a whole."""

    label: str
    other: str
    share: float
    sequences: int
    stretches: list[Stretch]


@dataclasses.dataclass(frozen=True)
class Sharing:
    """owners: (split, class) of the rows and columns of `matrix`: the share of the row's words that are also the
    column's. tokens, sequences: of each owner. repeated: of each split, sequences that it has had before."""

    owners: list[tuple[str, str | None]]
    tokens: list[int]
    sequences: list[int]
    matrix: np.ndarray
    repeated: dict[str, int]
    splits: list[Shared]
    classes: list[Crossed]
    words: int
    word_share: float
    found_surely: int


class _Table:
    """Words by what they are. group: of each occurrence, the number of its word, from 1; 0 for words that occur once.
    order: the occurrences of the others, word by word; those of word k are `order[bounds[k - 1]:bounds[k]]`."""

    def __init__(self, layout: Layout, words: SampledWords) -> None:
        self.words = words
        order = np.argsort(words.hashes, kind="stable")
        ordered = words.hashes[order]
        alike = ordered[1:] == ordered[:-1]
        again = np.zeros(len(order), dtype=bool)
        again[1:] |= alike
        again[:-1] |= alike
        self.order, ordered = order[again], ordered[again]
        new = np.ones(len(ordered), dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        self.bounds = np.append(np.flatnonzero(new), len(ordered))
        self.group = np.zeros(len(order), dtype=np.int32)
        self.group[self.order] = np.cumsum(new)
        self.sequence = layout.of(words.positions).astype(np.int32)
        self.n = len(self.bounds)

    def places(self, occurrence: int, among: np.ndarray, most: int) -> np.ndarray:
        """Positions of the same word among occurrences, `(words,)` bool."""
        group = int(self.group[occurrence])
        found = self.order[self.bounds[group - 1] : self.bounds[group]]
        found = found[: 1 << 16]
        return self.words.positions[found[among[found]][:most]]


def sharing(layout: Layout) -> Sharing:
    """Compare all splits and classes of a layout. Of more than 500 classes no pairs are told, and groups are splits."""
    table = _Table(layout, layout.words())
    labels, n_labels = layout.labels, len(layout.labels) + 1
    of_sequence = layout.split * n_labels + layout.label + 1
    counts = _counts(table, of_sequence, len(layout.splits) * n_labels)
    present = counts.copy()
    present.data[:] = 1
    few = len(labels) <= _CLASSES
    groups, of_group = (
        (counts, of_sequence) if few else (_counts(table, layout.split, len(layout.splits)), layout.split)
    )
    used, of_used = np.unique(of_group, return_inverse=True)
    groups = groups[:, used]
    there = groups.copy()
    there.data[:] = 1
    own = np.bincount(of_used[table.sequence], minlength=len(used))
    matrix = (groups.T @ there).toarray() / np.maximum(own, 1)[:, None]
    np.fill_diagonal(matrix, 1.0)
    width = n_labels if few else 1
    names = [
        (layout.splits[number // width], labels[number % width - 1] if number % width else None)
        for number in used.tolist()
    ]
    contents = _Contents(layout)
    pairs = [
        (one, other)
        for one in range(len(layout.splits) - 1, -1, -1)
        for other in range(len(layout.splits))
        if layout.splits[one] != "train" and (layout.splits[other] == "train" or other < one)
    ]
    return Sharing(
        owners=names,
        tokens=[int(count) for count in np.bincount(of_used, weights=layout.lengths)],
        sequences=np.bincount(of_used).tolist(),
        matrix=matrix,
        repeated={name: contents.repeated(split) for split, name in enumerate(layout.splits)},
        splits=[_between(layout, table, contents, present, one, other) for one, other in pairs],
        classes=_classes(layout, table, contents, counts) if few and len(labels) > 1 else [],
        words=len(table.sequence),
        word_share=table.words.share,
        found_surely=table.words.found_surely,
    )


def _counts(table: _Table, of_sequence: np.ndarray, size: int) -> scipy.sparse.csr_matrix:
    """How often each word that occurs again is in each group, `(words, groups)` int32. of_sequence: groups."""
    again = table.group > 0
    groups = of_sequence[table.sequence[again]]
    found = scipy.sparse.csr_matrix(
        (np.ones(len(groups), np.int32), (table.group[again], groups)), shape=(table.n, size)
    )
    found.sum_duplicates()
    return found


class _Contents:
    """Sequences by their contents. key: the same number for equal ones, on either strand; 0 for what is too short."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        contents = layout.contents
        compared = layout.lengths >= max(layout.audited.shortest, 1)
        key = np.unique(contents.min(axis=1), return_inverse=True)[1].reshape(-1) + 1
        self.key = np.where(compared, key, 0)

    def repeated(self, split: int) -> int:
        """How many records a split has that it has had before, on this strand."""
        content = self.layout.contents[self._records((self.layout.split == split) & (self.key > 0)), 0]
        return len(content) - len(np.unique(content))

    def copies(self, chosen: np.ndarray, among: np.ndarray) -> Copies:
        """Records of chosen sequences that others, `(sequences,)` bool, hold as a whole."""
        layout = self.layout
        rows, others = self._records(chosen), self._records(among & (self.key > 0))
        compared = self.key[rows] > 0
        own = np.isin(layout.record[rows], layout.record[others]) & compared
        labelled = self.key * (len(layout.labels) + 1) + layout.label + 1
        one, other = layout.contents[rows].T
        there = np.sort(layout.contents[others, 0])
        same = compared & (_count(there, one) > own)
        turned = compared & ~same & (one != other) & (_count(there, other) > 0)
        of_all = _count(np.sort(self.key[others]), self.key[rows])
        of_label = _count(np.sort(labelled[others]), labelled[rows])
        another = compared & (of_all > of_label)
        examples = []
        for row in rows[same | turned][:_EXAMPLES].tolist():
            found = others[(self.key[others] == self.key[row]) & (layout.record[others] != layout.record[row])]
            examples.append((layout.place(row, 0), layout.place(int(found[0]), 0)))
        return Copies(len(rows), int(same.sum()), int(turned.sum()), int(another.sum()), examples)

    def _records(self, chosen: np.ndarray) -> np.ndarray:
        """The first of the chosen sequences of each record, in order."""
        (rows,) = np.nonzero(chosen)
        return rows[np.sort(np.unique(self.layout.record[rows], return_index=True)[1])]


def _count(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How often each value is in a sorted array."""
    return np.searchsorted(ordered, values, side="right") - np.searchsorted(ordered, values, side="left")


def _between(
    layout: Layout, table: _Table, contents: _Contents, present: scipy.sparse.csr_matrix, one: int, other: int
) -> Shared:
    n_labels = len(layout.labels) + 1
    split = layout.split.astype(np.int16)[table.sequence]
    mine, theirs = split == one, split == other
    there = present[:, other * n_labels : (other + 1) * n_labels].tocsc()
    classes_there = np.asarray(there.sum(axis=1)).reshape(-1).astype(np.int32)
    (rows,) = np.nonzero(mine)
    group, label = table.group[rows], layout.label.astype(np.int32)[table.sequence[rows]] + 1
    common = classes_there[group] > 0
    same = np.zeros(len(rows), dtype=bool)
    holds = np.zeros(table.n, dtype=bool)
    for number in np.unique(label).tolist():
        words = there.indices[there.indptr[number] : there.indptr[number + 1]]
        holds[words] = True
        of_label = label == number
        same[of_label] = holds[group[of_label]]
        holds[words] = False
    another = classes_there[group] - same > 0
    piece = _pieces(layout, table.words.positions[rows], table.sequence[rows])
    n_words = np.bincount(piece) if len(piece) else np.zeros(0, np.int64)
    n_common = np.bincount(piece, weights=common, minlength=len(n_words))
    n_another = np.bincount(piece, weights=another, minlength=len(n_words))
    has = n_words > 0
    shares = n_common[has] / n_words[has]
    flagged = np.zeros(len(split), dtype=bool)
    flagged[rows[common]] = True
    tokens = int(layout.lengths[layout.split == one].sum())
    return Shared(
        split=layout.splits[one],
        other=layout.splits[other],
        words=len(rows),
        in_other=int(common.sum()),
        same_label=int(same.sum()),
        another_only=int((common & ~same).sum()),
        tokens=round(tokens * float(common.mean())) if len(common) else 0,
        pieces=int(has.sum()),
        touched=int((shares > 0).sum()),
        touched_another=int((n_another[has] > 0).sum()),
        half=int((shares > 0.5).sum()),
        shares=shares,
        records=_records(layout, table.sequence[rows], common) if layout.audited.length is not None else [],
        copies=contents.copies(layout.split == one, layout.split == other),
        stretches=_longest(layout, table, rows, flagged, theirs),
    )


def _records(layout: Layout, sequence: np.ndarray, common: np.ndarray) -> list[Part]:
    """The records with the most common words. sequence, common: of each word."""
    record = layout.record[sequence]
    of_all, of_common = np.bincount(record), np.bincount(record, weights=common)
    found = []
    for number in np.argsort(-of_common, kind="stable")[:_RECORDS].tolist():
        if share := float(of_common[number] / max(of_all[number], 1)):
            (own,) = np.nonzero((layout.record == number) & (layout.split == layout.split[sequence[0]]))
            found.append(Part(layout.place(int(own[0]), 0), share, round(share * float(layout.lengths[own].sum()))))
    return found


def _pieces(layout: Layout, positions: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """The number of the window, or of the whole sequence, that holds each word."""
    length = layout.audited.length
    if length is None:
        return np.unique(sequence, return_inverse=True)[1].reshape(-1)
    tiles = np.maximum(-(-layout.lengths // length), 1)
    first = np.cumsum(tiles) - tiles
    tile = first[sequence] + (positions - layout.offsets[sequence]) // length
    return np.unique(tile, return_inverse=True)[1].reshape(-1)


def _longest(layout: Layout, table: _Table, rows: np.ndarray, flagged: np.ndarray, theirs: np.ndarray) -> list[Stretch]:
    """The longest equal stretches, longest first.

    rows: occurrences of the one side, in the order of the layout; flagged: which of all have the same word on the
    other side; theirs: which are of the other side.
    """
    common = flagged[rows]
    if not common.any():
        return []
    sequence, position = table.sequence[rows], table.words.positions[rows]
    # runs of common words in one sequence; few of the longest are looked at letter by letter
    changes = np.ones(len(rows) + 1, dtype=bool)
    changes[1:-1] = (common[1:] != common[:-1]) | (sequence[1:] != sequence[:-1])
    edges = np.flatnonzero(changes)
    begin, end = edges[:-1][common[edges[:-1]]], edges[1:][common[edges[:-1]]] - 1
    span = position[end] - position[begin]
    best = np.argsort(-span, kind="stable")[:_RUNS]
    found: dict[tuple[int, int, int, int], tuple[int, int, int, int, int, bool]] = {}
    for first, last in zip(begin[best].tolist(), end[best].tolist(), strict=True):
        for row in np.unique(np.linspace(first, last, _TRIED).astype(np.int64)).tolist():
            here = int(position[row])
            one = int(sequence[row])
            for there in table.places(int(rows[row]), theirs, _OTHERS).tolist():
                other = int(layout.of(np.array([there]))[0])
                a, b, length, turned = layout.extended(here, there)
                found[one, a, other, b] = (length, one, a, other, b, turned)
    kept: list[tuple[int, int, int, int, int, bool]] = []
    for length, one, a, other, b, turned in sorted(found.values(), key=lambda each: -each[0]):
        if not any(one == k[1] and a < k[2] + k[0] and k[2] < a + length for k in kept):
            kept.append((length, one, a, other, b, turned))
    return [
        Stretch(layout.place(one, a), layout.place(other, b), length, turned)
        for length, one, a, other, b, turned in kept[:_STRETCHES]
    ]


def _classes(layout: Layout, table: _Table, contents: _Contents, counts: scipy.sparse.csr_matrix) -> list[Crossed]:
    """Pairs of classes, those with the largest share first."""
    n_labels = len(layout.labels) + 1
    n_splits = len(layout.splits)
    merge = scipy.sparse.csr_matrix(
        (
            np.ones(n_splits * n_labels, np.float32),
            (np.arange(n_splits * n_labels), np.arange(n_splits * n_labels) % n_labels),
        )
    )
    of_class = (counts @ merge).tocsr()
    present = of_class.copy()
    present.data[:] = 1
    common = (of_class.T @ present).toarray()[1:, 1:]
    own = np.bincount(layout.label[table.sequence] + 1, minlength=n_labels)[1:]
    share = common / np.maximum(own[:, None], 1)
    pairs = [(i, j) for i in range(len(share)) for j in range(len(share)) if i != j]
    pairs.sort(key=lambda pair: -share[pair])
    label = layout.label.astype(np.int32)[table.sequence]
    found: list[Crossed] = []
    seen: set[frozenset[int]] = set()
    for i, j in pairs:
        if frozenset((i, j)) in seen or len(found) == _PAIRS:
            continue
        seen.add(frozenset((i, j)))
        (rows,) = np.nonzero(label == i)
        theirs = label == j
        holds = np.zeros(table.n, dtype=bool)
        holds[table.group[theirs]] = True
        holds[0] = False
        flagged = np.zeros(len(label), dtype=bool)
        flagged[rows[holds[table.group[rows]]]] = True
        stretches = _longest(layout, table, rows, flagged, theirs) if share[i, j] else []
        copies = contents.copies(layout.label == i, layout.label == j)
        found.append(Crossed(layout.labels[i], layout.labels[j], float(share[i, j]), copies.copied, stretches))
    return found
