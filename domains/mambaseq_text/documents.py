"""Documents: packed end to end without touching each other, or streamed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.cache import Unchanged
from mambaseq.data.module import SequenceData, pack_collate, pad_collate
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, cut_list
from mambaseq.limits import SEEDS, WINDOW, check_setting
from mambaseq_text.copies import Duplicates, HeldOut
from mambaseq_text.reading import Unit, documents
from mambaseq_text.splits import SPLITS, check_fractions, checksums, split_files, split_of_text
from mambaseq_text.streaming import StreamedWindows
from mambaseq_text.tokenization import TextTokenizer, make_tokenizer


class PackedDocuments:
    """Items are packs: batches of one with `cu_seqlens`; no state crosses between documents.

    A document with more than `length` targets is cut into pieces of that many (every token but its first is a
    target once); whole pieces go into a pack while they fit into `length` together.

    store, records: the documents. counts: the bytes of their tokens, or None if every token is one byte or counts are
        not needed. rng: shuffles the pieces; None keeps their order.
    """

    def __init__(
        self,
        store: TokenStore,
        records: Sequence[int],
        length: int,
        counts: Sequence[np.ndarray] | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.store, self.records, self.counts = store, records, counts
        pieces = np.array(
            [
                (which, start, min(start + length, n))
                for which, n in enumerate(store.lengths[list(records)].tolist())
                for start in range(1, n, length)
            ],
            dtype=np.int64,
        ).reshape(-1, 3)
        self._pieces = pieces if rng is None else rng.permutation(pieces)
        self._bounds = [0]
        filled = 0
        for number, size in enumerate((self._pieces[:, 2] - self._pieces[:, 1]).tolist()):
            if filled and filled + size > length:
                self._bounds.append(number)
                filled = 0
            filled += size
        if len(self._pieces):
            self._bounds.append(len(self._pieces))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = self._pieces[self._bounds[index] : self._bounds[index + 1]].tolist()
        tokens = [self.store[self.records[which]][start - 1 : stop].astype(np.int64) for which, start, stop in pieces]
        n_bytes = None
        if self.counts is not None:
            n_bytes = torch.tensor(
                [int(self.counts[which][start:stop].sum(dtype=np.int64)) for which, start, stop in pieces]
            )
        return Batch(
            inputs=torch.from_numpy(np.concatenate([ids[:-1] for ids in tokens]))[None],
            targets=torch.from_numpy(np.concatenate([ids[1:] for ids in tokens]))[None],
            cu_seqlens=torch.tensor([0, *(len(ids) - 1 for ids in tokens)], dtype=torch.int32).cumsum(
                0, dtype=torch.int32
            ),
            n_units=n_bytes,
        )


class DocumentData(SequenceData):
    """Documents as a language model's data. Packed: whole documents share a sequence of at most `length`
    tokens, and no state crosses from one to the next. Streamed: windows of `length` tokens of a stream that
    never ends.

    Args:
        files: what to train on: jsonl or parquet (a document a row), or plain text; file names, patterns (`*`, `?`),
            resources, or addresses with `://`, in which `${NAME}` stands for an environment variable.
        validation_files: files of the validation set. When left out, it is a share of the training documents (none when
            streaming), chosen by their content, so that copies of one never are in two sets.
        test_files: the same for the test set.
        validation_fraction: that share for validation. Not used with `validation_files`.
        test_fraction: that share for the test. Not used with `test_files`.
        field: the field of jsonl and parquet rows that holds the text.
        encoding: of the files.
        unit: what a document is in plain text: the whole `file`, a `paragraph`, or a `line`.
        duplicates: a training document that is in validation or test files too is refused (`refuse`) or left out of
            training (`drop`).
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
        self.tokenizer_name, self.tokenizer_options = tokenizer, tokenizer_options
        self.length, self.streaming, self.shuffle_windows, self.seed = (
            length,
            streaming,
            shuffle_windows,
            seed,
        )
        self._records: dict[str, list[int]] | None = None

    def setup(self) -> None:
        if self._records is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.shuffle_windows", self.shuffle_windows, 0, 2**24)
        check_setting("data.seed", self.seed, *SEEDS)
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

    def read(self, name: str) -> Iterator[tuple[str, str]]:
        """The documents of a file, each with its place."""
        return documents(name, field=self.field, encoding=self.encoding, unit=self.unit)

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """The documents of the validation and test files."""
        found = HeldOut(self.duplicates)
        for split in SPLITS[1:]:
            for where, text in (both for name in self._files[split] for both in self.read(name)):
                found.add(split, where, [text])
        return found

    def _read_for_training(self, name: str) -> Iterator[str]:
        return (text for where, text in self.read(name) if self._held_out.takes(where, [text]))

    def _store_documents(self, tokenizer: TextTokenizer, splits: Sequence[str], unchanged: Unchanged) -> None:
        files = {split: self._files[split] for split in splits}
        meta = {
            "reading": 2,  # the first one lost what was before a line feed
            "duplicates": self.duplicates,
            "tokenizer": tokenizer.identity,
            "field": self.field,
            "encoding": self.encoding,
            "unit": self.unit,
            "fractions": self.fractions,
            "files": {split: len(names) for split, names in files.items()},
            "sources": [self._sources[name] for names in files.values() for name in names],
        }

        def tokenised(column: int, wanted: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
            held_out = self._held_out
            for split, names in files.items():
                for where, text in (both for name in names for both in self.read(name)):
                    if split == "train" and not held_out.takes(where, [text]):
                        continue
                    target = split_of_text(text, self.fractions) if split == "train" else split
                    if target in wanted:
                        yield target, np.concatenate([both[column] for both in tokenizer.document([text])])
            if column == 0:
                held_out.tell()

        self._store = TokenStore.cached(
            "documents", lambda: tokenised(0, SPLITS), tokenizer.dtype, meta, unchanged=unchanged.check
        )
        self._counts: dict[str, list[np.ndarray]] = {}
        if not tokenizer.bytewise and set(self._store.names) - {"train"}:
            counts = TokenStore.cached(
                "documents-bytes", lambda: tokenised(1, SPLITS[1:]), "uint32", meta, unchanged=unchanged.check
            )
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
            )
        rng = np.random.default_rng(self.seed)
        return PackedDocuments(self._store, self._records["train"], self.length, rng=rng)

    def _packs(self, split: str) -> PackedDocuments | None:
        assert self._records is not None, "setup comes first"
        if not self._records[split]:
            return None
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
