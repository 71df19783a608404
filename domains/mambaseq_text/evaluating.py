"""What a language model is worth on texts: LAMBADA's last words, and the perplexity of whole documents."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.generation.scoring import Asked, Scored, Scorer, perplexity
from mambaseq.runs.devices import choose_device
from mambaseq_text.reading import decoded, read_bytes, text_files
from mambaseq_text.rows import Unit, documents, is_plain
from mambaseq_text.tokenization import TextTokenizer


class Reader:
    """A run's model and its tokenizer of text, which score texts.

    checkpoint: the folder of a run, or of an exported model. device: the GPU if there is one, when left out.
    Raises UserError when there is none, ConfigError when it is no causal language model of text.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None) -> None:
        self.loaded: LoadedModel = load_model(checkpoint, choose_device(device))
        tokenizer = self.loaded.tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            kind = "none" if tokenizer is None else type(tokenizer).__name__
            raise ConfigError(
                f"The model at {checkpoint} has no tokenizer of text ({kind}), so it cannot score texts. Give a run of "
                "text, such as one of text/demo."
            )
        self.tokenizer = tokenizer
        self.scorer = Scorer(self.loaded.model)

    @property
    def mark(self) -> list[int]:
        """The id that stands before a document, if the tokenizer has one."""
        marks = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return [mark for mark in marks if mark is not None][:1]


def pair(tokenizer: Tokenizer, context: str, continuation: str) -> Asked:
    """Ids of a context and its continuation, tokenised together and cut where the context's own ids end, as lm-eval
    does; blanks at the context's end go to the continuation."""
    kept = context.rstrip()
    both = tokenizer.encode(context + continuation)
    begin = tokenizer.encode(kept)
    return Asked(both[: len(begin)], both[len(begin) :])


@dataclasses.dataclass
class LastWords:
    """How a model continues passages by their last words.

    passages: how many. accuracy: share whose last word is wholly the model's first choice, token by token.
    accuracy_error: its standard error. perplexity: exp of the mean negative log-likelihood of a last word, all its
        tokens together. tokens: of all last words.
    """

    passages: int
    accuracy: float
    accuracy_error: float
    perplexity: float
    tokens: int


def last_words(
    reader: Reader,
    files: str | Sequence[str],
    *,
    field: str = "text",
    limit: int | None = None,
    progress: bool = False,
) -> LastWords:
    """LAMBADA as the field computes it (lm-eval's lambada_openai): the last word of each passage, with the blank before
    it, given the rest.

    files: passages, one a document (jsonl with `field`; plain text a line each). limit: only the first so many.
    Raises DataError that names the file and line of a passage of one word, or one that ends with a blank.
    """
    asked = []
    names = text_files(files)
    rows = itertools.chain.from_iterable(documents(name, field=field, unit="line") for name in names)
    for where, text in itertools.islice(rows, limit):
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word.strip():
            raise DataError(
                f"{where}: the passage {shown(text)} does not end with a blank and a word, so no last word can be "
                "asked for. Correct or remove the line."
            )
        asked.append(_begun(reader, pair(reader.tokenizer, context, f" {word}")))
    if not asked:
        raise DataError(f"{names[0]} holds no passage. Give a file with one a line.")
    found = reader.scorer.continuations(asked, progress)
    count = len(found)
    right = sum(one.greedy for one in found) / count
    return LastWords(
        passages=count,
        accuracy=right,
        accuracy_error=math.sqrt(right * (1 - right) / (count - 1)) if count > 1 else math.nan,
        perplexity=perplexity(sum(one.nats for one in found), count),
        tokens=sum(one.tokens for one in found),
    )


def _begun(reader: Reader, asked: Asked) -> Asked:
    """With something to begin from, where a context has no token."""
    if len(asked.context):
        return asked
    return Asked(np.asarray(reader.tokenizer.start_ids, dtype=np.int64), asked.continuation)


@dataclasses.dataclass
class Surprise:
    """How well a model predicts documents.

    documents, tokens, words, bytes: what was predicted; words are what blanks separate. nats: the negative natural
    log-likelihood of all of it.
    """

    documents: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    nats: float = 0.0

    @property
    def token_perplexity(self) -> float:
        return perplexity(-self.nats, self.tokens)

    @property
    def word_perplexity(self) -> float:
        return perplexity(-self.nats, self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def plain(self) -> dict[str, Any]:
        """Its numbers, with those that follow from them."""
        return {
            **dataclasses.asdict(self),
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def surprise(
    reader: Reader,
    files: str | Sequence[str],
    *,
    field: str = "text",
    encoding: str = "utf-8",
    unit: Unit = "file",
) -> Iterator[tuple[str, Surprise]]:
    """Each document's name and how well it is predicted. A document may be of any length: every token is given all
    before it in the document, by the state that is passed on.

    The first token is predicted where the tokenizer has a mark to put before it, otherwise it is left out, with its
    bytes.
    Raises DataError as `documents` does.
    """
    for name in text_files(files):
        for where, pieces in _documents(name, field, encoding, unit):
            found = _Counted(reader, pieces)
            scored: Scored = reader.scorer.document(found)
            yield where, Surprise(1, scored.tokens, found.words, found.bytes, -scored.nats)


def _documents(name: str, field: str, encoding: str, unit: Unit) -> Iterator[tuple[str, Iterable[str]]]:
    if is_plain(name) and unit == "file":
        data = read_bytes(name, encoding)
        yield name, decoded(name, data, 0, len(data))
    else:
        for where, text in documents(name, field=field, encoding=encoding, unit=unit):
            yield where, [text]


class _Counted:
    """Ids of a document, piece by piece, that counts what it gave."""

    def __init__(self, reader: Reader, pieces: Iterable[str]) -> None:
        self.reader, self.pieces = reader, pieces
        self.words = self.bytes = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        mark = self.reader.mark
        begun, within = bool(mark), False
        if mark:
            yield np.asarray(mark)
        for text in self.pieces:
            ids, sizes = self.reader.tokenizer.encode_counted(text)
            self.bytes += int(sizes.sum()) - (0 if begun or not len(sizes) else int(sizes[0]))
            begun = begun or len(sizes) > 0
            # a word may be cut by the end of a piece
            self.words += len(text.split()) - (within and text[:1].strip() != "")
            within = text[-1:].strip() != "" if text else within
            yield ids


def total(found: Iterable[Surprise]) -> Surprise:
    """All documents together."""
    whole = Surprise()
    for one in found:
        whole = Surprise(*(a + b for a, b in zip(dataclasses.astuple(whole), dataclasses.astuple(one), strict=True)))
    return whole
