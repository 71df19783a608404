"""Documents: packed end to end without touching each other, or streamed."""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.cache import Unchanged
from mambaseq.data.module import SequenceData, pack_collate, pad_collate
from mambaseq.data.records import Refuse, raised
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, cut_list
from mambaseq.limits import SEEDS, WINDOW, check_setting
from mambaseq_text.copies import Duplicates, HeldOut
from mambaseq_text.left_out import LeftOut, ListedRows
from mambaseq_text.rows import Unit, documents
from mambaseq_text.splits import SPLITS, check_fractions, checksums, split_files, split_of_text
from mambaseq_text.streaming import StreamedWindows
from mambaseq_text.tokenising import Piece, Reading, check_workers, tokenised
from mambaseq_text.tokenization import TextTokenizer, make_tokenizer

logger = logging.getLogger(__name__)

_AMONG = 512  # pieces that share packs


class PackedDocuments:
    """Items are packs: batches of one with `cu_seqlens`; no state crosses between documents.

    A document with more than `length` targets is cut into pieces of that many (every token but its first is a
    target once); whole pieces go into a pack while they fit into `length` together.

    store, records: the documents. counts: the bytes of their tokens, or None if every token is one byte or counts are
        not needed. rng: shuffles the pieces; None keeps their order.
    scored: of each document, `(length,)`, whether its tokens are targets; None for all. whole: a longer document loses
        its end; nothing is cut into pieces.
    """

    def __init__(
        self,
        store: TokenStore,
        records: Sequence[int],
        length: int,
        counts: Sequence[np.ndarray] | None = None,
        rng: np.random.Generator | None = None,
        scored: Sequence[np.ndarray] | None = None,
        whole: bool = False,
    ) -> None:
        self.store, self.records, self.counts, self.scored = store, np.asarray(records, np.int64), counts, scored
        sizes = store.lengths[self.records]
        sizes = np.minimum(sizes, length + 1) if whole else sizes
        numbers = np.maximum(-(-(sizes - 1) // length), 0)  # pieces of each
        which = np.repeat(np.arange(len(sizes)), numbers)
        starts = 1 + length * (np.arange(len(which)) - np.repeat(np.cumsum(numbers) - numbers, numbers))
        pieces = np.stack([which, starts, np.minimum(starts + length, sizes[which])], axis=1)
        if rng is not None:
            self._pieces, self._bounds = _filled(rng.permutation(pieces), length)
            return
        self._pieces = pieces
        filled = np.concatenate([[0], np.cumsum(pieces[:, 2] - pieces[:, 1])])
        self._bounds = [0]
        while self._bounds[-1] < len(pieces):
            at = self._bounds[-1]
            self._bounds.append(int(np.searchsorted(filled, filled[at] + length, side="right")) - 1)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = self._pieces[self._bounds[index] : self._bounds[index + 1]].tolist()
        tokens = [self.store[self.records[which]][start - 1 : stop].astype(np.int64) for which, start, stop in pieces]
        targets = [ids[1:] for ids in tokens]
        known: list[Any] = [slice(None)] * len(pieces)
        if self.scored is not None:
            known = [self.scored[which][start:stop].astype(bool) for which, start, stop in pieces]
            targets = [np.where(mine, ids, -100) for mine, ids in zip(known, targets, strict=True)]
        n_bytes = None
        if self.counts is not None:
            n_bytes = torch.tensor(
                [
                    int(self.counts[which][start:stop][mine].sum(dtype=np.int64))
                    for mine, (which, start, stop) in zip(known, pieces, strict=True)
                ]
            )
        return Batch(
            inputs=torch.from_numpy(np.concatenate([ids[:-1] for ids in tokens]))[None],
            targets=torch.from_numpy(np.concatenate(targets))[None],
            cu_seqlens=torch.tensor([0, *map(len, targets)], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            n_units=n_bytes,
        )


def _filled(pieces: np.ndarray, length: int) -> tuple[np.ndarray, list[int]]:
    """Pieces in an order in which they fill packs of `length`, and where packs end: of some hundred at a time, always
    the longest that still fits."""
    sizes = pieces[:, 2] - pieces[:, 1]
    order: list[int] = []
    bounds = [0]
    for start in range(0, len(pieces), _AMONG):
        block = np.argsort(sizes[start : start + _AMONG], kind="stable") + start
        left, which = sizes[block].tolist(), block.tolist()
        while left:
            rest = length
            while at := bisect.bisect_right(left, rest):
                rest -= left.pop(at - 1)
                order.append(which.pop(at - 1))
            bounds.append(len(order))
    return pieces[order], bounds


class _Reading(Reading):
    """The documents of files, each a record with the name of its split.

    wanted: the splits to read, each with how many of its documents, None for all. again: they have been read before, so
        what is left out has been told.
    """

    def __init__(self, data: DocumentData, wanted: Mapping[str, int | None], again: bool = False) -> None:
        self.data, self.wanted, self.again = data, dict(wanted), again
        self.left_out, self._enough, self._empty = data.left_out_rows, False, 0

    def pieces(self, place: Any) -> Iterator[Piece]:
        data, left_out, held_out = self.data, self.left_out, self.data._held_out
        first, skipped, self.wanted = place or (0, 0, self.wanted)
        files = [
            (split, name)
            for split in SPLITS
            for name in data._files[split]
            if not (split == "train" and data.streaming)
        ]
        for number, (split, name) in enumerate(files):
            if number < first or (split == "train" and self._enough):
                continue
            before, seen = skipped if number == first else 0, 0
            refuse = lambda error: left_out(error) if seen >= before else None  # noqa: B023, E731
            for where, text in data.read(name, refuse):
                seen += 1
                if seen <= before:
                    continue
                if left_out.refused:
                    if left_out.look(text):
                        continue
                    left_out.check()
                if split == "train" and not held_out.takes(where, [text]):
                    continue
                target = split_of_text(text, data.fractions) if split == "train" else split
                if target not in self.wanted or self.wanted[target] == 0:
                    continue
                if not text:
                    self._empty += 1
                    continue
                if (left := self.wanted[target]) is not None:
                    self.wanted = {**self.wanted, target: left - 1}
                yield Piece(target, text, [number, seen, self.wanted], more=split == "train")
                if self._enough and split == "train":
                    break
            if not any(left is None or left for left in self.wanted.values()):
                break
        left_out.check()
        if self.again:
            return
        held_out.tell()
        if self._empty:
            logger.warning("Left out: %s documents without text.", f"{self._empty:,}")

    def found(self) -> list[Any]:
        return self.left_out.take()

    def enough(self) -> None:
        self._enough = True


class DocumentData(SequenceData):
    """Documents as a language model's data. Packed: whole documents share a sequence of at most `length`
    tokens, and no state crosses from one to the next. Streamed: windows of `length` tokens of a stream that
    never ends.

    Args:
        files: what to train on: jsonl, a JSON array, parquet, CSV or TSV (a document a row), or plain text; file names,
            patterns (`*`, `?`), resources, data sets of the Hugging Face Hub (`hub:OWNER/NAME`, and where wanted
            `@REVISION`, `:CONFIG`, `:SPLIT`), or addresses with `://`, in which `${NAME}` stands for an environment
            variable.
        validation_files: files of the validation set. When left out, it is a share of the training documents (none when
            streaming), chosen by their content, so that copies of one never are in two sets.
        test_files: the same for the test set.
        validation_fraction: that share for validation. Not used with `validation_files`.
        test_fraction: that share for the test. Not used with `test_files`.
        field: the field of rows that holds the text.
        encoding: of the files.
        unit: what a document is in plain text: the whole `file`, a `paragraph`, or a `line`.
        duplicates: a training document that is in validation or test files too is refused (`refuse`) or left out of
            training (`drop`).
        skip_bad: leave out rows that cannot be used (broken JSON, no text, not UTF-8) and list them in the run's
            folder, `left_out.jsonl`; otherwise all of them are told at once.
        workers: processes that tokenise; null for as many as there are cores, 0 for none but the run's own. What is
            tokenised is kept, part by part, and a killed run goes on from there.
        max_tokens: of the training files, as many are tokenised as give about so many tokens, from the first on; 0 for
            all.
        tokenizer: a registered tokenizer (`mambaseq list tokenizers`).
        tokenizer_options: its options; `bos` and `eos` mark where documents begin and end. Its defaults when left out.
        length: tokens a pack or window; a batch has `loader.batch_size` of them.
        streaming: read the training files as the run goes, without a cache; set `trainer.max_steps`.
        shuffle_windows: windows of the stream that are mixed at a time.
        seed: of the packing, or of the stream's order.
    """

    reader, writer = "text/text", "text/text"

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        validation_files: str | Sequence[str] | None = None,
        test_files: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        field: str = "text",
        encoding: str = "utf-8",
        unit: Unit = "paragraph",
        duplicates: Duplicates = "refuse",
        skip_bad: bool = False,
        workers: int | None = None,
        max_tokens: int = 0,
        tokenizer: str = "text/bytes",
        tokenizer_options: dict[str, Any] | None = None,
        length: int = 2048,
        streaming: bool = False,
        shuffle_windows: int = 1000,
        seed: int = 0,
    ) -> None:
        self.files, self.validation_files, self.test_files = files, validation_files, test_files
        self.fractions = {
            "validation": 0.0 if validation_files or streaming else validation_fraction,
            "test": 0.0 if test_files or streaming else test_fraction,
        }
        self.field, self.encoding, self.unit, self.duplicates = field, encoding, unit, duplicates
        self.skip_bad, self.workers, self.max_tokens = skip_bad, workers, max_tokens
        self.left_out_rows = LeftOut(skip_bad)
        self.tokenizer_name, self.tokenizer_options = tokenizer, tokenizer_options
        self.length, self.streaming, self.shuffle_windows, self.seed = (
            length,
            streaming,
            shuffle_windows,
            seed,
        )
        self._records: dict[str, list[int]] | None = None
        self._store: TokenStore | None = None

    def setup(self) -> None:
        if self._records is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.shuffle_windows", self.shuffle_windows, 0, 2**24)
        check_setting("data.seed", self.seed, *SEEDS)
        check_setting("data.max_tokens", self.max_tokens, 0, 2**60)
        check_workers(self.workers)
        check_fractions(self.fractions["validation"], self.fractions["test"])
        tokenizer = make_tokenizer(self.tokenizer_name or "", self.tokenizer_options)
        self._files, self._sources, unchanged = split_files(
            self.files, self.validation_files, self.test_files, streaming=self.streaming
        )
        if not self._files["train"]:
            raise ConfigError("data.files names nothing. Give a file, a pattern, or a list of them.")
        stored = SPLITS[1:] if self.streaming else SPLITS
        records: dict[str, list[int]] = {split: [] for split in SPLITS}
        if any(self._files[split] for split in stored):
            self._store_documents(tokenizer, stored, unchanged)
            assert self._store is not None
            for number, split in enumerate(self._store.names):
                records[split].append(number)
        for split in stored:
            if (self._files[split] or self.fractions.get(split)) and not records[split]:
                raise DataError(
                    f"No document is in the {split} set of "
                    f"{cut_list(self._files[split] or self._files['train'])}. Give the split more of the "
                    f"documents, or files of its own."
                )
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.start_ids = tokenizer.start_ids
        self._records = records

    def sources(self) -> dict[str, str]:
        """sha256 of each file; size and time of change of a streamed training file; for an address, the server's
        identifier of the contents (an ETag), if any."""
        self.setup()
        return checksums(self._files, self._sources)

    def read(self, name: str, refuse: Refuse = raised) -> Iterator[tuple[str, str]]:
        """The documents of a file, each with its place."""
        return documents(name, field=self.field, encoding=self.encoding, unit=self.unit, refuse=refuse)

    def left_out(self) -> list[dict[str, Any]]:
        self.setup()
        return [] if self._store is None else self._store.found

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """The documents of the validation and test files."""
        found = HeldOut(self.duplicates)
        refuse = functools.partial(self.left_out_rows, listed=False)
        for split in SPLITS[1:]:
            for where, text in (both for name in self._files[split] for both in self.read(name, refuse)):
                found.add(split, where, [text])
        return found

    def _read_for_training(self, name: str, refuse: Refuse = raised) -> Iterator[str]:
        return (text for where, text in self.read(name, refuse) if text and self._held_out.takes(where, [text]))

    def _store_documents(self, tokenizer: TextTokenizer, splits: Sequence[str], unchanged: Unchanged) -> None:
        files = {split: self._files[split] for split in splits}
        meta = {
            "reading": 3,  # the second one kept documents without text
            "duplicates": self.duplicates,
            "skip_bad": self.skip_bad,
            "max_tokens": self.max_tokens,
            "tokenizer": tokenizer.identity,
            "field": self.field,
            "encoding": self.encoding,
            "unit": self.unit,
            "fractions": self.fractions,
            "files": {split: len(names) for split, names in files.items()},
            "sources": [self._sources[name] for names in files.values() for name in names],
        }

        def stored(label: str, wanted: Mapping[str, int | None], **options: Any) -> TokenStore:
            reading = _Reading(self, wanted, again="counts" in options)
            return tokenised(label, reading, tokenizer, meta, workers=self.workers, unchanged=unchanged, **options)

        self._store = stored("documents", dict.fromkeys(SPLITS), max_tokens=self.max_tokens)
        self._counts: dict[str, list[np.ndarray]] = {}
        held_out = {split: self._store.names.count(split) for split in SPLITS[1:]}
        if not tokenizer.bytewise and any(held_out.values()):
            counts = stored("documents-bytes", held_out, counts=True)
            for number, split in enumerate(counts.names):
                self._counts.setdefault(split, []).append(counts[number])

    def train(self) -> PackedDocuments | StreamedWindows:
        assert self._records is not None, "setup comes first"
        if self.streaming:
            assert isinstance(self.tokenizer, TextTokenizer)
            _ = self._held_out  # read once, not by every worker
            return StreamedWindows(
                self._files["train"],
                self._read_for_training,
                self.tokenizer,
                self.length,
                shuffle=self.shuffle_windows,
                seed=self.seed,
                refuse=ListedRows(self.skip_bad, self.left_out_file),
            )
        rng = np.random.default_rng(self.seed)
        assert self._store is not None
        return PackedDocuments(self._store, self._records["train"], self.length, rng=rng)

    def _packs(self, split: str) -> PackedDocuments | None:
        assert self._records is not None, "setup comes first"
        if not self._records[split]:
            return None
        assert self._store is not None
        return PackedDocuments(self._store, self._records[split], self.length, self._counts.get(split))

    def validation(self) -> PackedDocuments | None:
        return self._packs("validation")

    def test(self) -> PackedDocuments | None:
        return self._packs("test")

    def collate(self, items: list[Batch]) -> Batch:
        """Packs are joined into one, windows of a stream are stacked."""
        return pad_collate(items) if items[0].cu_seqlens is None else pack_collate(items)

    def reader_options(self) -> dict[str, Any]:
        return {"field": self.field, "encoding": self.encoding}
