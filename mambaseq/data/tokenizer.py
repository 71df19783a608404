"""What every tokenizer or codec offers."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np


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

    def save_files(self, folder: Path) -> dict[str, Any]:
        """Write the files that the tokenizer needs into a model's folder; return the options that read them there
        (paths relative to that folder). Most tokenizers need none."""
        return self.options

    @classmethod
    def load_files(cls, folder: Path, options: dict[str, Any]) -> Tokenizer:
        """The tokenizer that `save_files` wrote."""
        return cls(**options)
