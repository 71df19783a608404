"""Long texts, in windows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.masking import MaskedItems, MaskRule, Objective, same_tokens
from mambaseq.data.module import SequenceData
from mambaseq.data.records import Refuse
from mambaseq.data.store import TokenStore
from mambaseq.data.windows import Group, Interval, RandomWindows, next_token
from mambaseq.errors import ConfigError, DataError, cut_list
from mambaseq.limits import EPOCH, SEEDS, WINDOW, check_setting
from mambaseq_text.copies import Duplicates, HeldOut
from mambaseq_text.left_out import LeftOut
from mambaseq_text.reading import character_start, decoded, read_bytes
from mambaseq_text.rows import documents, is_plain
from mambaseq_text.splits import SPLITS, check_fractions, checksums, split_files
from mambaseq_text.tokenising import Piece, Reading, check_workers, tokenised
from mambaseq_text.tokenization import make_tokenizer

SHAKESPEARE = "mambaseq:data/text/tinyshakespeare.txt"

Source = Callable[[Refuse], Iterator[str]]
"""Makes the text of a file: a plain one in pieces, others document by document."""
Part = tuple[str, Source]
"""A file's name, and its text."""


class TextTiles:
    """Texts cut into pieces of at most `length` targets, so that every token but a text's first is predicted once; the
    last piece may be shorter.

    texts: whole records. counts: the bytes of each token (see `TextTokenizer.encode_counted`), or None if every token
        is one byte. shifted: targets are the next tokens; otherwise they are a text's own tokens, without byte counts
        (see `MaskedItems`).
    """

    def __init__(
        self,
        texts: Sequence[Interval],
        length: int,
        counts: Sequence[np.ndarray] | None = None,
        shifted: bool = True,
    ) -> None:
        self.texts, self.counts, self.shifted = texts, counts, shifted
        self._pieces = [
            (which, start, min(start + length, text.stop))
            for which, text in enumerate(texts)
            for start in range(text.start + shifted, text.stop, length)
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def n_bytes(self, index: int) -> np.ndarray | None:
        """The bytes of each target of a piece, `(targets,)` uint32; None if every token is one byte."""
        which, start, stop = self._pieces[index]
        return None if self.counts is None else self.counts[which][start:stop]

    def __getitem__(self, index: int) -> Batch:
        which, start, stop = self._pieces[index]
        if not self.shifted:
            return same_tokens(self.texts[which].read(start, stop - start), 0, np.random.default_rng(0))
        ids = torch.from_numpy(self.texts[which].read(start - 1, stop - start + 1).astype(np.int64))
        counts = self.n_bytes(index)
        n_units = None if counts is None else torch.tensor([int(counts.sum(dtype=np.int64))])
        return Batch(inputs=ids[None, :-1], targets=ids[None, 1:], n_units=n_units)


class CorpusData(SequenceData):
    """Long texts as a language model's data: random windows in training; validation and test predict every token of
    their texts except the first once. Texts are split before they are tokenised, and tokenised once into a cache.

    Args:
        files: what to train on: a file, a pattern (`*`, `?`), a resource, a data set of the Hugging Face Hub
            (`hub:OWNER/NAME`, and where wanted `@REVISION`, `:CONFIG`, `:SPLIT`), or a list of them; the default is
            tinyshakespeare, which ships. Plain text is taken byte by byte; documents of jsonl, JSON arrays, parquet,
            CSV and TSV are laid end to end.
        validation_files: files of the validation set. When left out, it is a share of every training file.
        test_files: files of the test set. When left out, it is a share of every training file.
        validation_fraction: that share for validation, before the test's. Not used with `validation_files`.
        test_fraction: that share for the test, at the end of every file. Not used with `test_files`.
        duplicates: a training document of jsonl or parquet files that is in validation or test files too is refused
            (`refuse`) or left out of training (`drop`). Copies of whole plain files are always refused.
        skip_bad: leave out rows that cannot be used (broken JSON, no text, not UTF-8) and list them in the run's
            folder, `left_out.jsonl`; otherwise all of them are told at once.
        workers: processes that tokenise; null for as many as there are cores, 0 for none but the run's own. What is
            tokenised is kept, part by part, and a killed run goes on from there.
        max_tokens: of the training files, as many are tokenised as give about so many tokens, from the first on; 0 for
            all.
        field: the field of rows that holds the text.
        encoding: of the files.
        tokenizer: a registered tokenizer (`mambaseq list tokenizers`).
        tokenizer_options: its options, such as `{path: tokenizer.json}` of `text/hf`; its defaults when left out.
        length: tokens a window.
        epoch_size: windows that count as one epoch of training.
        seed: of the places of windows in training, and of what is masked.
        objective: `next_token`, or `masked`: tokens are hidden and predicted from both sides, by a backbone that reads
            both ways. The vocabulary then has one more id, the last: the mask token.
        mask_share: share of the tokens of a window that are hidden and predicted.
        mask_span: tokens that are hidden together.
        mask_replaced: share of those spans that become the mask token.
        mask_random: share of those spans that become random tokens; the rest stays as it is.
    """

    reader, writer = "text/text", "text/text"

    def __init__(
        self,
        *,
        files: str | Sequence[str] = SHAKESPEARE,
        validation_files: str | Sequence[str] | None = None,
        test_files: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        duplicates: Duplicates = "refuse",
        skip_bad: bool = False,
        workers: int | None = None,
        max_tokens: int = 0,
        field: str = "text",
        encoding: str = "utf-8",
        tokenizer: str = "text/bytes",
        tokenizer_options: dict[str, Any] | None = None,
        length: int = 1024,
        epoch_size: int = 1000,
        seed: int = 0,
        objective: Objective = "next_token",
        mask_share: float = 0.15,
        mask_span: int = 1,
        mask_replaced: float = 0.8,
        mask_random: float = 0.1,
    ) -> None:
        rule = MaskRule(mask_share, mask_span, mask_replaced, mask_random)  # checked even where it is not used
        self.rule = rule if objective == "masked" else None
        self.task = objective
        self.files, self.validation_files, self.test_files = files, validation_files, test_files
        self.fractions = {
            "validation": 0.0 if validation_files else validation_fraction,
            "test": 0.0 if test_files else test_fraction,
        }
        self.field, self.encoding, self.duplicates = field, encoding, duplicates
        self.skip_bad, self.workers, self.max_tokens = skip_bad, workers, max_tokens
        self.left_out_rows = LeftOut(skip_bad)
        self.tokenizer_name, self.tokenizer_options = tokenizer, tokenizer_options
        self.length, self.epoch_size, self.seed = length, epoch_size, seed
        self._texts: dict[str, list[Interval]] | None = None

    def setup(self) -> None:
        if self._texts is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.epoch_size", self.epoch_size, *EPOCH)
        check_setting("data.seed", self.seed, *SEEDS)
        check_setting("data.max_tokens", self.max_tokens, 0, 2**60)
        check_workers(self.workers)
        check_fractions(self.fractions["validation"], self.fractions["test"])
        tokenizer = make_tokenizer(self.tokenizer_name or "", self.tokenizer_options)
        self._files, self._sources, unchanged = split_files(self.files, self.validation_files, self.test_files)
        files = self._files
        if not files["train"]:
            raise ConfigError("data.files names nothing. Give a file, a pattern, or a list of them.")
        self._parts = self._make_parts(files)
        meta = {
            "reading": 2,
            "duplicates": self.duplicates,
            "skip_bad": self.skip_bad,
            "max_tokens": self.max_tokens,
            "tokenizer": tokenizer.identity,
            "field": self.field,
            "encoding": self.encoding,
            "fractions": self.fractions,
            "files": [len(files[split]) for split in SPLITS],
            "sources": list(self._sources.values()),
        }

        def stored(label: str, splits: Sequence[str], **options: Any) -> TokenStore:
            reading = _Reading(self, splits, again="counts" in options)
            return tokenised(label, reading, tokenizer, meta, workers=self.workers, unchanged=unchanged, **options)

        self._store = stored("corpus", SPLITS, max_tokens=self.max_tokens)
        records: dict[str, list[int]] = {split: [] for split in SPLITS}
        for number, name in enumerate(self._store.names):
            records[name.partition(" ")[0]].append(number)
        store = self._store
        self._counts: dict[str, list[np.ndarray] | None] = {split: None for split in SPLITS}
        if not tokenizer.bytewise and records["validation"] + records["test"]:
            counts = stored("corpus-bytes", SPLITS[1:], counts=True)
            first = len(records["train"])
            for split in SPLITS[1:]:
                self._counts[split] = [counts[number - first] for number in records[split]]
        self._texts = {
            split: [Interval(store, number, 0, int(store.lengths[number])) for number in numbers_of]
            for split, numbers_of in records.items()
        }
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size + (self.rule is not None)
        self.start_ids = tokenizer.start_ids

    def _make_parts(self, files: dict[str, list[str]]) -> dict[str, list[Part]]:
        parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for name in files[split]:
                if is_plain(name):
                    data = read_bytes(name, self.encoding)
                    shares = self._cut(data) if split == "train" else {split: (0, len(data))}
                    for share, (start, stop) in shares.items():
                        if start < stop:
                            parts[share].append((name, _stretch(name, data, start, stop)))
                elif split == "train" and any(self.fractions.values()):
                    raise ConfigError(
                        f"{name} holds documents, which data.validation_fraction and data.test_fraction cannot split. "
                        "Give data.validation_files and data.test_files, set the fractions to 0, or use the dataset "
                        "text/documents, which splits by document."
                    )
                else:
                    parts[split].append((name, self._documents(name, training=split == "train")))
        return parts

    def _documents(self, name: str, training: bool) -> Source:
        return lambda refuse: (
            text
            for where, text in documents(name, field=self.field, encoding=self.encoding, refuse=refuse)
            if text and (not training or self._held_out.takes(where, [text]))
        )

    def left_out(self) -> list[dict[str, Any]]:
        self.setup()
        return self._store.found

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """The contents of the validation and test files; plain ones as a whole."""
        found = HeldOut(self.duplicates)
        refuse = functools.partial(self.left_out_rows, listed=False)
        for split in SPLITS[1:]:
            for name in self._files[split]:
                if is_plain(name):
                    found.add(split, name, self._whole(name))
                else:
                    for where, text in documents(name, field=self.field, encoding=self.encoding, refuse=refuse):
                        found.add(split, where, [text])
        return found

    def _refuse_copies(self) -> None:
        """Refuse plain training files that are held out too; documents are compared where they are read."""
        for name in filter(is_plain, self._files["train"] if len(self._held_out) else ()):
            if not self._held_out.takes(name, self._whole(name)):
                raise DataError(
                    f"{name} (train) is a copy of a text in validation or test. Remove one: duplicates: drop works for "
                    "documents, not for plain files."
                )

    def _whole(self, name: str) -> Iterator[str]:
        data = read_bytes(name, self.encoding)
        return decoded(name, data, 0, len(data))

    def sources(self) -> dict[str, str]:
        """sha256 of each file; for an address, the server's identifier of the contents (an ETag), if any."""
        self.setup()
        return checksums(self._files, self._sources)

    def _cut(self, data: np.ndarray) -> dict[str, tuple[int, int]]:
        """Where the splits of a training file start and end, at whole characters."""
        n = len(data)
        test = character_start(data, int(n * (1 - self.fractions["test"])))
        validation = character_start(data, int(n * (1 - self.fractions["test"] - self.fractions["validation"])))
        return {"train": (0, validation), "validation": (validation, test), "test": (test, n)}

    def raw(self, split: str) -> list[np.ndarray]:
        """The texts of `"train"`, `"validation"` or `"test"` as UTF-8 bytes: `(length,)` uint8 each."""
        self.setup()
        refuse = functools.partial(self.left_out_rows, listed=False)
        texts = ("".join(make(refuse)) for _, make in self._parts[split])
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def _members(self, split: str) -> list[Interval]:
        assert self._texts is not None, "setup comes first"
        return self._texts[split]

    def train(self) -> Any:
        group = Group("texts", self._members("train"))
        span, make = (self.length + 1, next_token) if self.rule is None else (self.length, same_tokens)
        windows = RandomWindows(
            [group], span, make, size=self.epoch_size, seed=self.seed, by_position=True, length=self.length
        )
        return windows if self.rule is None else self._masked(windows, self.rule)

    def _masked(self, items: Any, rule: MaskRule) -> MaskedItems:
        assert self.tokenizer is not None
        units = items.n_bytes if isinstance(items, TextTiles) else None
        return MaskedItems(items, rule, self.tokenizer.vocab_size, seed=self.seed, units=units)

    def _tiles(self, split: str) -> TextTiles | MaskedItems | None:
        texts = self._members(split)
        if not texts:
            return None
        tiles = TextTiles(texts, self.length, self._counts[split], shifted=self.rule is None)
        if not len(tiles):
            raise DataError(
                f"The {split} part of {cut_list([name for name, _ in self._parts[split]])} is too short to "
                f"predict anything. Give it more of the data, or files of its own."
            )
        return tiles if self.rule is None else self._masked(tiles, self.rule)

    def validation(self) -> TextTiles | MaskedItems | None:
        return self._tiles("validation")

    def test(self) -> TextTiles | MaskedItems | None:
        return self._tiles("test")

    def reader_options(self) -> dict[str, Any]:
        return {"field": self.field, "encoding": self.encoding}


def _stretch(name: str, data: np.ndarray, start: int, stop: int) -> Source:
    return lambda refuse: decoded(name, data, start, stop)


class _Reading(Reading):
    """The texts of splits, each file's part of one a record `SPLIT NAME`. again: they have been read before, so what is
    left out has been told."""

    def __init__(self, data: CorpusData, splits: Sequence[str], again: bool = False) -> None:
        self.data, self.left_out, self._enough, self.again = data, data.left_out_rows, False, again
        self.parts = [(split, *part) for split in splits for part in data._parts[split]]

    def pieces(self, place: Any) -> Iterator[Piece]:
        if place is None:
            self.data._refuse_copies()
        first, skipped = place or (0, 0)
        for number, (split, name, make) in enumerate(self.parts):
            if number < first or (split == "train" and self._enough):
                continue
            before, seen = skipped if number == first else 0, 0
            refuse = lambda error: self.left_out(error) if seen >= before else None  # noqa: B023, E731
            plain, training, record = is_plain(name), split == "train", f"{split} {Path(name).name}"
            pieces = make(refuse)
            # the last one of plain text ends a document: one is read ahead
            text = next(pieces, None)
            if text is None and not before:
                yield Piece(record, "", [number + 1, 0], False, False, more=training)
            while text is not None:
                following = next(pieces, None) if plain else None
                seen += 1
                if self.left_out.refused:
                    if not self.left_out.look(text):
                        self.left_out.check()
                elif seen > before:
                    begins, ends, joint = (seen == 1, following is None, "") if plain else (True, True, "\n")
                    new = record if seen == 1 else None
                    yield Piece(new, text, [number, seen], begins, ends, joint, more=training)
                    if training and self._enough:
                        break
                text = following if plain else next(pieces, None)
        self.left_out.check()
        if not self.again:
            self.data._held_out.tell()

    def found(self) -> list[Any]:
        return self.left_out.take()

    def enough(self) -> None:
        self._enough = True
