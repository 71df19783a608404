"""The base of tokenizers and codecs."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.errors import ConfigError, DataError, shown


class Tokenizer(abc.ABC):
    """Raw units (a string of bases, text, a waveform) to token ids and back.

    vocab_size: ids are in `[0, vocab_size)`.
    options: the keyword arguments that make an equal tokenizer; they are saved with a model, so they must be
        plain values (str, int, float, bool, list, dict).
    """

    vocab_size: int

    @property
    @abc.abstractmethod
    def options(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def encode(self, raw: Any) -> np.ndarray:
        """Ids of one raw sequence: `(length,)`, the smallest unsigned dtype that holds the vocabulary."""

    @abc.abstractmethod
    def decode(self, ids: np.ndarray) -> Any:
        """The raw sequence of `(length,)` ids."""

    def continued(self, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What generation reads, and what it is to add, so that a sequence grows by `count` units: from ids that
        `encode` gave, or a dataset's `start_ids`, the prompt `(length, ...)` int64, and what is added, negative where
        it is drawn, or None for `count` tokens that are all drawn."""
        return ids, None

    @property
    def chats(self) -> bool:
        """Whether it writes conversations: there is a chat template."""
        return False

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, frozenset[int]]:
        """The prompt `(length,)` that an answer to a conversation follows, and the ids that end one.

        messages: `{"role": ..., "content": ...}` each. Raises ConfigError where there is no template, as here, and
        UserError for messages that it refuses.
        """
        raise ConfigError(
            "The model's tokenizer has no chat template, so it answers no messages. Write the prompt yourself and ask "
            "for its completion (/v1/completions); or tune it on conversations (the data set text/chats), whose "
            "template it then keeps."
        )

    def save_files(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer's files into a model's folder. Returns the options that read them there (paths relative
        to that folder). Most tokenizers have no files."""
        return self.options

    def save_for_transformers(self, folder: Path) -> dict[str, int] | None:
        """Write it as transformers reads it (tokenizer.json). Returns the ids of the tokens bos and eos that it has, or
        None where there is no such form, as here."""
        return None

    @classmethod
    def load_files(cls, folder: Path, options: dict[str, Any]) -> Tokenizer:
        """The tokenizer that `save_files` wrote."""
        return cls(**options)


class Alphabet(Tokenizer):
    """One id a letter of an alphabet: residues, secondary structure, notes.

    Args:
        letters: of ids 0, 1, ...; each once.
        other: the one of them that stands for all letters that are none; without it those are refused.
        fold: whether lower and upper case are one; the letters must then be upper case.
    """

    def __init__(self, letters: str, other: str = "", fold: bool = False) -> None:
        wrong = letters != letters.upper() if fold else False
        if not letters or len(set(letters)) < len(letters) or len(letters) > 2**16 or wrong:
            raise ConfigError(f"An alphabet has different letters, upper case where it folds, not {shown(letters)}.")
        if other and other not in tuple(letters):
            raise ConfigError(f"other is {shown(other)}, which is no letter of the alphabet {shown(letters)}.")
        self.letters, self.other, self.fold = letters, other, fold
        self.vocab_size = len(letters)
        self._ids = {letter: number for number, letter in enumerate(letters)}

    @property
    def options(self) -> dict[str, Any]:
        return {"letters": self.letters, "other": self.other, "fold": self.fold}

    def encode(self, raw: str) -> np.ndarray:
        """Raises DataError that names a letter that is none, and where it stands."""
        raw = raw.upper() if self.fold else raw
        ids = [self._ids.get(letter, -1) for letter in raw]
        if -1 in ids and not self.other:
            at = ids.index(-1)
            raise DataError(
                f"The letter {shown(raw[at])} at position {at + 1} is none of {shown(self.letters)}. Remove it, or "
                f"replace it."
            )
        dtype = np.uint8 if self.vocab_size <= 256 else np.uint16
        return np.array([self._ids[self.other] if number < 0 else number for number in ids], dtype=dtype)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.letters[number] for number in ids.tolist())
