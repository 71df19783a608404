"""Text to ids and back: bytes, or a tokenizer.json."""

from __future__ import annotations

import abc
import functools
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mambaseq.atomic import json_text
from mambaseq.data.store import smallest_dtype
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown, under_key
from mambaseq.limits import TOKEN_IDS, YAML_BYTES
from mambaseq.plain import read_json
from mambaseq.resources import located
from mambaseq.specs import check_options
from mambaseq_text.hub import hub_tokenizer, is_hub
from mambaseq_text.templates import FILE as TEMPLATE
from mambaseq_text.templates import ChatTemplate, check_messages
from mambaseq_text.words import Words, by_words, byte_counts


class TextTokenizer(Tokenizer):
    """A tokenizer of text that also knows which bytes each token stands for.

    bos_id, eos_id: ids put before and after a document; None for none. `encode` adds only the first, so its result is a
        prompt; `decode` leaves both out.
    start_ids: what generation starts from without a prompt: the mark before a document, otherwise a line end.
    special_ids: ids of marks that a text may be given, by a chat template for one; they are no text that people wrote.
    bytewise: every token is exactly one byte, so targets and bytes are equal in number.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    bytewise: bool = False

    @property
    def start_ids(self) -> list[int]:
        for mark in (self.bos_id, self.eos_id):
            if mark is not None:
                return [mark]
        return self.encode_counted("\n")[0].tolist() or [0]

    @abc.abstractmethod
    def encode_counted(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text without bos and eos, and how many of its UTF-8 bytes each stands for, uint32;
        `(length,)` each.

        The counts sum to the bytes of the text; a character's bytes belong to the first of the tokens that
        share it.
        """

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that differ whenever the ids of some text differ."""

    @property
    def dtype(self) -> str:
        return smallest_dtype(self.vocab_size)

    def part(self, text: str, begins: bool = True, ends: bool = True, joint: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Ids and byte counts of a part of a document, with the marks of its beginning and its end where it has them.
        joint: see `document`."""
        found = [self.encode_counted(text)] if text else []
        none = np.zeros(1, dtype=np.uint32)
        if begins and self.bos_id is not None:
            found.insert(0, (np.array([self.bos_id], dtype=self.dtype), none))
        if ends and self.eos_id is not None:
            found.append((np.array([self.eos_id], dtype=self.dtype), none))
        elif ends and joint:
            found.append(self.encode_counted(joint))
        if len(found) == 1:
            return found[0]
        empty = np.zeros(0, dtype=self.dtype), np.zeros(0, dtype=np.uint32)
        return tuple(np.concatenate([empty[which], *(both[which] for both in found)]) for which in (0, 1))  # type: ignore

    def document(self, pieces: Iterable[str], *, joint: str = "") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and byte counts of a document, piece by piece, between bos and eos.

        joint: text that ends the document if there is no eos, for documents laid end to end.
        """
        none = np.zeros(1, dtype=np.uint32)
        if self.bos_id is not None:
            yield np.array([self.bos_id], dtype=self.dtype), none
        for piece in pieces:
            yield self.encode_counted(piece)
        if self.eos_id is not None:
            yield np.array([self.eos_id], dtype=self.dtype), none
        elif joint:
            yield self.encode_counted(joint)

    def encode(self, raw: str | bytes) -> np.ndarray:
        """Ids of a text (or of its UTF-8 bytes), bos before them where there is one.

        Raises DataError if bytes are not UTF-8.
        """
        ids, _ = self.encode_counted(_decoded(raw))
        return ids if self.bos_id is None else np.concatenate([np.array([self.bos_id], ids.dtype), ids])


def _decoded(raw: str | bytes) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text is not UTF-8 at byte {error.start:,}. Convert it, for example with iconv."
        ) from error


# numbers of 8 digits and more behind a colon: an id in a vocabulary, or a token's own; not the length to cut text at
_LARGE = re.compile(rb'"(?!max_length")(?:[^"\\]++|\\.)*+"\s*:\s*([0-9]{8,})')


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes as ids 0 to 255.

    Args:
        bos: mark where a document begins, by id 256.
        eos: mark where a document ends, by the id after 255 or bos.
    """

    def __init__(self, bos: bool = False, eos: bool = False) -> None:
        self.bos_id = 256 if bos else None
        self.eos_id = 256 + bos if eos else None
        self.vocab_size = 256 + bos + eos
        self.bytewise = self.vocab_size == 256

    @property
    def options(self) -> dict[str, Any]:
        return {"bos": self.bos_id is not None, "eos": self.eos_id is not None}

    @property
    def identity(self) -> dict[str, Any]:
        return {"bytes": True, **self.options}

    def encode_counted(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)
        return ids, np.ones(len(ids), dtype=np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `(length,)` ids; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save_for_transformers(self, folder: Path) -> dict[str, int]:
        """Byte pieces without a merge: the same ids of every text."""
        # the letters by which such a vocabulary writes bytes: printable ones as they are, the rest from 256 on
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in own]
        letters = {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
        marks = {"bos": self.bos_id, "eos": self.eos_id}
        special = {f"<{name}>": number for name, number in marks.items() if number is not None}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters | special, merges=[]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(list(special))
        return _write_for_transformers(folder, made, {name: f"<{name}>" for name, number in marks.items() if number})


class HFTokenizer(TextTokenizer):
    """A tokenizer of Hugging Face's `tokenizers`, from its `tokenizer.json`; the file is saved with a model, and so are
    those beside it that say more of it (`COMPANIONS`), such as a chat template.

    Args:
        path: the file `tokenizer.json`; or `hub:OWNER/NAME`, that of a model of the Hugging Face Hub.
        bos: token of its vocabulary that marks where a document begins, such as `<|endoftext|>`; None for none.
        eos: token that marks where a document ends; None for none.
        template: a file with a chat template, in the place of the one beside the tokenizer.json.
    """

    FILE = "tokenizer.json"
    COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

    def __init__(self, path: str, bos: str | None = None, eos: str | None = None, template: str | None = None) -> None:
        self.template_file = template
        path = str(hub_tokenizer(path)) if is_hub(path) else path
        self.path, self.bos, self.eos = path, bos, eos
        if not _is_file(path):
            raise DataError(
                f"There is no tokenizer file {path[:200]}. Give the path of a model's tokenizer.json; `mambaseq import "
                "--checkpoint NAME --out RUN` writes that of a published model to RUN/model."
            )
        _check_ids(Path(path).expanduser())
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(Path(path).expanduser()))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{path} cannot be read as a tokenizer.json: {str(error)[:200]}. Give the file that `tokenizers` saves "
                f"(one JSON object with a model and its vocabulary), not vocab.json or tokenizer_config.json."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # it would tokenise the same text differently at every call
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if len(vocabulary) < 2:
            raise DataError(
                f"The vocabulary of {path} has {len(vocabulary)} entries, and a model needs two at least. Train the "
                f"tokenizer on some text, or give another file."
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = self._special("bos", bos)
        self.eos_id = self._special("eos", eos)
        marks = (self.bos_id, self.eos_id)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_ids = frozenset(number for number, token in added if token.special or number in marks)
        self._words = Words(self._encoded, self.dtype) if by_words(self._tokenizer) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.bos, self.eos, self.template_file)  # the library's own would be far longer

    def _special(self, option: str, token: str | None) -> int | None:
        if token is None:
            return None
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            near = did_you_mean(token, self._tokenizer.get_vocab(with_added_tokens=True))
            special = [one.content for one in self._tokenizer.get_added_tokens_decoder().values() if one.special]
            has = f"Its special tokens: {cut_list(map(shown, special), 8)}" if special else "It has no special tokens"
            raise ConfigError(
                f"{self.path} has no token {shown(token)}, which the option {option} asks for, as it may stand in the "
                f"configuration that a run begins with.{near} {has}. Name one of its tokens, or null for none (of "
                f"training: --data.tokenizer_options.{option} null)."
            )
        return found

    @property
    def changes_later(self) -> bool:
        """Whether a further token may change the text of those before it, as where blanks before signs are removed."""
        return type(self._tokenizer.decoder).__name__ not in ("ByteLevel", "Metaspace")

    @property
    def options(self) -> dict[str, Any]:
        given = {} if self.template_file is None else {"template": self.template_file}
        return {"path": self.path, "bos": self.bos, "eos": self.eos, **given}

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        return {"tokenizer_json": digest, "bos": self.bos_id, "eos": self.eos_id}

    def encode_counted(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if self._words is not None:
            return self._words(text)
        ids, ends = self._encoded(text)
        return ids, byte_counts(text, ends)

    def _encoded(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids by the library, and the characters behind which each token ends, `(length,)` int64."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"The tokenizer {self.path} cannot take the text {shown(text)}: {error}. Its vocabulary lacks what "
                f"stands for unknown text; add that token to it, or give another file."
            ) from error
        ids = np.asarray(encoding.ids, dtype=self.dtype)
        # a token ends where it or an earlier one does, the last one where the text does
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], dtype=np.int64))
        ends[-1:] = len(text)
        return ids, ends

    def decode(self, ids: np.ndarray) -> str:
        """The text of `(length,)` ids, special tokens left out."""
        text: str = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)
        return text

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template beside the file, if there is one. Raises DataError if it is damaged."""
        given = None if self.template_file is None else located(self.template_file).expanduser()
        return ChatTemplate.beside(Path(self.path).expanduser(), given)

    @property
    def chats(self) -> bool:
        return self.template is not None

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, frozenset[int]]:
        """See `Tokenizer.chat`. An answer ends with eos, or with the special token that the template puts behind it."""
        if self.template is None:
            return super().chat(messages)
        said = check_messages(messages)
        self.template.check_roles([one["role"] for one in said])
        ids, _ = self.encode_counted(self.template.render(said))
        return ids, self._ends_of_answers

    @functools.cached_property
    def _ends_of_answers(self) -> frozenset[int]:
        found = set() if self.eos_id is None else {self.eos_id}
        if self.template is not None and (behind := self.template.after_an_answer()):
            first = int(self.encode_counted(behind)[0][0])
            if first in self.special_ids:
                found.add(first)
        return frozenset(found)

    def save_files(self, folder: Path) -> dict[str, Any]:
        self._tokenizer.save(str(folder / self.FILE))
        self._copy_companions(folder)
        return {"path": self.FILE, "bos": self.bos, "eos": self.eos}

    def _copy_companions(self, folder: Path) -> None:
        for name in self.COMPANIONS:
            source = Path(self.path).expanduser().parent / name
            if source.is_file():
                YAML_BYTES.check(source.stat().st_size, str(source))
                shutil.copyfile(source, folder / name)
        if self.template_file is not None and self.template is not None:
            (folder / TEMPLATE).write_text(self.template.source, encoding="utf-8")

    @classmethod
    def from_folder(cls, source: Path) -> HFTokenizer:
        """The tokenizer of a published model, from its folder or its tokenizer.json, with the marks that its files
        name: eos, and bos if the tokenizer puts it before a text.

        Raises DataError if there is no tokenizer.json or it is damaged, UserError for another damaged file.
        """
        path = source / cls.FILE if source.is_dir() else source
        made = cls(str(path))
        named = [read_json(file) for file in (path.parent / name for name in cls.COMPANIONS[:2]) if file.is_file()]
        marks = {mark: next((t for one in named if (t := _token(one.get(f"{mark}_token")))), None) for mark in _MARKS}
        bos = made.before_a_text()
        if bos is None and any(one.get("add_bos_token") is True for one in named):
            bos = marks["bos"]
        known = made._tokenizer.token_to_id
        return cls(str(path), *(t if t is not None and known(t) is not None else None for t in (bos, marks["eos"])))

    def before_a_text(self) -> str | None:
        """The token that the file itself puts before a text, None for none."""
        try:
            whole, bare = (self._tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
        except Exception:  # the library raises nothing narrower; a vocabulary may lack the letter
            return None
        first: str | None = None
        if len(whole) > len(bare) and whole[: len(bare)] != bare:
            first = self._tokenizer.id_to_token(whole[0])
        return first

    def save_for_transformers(self, folder: Path) -> dict[str, int]:
        made = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        if self.before_a_text() != self.bos:
            post: Any = tokenizers.processors.ByteLevel(trim_offsets=False)
            if self.bos is not None:
                post = tokenizers.processors.TemplateProcessing(
                    single=f"{self.bos}:0 $A:0", special_tokens=[(self.bos, self.bos_id)]
                )
            made.post_processor = post
        self._copy_companions(folder)
        return _write_for_transformers(folder, made, {"bos": self.bos, "eos": self.eos})

    @classmethod
    def load_files(cls, folder: Path, options: dict[str, Any]) -> HFTokenizer:
        name = options.get("path")
        if not isinstance(name, str) or Path(name).name != name:
            card = folder / "model.json"
            raise DataError(f"{card}: tokenizer.options.path must be a file beside it, not {shown(name)}.")
        return cls(**{**options, "path": str(folder / name)})


_MARKS = ("bos", "eos")


def _token(written: Any) -> str | None:
    """A token in a tokenizer_config.json: its text, or an object with it as `content`."""
    text = written.get("content") if isinstance(written, dict) else written
    return text if isinstance(text, str) and text else None


def _write_for_transformers(
    folder: Path, tokenizer: tokenizers.Tokenizer, marks: dict[str, str | None]
) -> dict[str, int]:
    """Write tokenizer.json, and tokenizer_config.json unless it is there. marks: the tokens bos and eos."""
    tokenizer.save(str(folder / HFTokenizer.FILE))
    named = {f"{mark}_token": token for mark, token in marks.items() if token is not None}
    config = folder / HFTokenizer.COMPANIONS[0]
    if not config.is_file():
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
        config.write_text(json_text(told, indent=2) + "\n", encoding="utf-8")
    known = {mark: tokenizer.token_to_id(token) for mark, token in marks.items() if token is not None}
    return {mark: number for mark, number in known.items() if number is not None}


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # too long; the home of a user that there is not
        return False


def _check_ids(path: Path) -> None:
    """Raise DataError for a tokenizer.json with ids that no model has: the library takes memory for all up to the
    largest, and ends the process where there is none."""
    remedy = "Give the file that `tokenizers` saves."
    if path.stat().st_size > 2**30:
        raise DataError(f"{path} is larger than 1 GiB, which no tokenizer.json is. {remedy}")
    try:
        large = max((int(found[1][:20]) for found in _LARGE.finditer(path.read_bytes())), default=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    TOKEN_IDS.check(large, f"{path}, by an id of its vocabulary,")


def make_tokenizer(name: str, options: dict[str, Any] | None) -> TextTokenizer:
    """The tokenizer of a registered name (`text/bytes`) or import path.

    Raises ConfigError when it does not exist, does not take the options, or cannot say which bytes a token
    stands for.
    """
    kind, options = catalog()["tokenizers"].get(name), options or {}
    with under_key("data.tokenizer_options", options, kind=ConfigError):
        if kind is ByteTokenizer and "template" in options:
            raise ConfigError(
                f"data.tokenizer_options: the tokenizer {shown(name)} writes no chats, so it takes no template. "
                "They need --data.tokenizer text/hf with a tokenizer.json; of a run of bytes it is written by "
                "`mambaseq export --checkpoint RUN --format transformers --out FOLDER`: give "
                "--data.tokenizer_options.path FOLDER/tokenizer.json."
            )
        check_options("tokenizer", name, kind, options, 0)
    tokenizer = kind(**options)
    if not isinstance(tokenizer, TextTokenizer):
        raise ConfigError(
            f"{shown(name)} is no tokenizer of text; text needs a mambaseq_text.tokenization.TextTokenizer."
        )
    return tokenizer
