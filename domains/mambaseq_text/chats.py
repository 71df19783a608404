"""Conversations, and prompts with their answers: answers are learned, what is asked is only read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mambaseq.atomic import json_text
from mambaseq.batch import Batch
from mambaseq.data.growing import Part, grown
from mambaseq.data.module import SequenceData, pack_collate
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, UserError, cut, cut_list
from mambaseq.limits import SEEDS, WINDOW, check_setting
from mambaseq_text.copies import Duplicates, HeldOut
from mambaseq_text.documents import PackedDocuments
from mambaseq_text.left_out import LeftOut
from mambaseq_text.rows import BadRow, is_plain, objects, text_in
from mambaseq_text.splits import SPLITS, check_fractions, checksums, split_files, split_of_text
from mambaseq_text.templates import ChatTemplate, check_messages
from mambaseq_text.tokenization import ByteTokenizer, TextTokenizer, make_tokenizer

ASSISTANT = "assistant"
PART = 1 << 20  # tokens

logger = logging.getLogger(__name__)

Stretch = tuple[str, bool]
"""A piece of text, and whether it is learned."""


def stretches(template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[Stretch]:
    """A conversation as text, cut where answers begin and end: answers are what the template marks as such, or
    otherwise all that it writes for a message of the assistant, with what ends it.

    Raises UserError for messages that the template refuses, and for a template that changes what it wrote before once a
    conversation goes on.
    """
    text, answers = template.marked(messages)
    if not answers:
        for number, one in enumerate(messages):
            if one["role"] != ASSISTANT:
                continue
            before = template.render(messages[:number])
            after = template.render(messages[: number + 1], reply=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{template.name} writes what stands before message {number + 1} in another way once the "
                    "conversation goes on, so where that answer begins cannot be told. Put {% generation %} and "
                    "{% endgeneration %} around answers in it."
                )
            answers.append((len(before), len(after)))
    found: list[Stretch] = []
    end = 0
    for start, stop in answers:
        found += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [(piece, learned) for piece, learned in [*found, (text[end:], False)] if piece]


class _Half:
    """What the second record of each conversation says of its tokens: by `of`, from values."""

    def __init__(self, store: TokenStore, records: Sequence[int], of: Any) -> None:
        self.store, self.records, self.of = store, records, of

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> np.ndarray:
        found: np.ndarray = self.of(self.store[self.records[number] + 1])
        return found


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values >> 1


def _learned(values: np.ndarray) -> np.ndarray:
    return values & 1


class ChatData(SequenceData):
    """Conversations, or prompts with answers, for fine-tuning: the loss is that of the assistant's answers, of every
    turn. Packed as documents are: no state crosses from one to the next.

    Args:
        files: what to train on: jsonl, a JSON array or parquet, a conversation a row; pairs also as CSV or TSV. Names
            as those of `text/documents`, data sets of the Hub included.
        validation_files: files of the validation set. When left out, it is a share of the training conversations.
        test_files: the same for the test set.
        validation_fraction: that share for validation. Not used with `validation_files`.
        test_fraction: that share for the test. Not used with `test_files`.
        form: `chats`: lists of messages, written by the chat template of the tokenizer. `pairs`: a prompt and an
            answer, end to end as they are. `templated_pairs`: both as messages of the user and the assistant, by the
            template.
        messages: the field of chats with the list of `{"role": ..., "content": ...}`.
        prompt: the field of pairs with the prompt.
        answer: the field of pairs with the answer.
        between: text between prompt and answer of `pairs`; part of the prompt.
        duplicates: a training conversation that is in validation or test files too is refused (`refuse`) or left out
            of training (`drop`).
        encoding: of the files.
        skip_bad: leave out rows that cannot be used and list them in the run's folder, `left_out.jsonl`; otherwise all
            of them are told at once.
        tokenizer: a registered tokenizer (`mambaseq list tokenizers`).
        tokenizer_options: its options. Chats need a template: that beside its tokenizer.json, or the file `template`.
            Pairs are learned with their end by `eos`.
        length: tokens a pack; longer conversations are cut at their end.
        seed: of the packing.
    """

    reader, writer, task = "text/text", "text/text", "next_token"

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        validation_files: str | Sequence[str] | None = None,
        test_files: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        form: Literal["chats", "pairs", "templated_pairs"] = "chats",
        messages: str = "messages",
        prompt: str = "prompt",
        answer: str = "answer",
        between: str = "",
        duplicates: Duplicates = "refuse",
        encoding: str = "utf-8",
        skip_bad: bool = False,
        tokenizer: str = "text/hf",
        tokenizer_options: dict[str, Any] | None = None,
        length: int = 2048,
        seed: int = 0,
    ) -> None:
        self.files, self.validation_files, self.test_files = files, validation_files, test_files
        self.fractions = {
            "validation": 0.0 if validation_files else validation_fraction,
            "test": 0.0 if test_files else test_fraction,
        }
        self.form, self.messages, self.prompt, self.answer, self.between = form, messages, prompt, answer, between
        self.duplicates, self.encoding, self.skip_bad = duplicates, encoding, skip_bad
        self.tokenizer_name, self.tokenizer_options = tokenizer, tokenizer_options
        self.length, self.seed = length, seed
        self.left_out_rows = LeftOut(skip_bad)
        self._store: TokenStore | None = None

    def setup(self) -> None:
        if self._store is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.seed", self.seed, *SEEDS)
        check_fractions(self.fractions["validation"], self.fractions["test"])
        tokenizer = make_tokenizer(self.tokenizer_name or "", self.tokenizer_options)
        template = None if self.form == "pairs" else self._template(tokenizer)
        self._files, self._sources, unchanged = split_files(self.files, self.validation_files, self.test_files)
        if not self._files["train"]:
            raise ConfigError("data.files names nothing. Give a file, a pattern, or a list of them.")
        if plain := [name for names in self._files.values() for name in names if is_plain(name)]:
            raise DataError(f"{cut_list(plain, 3)}: plain text holds no conversations. Give jsonl, JSON or parquet.")
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.start_ids = tokenizer.start_ids
        if self.form == "pairs" and tokenizer.eos_id is None:
            logger.warning(
                "No mark ends the answers, so a model does not learn to end. Set data.tokenizer_options.eos."
            )
        columns = [self.messages] if self.form == "chats" else [self.prompt, self.answer]
        meta = {
            "tokenizer": tokenizer.identity,
            "template": None if template is None else [template.source, template.tokens],
            "form": [self.form, *columns, self.between],
            "bytes": "without those of special tokens",  # stores that an older version made count them
            "duplicates": self.duplicates,
            "skip_bad": self.skip_bad,
            "encoding": self.encoding,
            "fractions": self.fractions,
            "files": {split: len(names) for split, names in self._files.items()},
            "sources": [self._sources[name] for names in self._files.values() for name in names],
        }
        parts = functools.partial(self._parts, tokenizer, template, columns)
        store = grown("chats", parts, "uint32", meta, unchanged=unchanged)
        self._records: dict[str, list[int]] = {split: [] for split in SPLITS}
        cut_off = 0
        for number, split in enumerate(store.names[::2]):
            record = 2 * number
            if store.lengths[record] > self.length + 1 and not (store[record + 1][1 : self.length + 1] & 1).any():
                cut_off += 1
            else:
                self._records[split].append(record)
        if cut_off:
            logger.warning(
                "Left out: %s conversations whose first answer begins behind data.length, %s tokens.",
                f"{cut_off:,}",
                f"{self.length:,}",
            )
        for split in SPLITS:
            if (self._files[split] or self.fractions.get(split)) and not self._records[split]:
                raise DataError(
                    f"No conversation with an answer is in the {split} set of "
                    f"{cut_list(self._files[split] or self._files['train'])}. Give the split more of them, or files of "
                    "its own."
                )
        self._store = store

    def _template(self, tokenizer: TextTokenizer) -> ChatTemplate:
        template: ChatTemplate | None = getattr(tokenizer, "template", None)
        if template is None:
            by_bytes = (
                " Of a run of bytes, `mambaseq export --format transformers` writes the tokenizer.json for text/hf."
                if isinstance(tokenizer, ByteTokenizer)
                else ""
            )
            raise ConfigError(
                "The tokenizer has no chat template, by which messages become text. Give one with a template beside "
                "its tokenizer.json (chat_template.jinja, or chat_template in tokenizer_config.json), name a file as "
                "data.tokenizer_options.template of text/hf (mambaseq:configs/text/chat.jinja is one), or give "
                "prompts and answers (data.form: pairs)."
                f"{by_bytes}"
            )
        return template

    def _rows(self, name: str, columns: Sequence[str], refuse: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The conversations of a file as messages, with their numbers."""
        for kind, number, row in objects(name, columns, self.encoding, refuse):
            try:
                if self.form == "chats":
                    messages = check_messages(row[self.messages])
                    if all(one["role"] != ASSISTANT for one in messages):
                        raise DataError("No message is one of the assistant, so there is nothing to learn.")
                else:
                    said = [text_in(row, column, kind, number, name) for column in columns]
                    if not said[1]:
                        raise DataError(f"{self.answer} is empty.")
                    messages = [{"role": "user", "content": said[0]}, {"role": ASSISTANT, "content": said[1]}]
            except BadRow as error:
                refuse(error)
            except DataError as error:
                message = f"{kind.capitalize()} {number} of {name}: {error} Correct or remove it."
                refuse(BadRow(message, name, number, cut(error, 200)))
            else:
                yield number, messages

    @staticmethod
    def _said(messages: Sequence[dict[str, Any]]) -> str:
        return json_text([[one["role"], one["content"]] for one in messages], ensure_ascii=False)

    def _held_out(self, columns: Sequence[str]) -> HeldOut:
        found = HeldOut(self.duplicates)
        refuse = functools.partial(self.left_out_rows, listed=False)
        for split in SPLITS[1:]:
            for name in self._files[split]:
                for number, messages in self._rows(name, columns, refuse):
                    found.add(split, f"{name}, row {number}", [self._said(messages)])
        return found

    def _parts(
        self, tokenizer: TextTokenizer, template: ChatTemplate | None, columns: Sequence[str], place: Any
    ) -> Iterator[Part]:
        """Two records a conversation: its ids; and of each twice its bytes, plus one where it is learned. Special
        tokens have no bytes, whether the template writes them or eos ends a pair, so that bits a byte compare."""
        first, skipped = place or (0, 0)
        left_out, held_out = self.left_out_rows, self._held_out(columns)
        files = [(split, name) for split in SPLITS for name in self._files[split]]
        records: list[tuple[str | None, np.ndarray]] = []
        size = 0
        for number, (split, name) in enumerate(files):
            if number < first:
                continue
            before, seen = skipped if number == first else 0, 0
            refuse = lambda error: left_out(error) if seen >= before else None  # noqa: B023, E731
            for row, messages in self._rows(name, columns, refuse):
                seen += 1
                if seen <= before:
                    continue
                said = self._said(messages)
                if left_out.refused and not left_out.look(said):
                    left_out.check()
                if split == "train" and not held_out.takes(f"{name}, row {row}", [said]):
                    continue
                try:
                    ids, values = self._encoded(tokenizer, template, messages)
                except UserError as error:
                    left_out(BadRow(f"Row {row} of {name}: {error}", name, row, cut(error, 200)))
                    continue
                target = split_of_text(said, self.fractions) if split == "train" else split
                records += [(target, ids), (target, values)]
                size += len(ids)
                if size >= PART and not left_out.refused:
                    yield Part(records, [number, seen], left_out.take())
                    records, size = [], 0
        left_out.check()
        held_out.tell()
        if records or left_out.count:
            yield Part(records, [len(files), 0], left_out.take())

    def _encoded(
        self, tokenizer: TextTokenizer, template: ChatTemplate | None, messages: list[dict[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        if template is None:
            prompt, answer = (one["content"] for one in messages)
            parts = [tokenizer.part(prompt + self.between, True, False), tokenizer.part(answer, False, True)]
            learned = [False, True]
        else:
            cut_up = stretches(template, messages)
            parts, learned = [tokenizer.encode_counted(text) for text, _ in cut_up], [one for _, one in cut_up]
        ids = np.concatenate([one for one, _ in parts]).astype(np.uint32)
        counts = np.concatenate([one for _, one in parts]).astype(np.uint32)
        counts[np.isin(ids, list(tokenizer.special_ids))] = 0
        found = 2 * counts + np.repeat(np.array(learned, dtype=np.uint32), [len(one) for one, _ in parts])
        if not (found[1:] & 1).any():
            raise UserError("There is no answer that can be learned. Correct or remove it.")
        return ids, found

    def sources(self) -> dict[str, str]:
        self.setup()
        return checksums(self._files, self._sources)

    def left_out(self) -> list[dict[str, Any]]:
        self.setup()
        assert self._store is not None
        return self._store.found

    def _packs(self, split: str, rng: np.random.Generator | None = None) -> PackedDocuments | None:
        assert self._store is not None, "setup comes first"
        records = self._records[split]
        if not records:
            return None
        counts, scored = (_Half(self._store, records, of) for of in (_bytes_of, _learned))
        known: Any = counts if rng is None else None
        return PackedDocuments(self._store, records, self.length, known, rng, scored, whole=True)  # type: ignore[arg-type]

    def train(self) -> PackedDocuments:
        packs = self._packs("train", np.random.default_rng(self.seed))
        assert packs is not None
        return packs

    def validation(self) -> PackedDocuments | None:
        return self._packs("validation")

    def test(self) -> PackedDocuments | None:
        return self._packs("test")

    def collate(self, items: list[Batch]) -> Batch:
        """Packs are joined into one."""
        return pack_collate(items)

    def reader_options(self) -> dict[str, Any]:
        return {"encoding": self.encoding}
