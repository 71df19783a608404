"""What `mambaseq data audit` looks at: the sequences of each split, with their classes and where they come from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mambaseq.data.intervals import Group, Intervals
from mambaseq.data.store import TokenStore
from mambaseq.errors import DataError
from mambaseq.limits import AUDITED

if TYPE_CHECKING:
    from mambaseq.batch import Batch
    from mambaseq.data.module import SequenceData

WORD = 32
"""Tokens of a word. Equal words are taken for copies: in DNA, words of 32 are hardly ever equal by chance."""


@dataclasses.dataclass(frozen=True, slots=True)
class AuditedSequence:
    """A sequence of one split, as it is in the file.

    ids: `(length,)` integers; a view of a memory map will do. label: the name of its class; None if it has none (or
        several, or values).
    source, record, start: the file, the name of its record or row, and where in the record the sequence starts; for
        the report.
    checksums: of the whole record that the sequence is from, and of its other strand, by which copies of records are
        found even where splits hold different parts of them. Give them for all sequences of a dataset, or for none;
        without them whole sequences are compared.
    """

    ids: np.ndarray
    label: str | None = None
    source: str = ""
    record: str = ""
    start: int = 0
    checksums: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Property:
    """A number of a sequence that may give its class away, such as the share of N.

    of: computes it from ids. seen: whether a model is shown it (lower case that is folded is not). artefact: whether
    it says how the data were made rather than what they are: then no class should be told by it.
    """

    name: str
    of: Callable[[np.ndarray], float]
    seen: bool = True
    artefact: bool = True


@dataclasses.dataclass(frozen=True)
class Audited:
    """What `SequenceData.audited` returns.

    splits: "train", "validation" and "test" (those that there are), or other names, to their sequences. Sequences may
        be made when they are asked for. All but "train" are held out.
    letters: `(ids,)` the letter, from 0, that each id stands for; -1 for ids that are no evidence of a copy, and part
        words (N). None: every id is a letter.
    complement: for DNA, `(letters,)` the letter that each letter is paired with: copies are then found on either
        strand. None for data without another strand.
    properties: what may give a class away. The length of sequences is one without being named.
    length: what a model gets are windows of so many tokens. None: what it gets are whole sequences.
    shortest: shorter sequences are not compared as wholes, because they may be equal by chance.
    unit: what a token is called. notes: what is to be said about these data, for instance what was left out.
    """

    splits: Mapping[str, Sequence[AuditedSequence]]
    letters: np.ndarray | None = None
    complement: np.ndarray | None = None
    properties: Sequence[Property] = ()
    length: int | None = None
    shortest: int = 1
    unit: str = "tokens"
    notes: Sequence[str] = ()


class IntervalSequences(Sequence[AuditedSequence]):
    """The intervals of groups, each made when it is asked for. labelled: the groups are classes."""

    def __init__(self, groups: Sequence[Group], labelled: bool) -> None:
        self._groups = [(group.name if labelled else None, Intervals.of(group.intervals)) for group in groups]
        self._ends = np.cumsum([len(intervals) for _, intervals in self._groups])
        self._stores: dict[
            int, tuple[str, np.ndarray]
        ] = {}  # by id: file, and tokens as a plain array: views are cheap

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self._ends, index, side="right"))
        label, intervals = self._groups[group]
        first = index - (int(self._ends[group - 1]) if group else 0)
        return next(self._made(label, intervals, slice(first, first + 1)))

    def __iter__(self) -> Iterator[AuditedSequence]:
        for label, intervals in self._groups:
            for first in range(0, len(intervals), 1 << 16):
                yield from self._made(label, intervals, slice(first, first + (1 << 16)))

    def _made(self, label: str | None, intervals: Intervals, rows: slice) -> Iterator[AuditedSequence]:
        stores = intervals.stores
        for number, record, start, stop in intervals.table[rows].tolist():
            store = stores[number]
            source, tokens = self._stores.get(id(store)) or self._opened(store)
            begin = int(store.starts[record])
            one, other = store.checksums[record].tolist()
            ids = tokens[begin + start : begin + stop]
            yield AuditedSequence(ids, label, source, store.names[record], start, (one, other))

    def _opened(self, store: TokenStore) -> tuple[str, np.ndarray]:
        files = [source.get("name") for source in store.meta.get("sources", []) if isinstance(source, dict)]
        source = str(files[0]) if len(files) == 1 else store.folder.name
        self._stores[id(store)] = source, np.asarray(store.tokens)
        return self._stores[id(store)]


def audited_items(data: SequenceData) -> Audited:
    """What the items of a dataset's sets hold, for datasets that do not say more: tokens, and the class of each
    sequence.

    Calls `setup`. Of endless sets as many items as make an epoch are read, and of every set no more than
    MAMBASEQ_MAX_AUDITED tokens. A packed item is one sequence for each of its parts. Raises DataError for signals and
    streams.
    """
    from mambaseq.data.module import named_sets

    data.setup()
    sets: dict[str, Any] = {"train": data.train()}
    for split, found in (("validation", data.validation()), ("test", data.test())):
        sets |= {f"{split} {name}".rstrip(): part for name, part in named_sets(found).items()}
    notes: list[str] = []
    splits = {}
    for split, items in sets.items():
        if isinstance(items, torch.utils.data.IterableDataset):
            raise DataError(
                f"The {split} set is a stream, which has no end to audit. Audit the files without streaming."
            )
        splits[split] = list(_within_limit(split, items, data, notes))
        if getattr(items, "endless", False):
            notes.append(f"{split}: random windows of one epoch are looked at, not all that there is.")
    return Audited(splits, shortest=WORD, notes=notes)


def _within_limit(split: str, items: Any, data: SequenceData, notes: list[str]) -> Iterator[AuditedSequence]:
    read = 0
    for index in range(len(items)):
        if read > AUDITED.value:
            notes.append(f"{split}: the first {index:,} of {len(items):,} items are looked at ({AUDITED.variable}).")
            return
        for sequence in _sequences(items[index], f"item {index:,} of {split}", data):
            read += len(sequence)
            yield sequence


def _sequences(item: Batch, name: str, data: SequenceData) -> Iterable[AuditedSequence]:
    """The sequences of a batch of one, or of a pack; a masked one with what was hidden."""
    if item.inputs.is_floating_point():
        raise DataError("The data are signals; only data of tokens can be audited.")
    ids, targets = item.inputs[0].numpy(), item.targets
    if data.task == "masked" and targets is not None:
        hidden = targets[0].numpy()
        ids = np.where(hidden == -100, ids, hidden)
    if item.mask is not None:
        ids = ids[: int(item.mask.sum())]
    bounds = [0, len(ids)] if item.cu_seqlens is None else item.cu_seqlens.tolist()
    of_sequences = targets is not None and not item.per_token and item.kind == "labels" and len(data.class_names)
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        label = None
        if of_sequences and targets is not None and (number := int(targets[part])) >= 0:
            label = str(data.class_names[number])
        kept = ids[start:stop].reshape(-1).astype(np.min_scalar_type(int(ids.max(initial=0))))
        yield AuditedSequence(kept, label, record=name if len(bounds) == 2 else f"{name}, part {part + 1}")
