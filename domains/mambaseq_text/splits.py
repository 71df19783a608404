"""Splits files and documents into training, validation and test sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseq.data.addresses import is_address
from mambaseq.data.cache import Unchanged
from mambaseq.errors import ConfigError, DataError
from mambaseq_text.opening import checksum, source
from mambaseq_text.reading import text_files

SPLITS = ("train", "validation", "test")
KEYS = ("data.files", "data.validation_files", "data.test_files")
Names = str | Sequence[str] | None


def split_files(
    train: Names, validation: Names, test: Names, *, streaming: bool = False
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]], Unchanged]:
    """Files of each split, and the identity of each file (see `opening.source`); and the files that are read whole
    as they were before that.

    streaming: training files are not read for this.
    Raises DataError if a file is missing or in two splits (also as a copy with another name), ConfigError for an
    address that contains a secret.
    """
    files = {
        split: text_files(names, key) if names else []
        for split, key, names in zip(SPLITS, KEYS, (train, validation, test), strict=True)
    }
    whole = [split for split in SPLITS if not (streaming and split == "train")]
    local = [name for split in whole for name in files[split] if not is_address(name)]
    unchanged = Unchanged(map(Path, local))
    sources: dict[str, dict[str, Any]] = {}
    seen: dict[str, tuple[str, str]] = {}
    for split, members in files.items():
        for name in members:
            sources[name] = source(name, hashed=not (streaming and split == "train"))
            other, earlier = seen.setdefault(sources[name].get("sha256", name), (split, name))
            if other != split:
                raise DataError(
                    f"{name} ({split}) is {'' if name == earlier else f'a copy of {earlier}, which is '}in {other} "
                    "too. Give each file to only one split."
                )
    return files, sources, unchanged


def checksums(files: Mapping[str, Sequence[str]], sources: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The checksum of each file whose contents are known."""
    names = [name for members in files.values() for name in members]
    return {name: found for name in names if (found := checksum(sources[name]))}


def check_fractions(validation: float, test: float) -> None:
    """Raise ConfigError unless both are shares that leave some data for training."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(
            f"data.validation_fraction ({validation}) and data.test_fraction ({test}) are shares of the "
            f"data; together they must leave some of it for training."
        )


def split_of_text(text: str, fractions: Mapping[str, float]) -> str:
    """The split of a document, by its contents: copies stay together (with any line ends), and adding documents moves
    none.

    fractions: shares of `"validation"` and `"test"`.
    """
    said = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    digest = hashlib.blake2b(said.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < fractions["test"]:
        return "test"
    return "validation" if place < fractions["test"] + fractions["validation"] else "train"
