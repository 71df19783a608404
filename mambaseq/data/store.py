"""Tokens on disk, memory-mapped: built once from the source files, shared by all processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.atomic import atomic_folder
from mambaseq.errors import DataError
from mambaseq.resources import cache_dir

FORMAT = 1
TOKENS, INDEX = "tokens.bin", "index.json"
DTYPES = ("uint8", "uint16", "uint32")
_BLOCK, _BLOCKS = 1 << 16, 64

logger = logging.getLogger(__name__)

Records = Iterable[tuple[str, np.ndarray | Iterable[np.ndarray]]]


class StoreError(DataError):
    """A token store is missing, cut short, damaged, or of another version of the format."""


def smallest_dtype(vocab_size: int) -> str:
    """The smallest of the unsigned types that holds ids in `[0, vocab_size)`."""
    return next(name for name in DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))


def _digest(path: Path) -> str:
    """sha256 over 64 blocks of 64 KiB spread evenly from the first to the last: all of a file of up to 4 MiB,
    and for a larger one enough to see a lost or zeroed stretch without reading gigabytes at every start."""
    size = path.stat().st_size
    n_blocks = -(-size // _BLOCK)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in np.unique(np.linspace(0, max(n_blocks - 1, 0), _BLOCKS).astype(np.int64)):
            file.seek(int(block) * _BLOCK)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


class TokenStore:
    """Records of tokens in one memory-mapped file; `store[i]` is record i, `(length,)`, read from disk when
    touched.

    folder: holds `tokens.bin` (the records end to end) and `index.json` (names, starts, lengths, dtype,
        meta).
    names, starts, lengths: of the records, in file order. meta: what the store was built from.
    A store pickles as its path, so loader workers map the same file.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        """Open a store. Raises StoreError when it is missing, cut short or damaged."""
        self.folder = Path(folder)
        remedy = "Delete the folder; it is rebuilt from its source."
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise StoreError(f"The token store {self.folder} has format {index['format']}, not {FORMAT}. {remedy}")
            self.dtype = np.dtype(index["dtype"])
            self.names: list[str] = index["records"]["name"]
            self.starts = np.asarray(index["records"]["start"], dtype=np.int64)
            self.lengths = np.asarray(index["records"]["length"], dtype=np.int64)
            self.meta: dict[str, Any] = index["meta"]
            size = (self.folder / TOKENS).stat().st_size
            expected = int(self.lengths.sum()) * self.dtype.itemsize
            if size != expected:
                raise StoreError(f"{self.folder / TOKENS} has {size} bytes and should have {expected}. {remedy}")
            if check and _digest(self.folder / TOKENS) != index["digest"]:
                raise StoreError(f"{self.folder / TOKENS} is damaged: its checksum differs. {remedy}")
            self._tokens = np.memmap(self.folder / TOKENS, dtype=self.dtype, mode="r")
        except FileNotFoundError as error:
            raise StoreError(f"There is no token store at {self.folder} ({error.filename} is missing).") from error
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"The index of the token store {self.folder} cannot be read: {error}. {remedy}") from error

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, record: int) -> np.ndarray:
        start = self.starts[record]
        return self._tokens[start : start + self.lengths[record]]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], check=False)  # type: ignore[misc]

    @classmethod
    def build(
        cls, folder: str | Path, records: Records, dtype: str, meta: dict[str, Any], *, replace: bool = True
    ) -> TokenStore:
        """Write a store and open it. Records are streamed: at no time is more than one of them (or one chunk)
        held.

        records: `(name, tokens)`; tokens is an array, or an iterable of arrays for records too long for
        memory.
        dtype: uint8, uint16 or uint32. meta: plain values that say what it was built from.
        replace: whether an existing folder gives way; False raises FileExistsError.
        Raises DataError when there are no tokens, or when an id does not fit the dtype; UserError when the
        disk is full.
        """
        folder = Path(folder)
        limit = np.iinfo(dtype).max
        names: list[str] = []
        lengths: list[int] = []
        with atomic_folder(folder, replace=replace) as temporary:
            with (temporary / TOKENS).open("wb") as file:
                for name, tokens in records:
                    length = 0
                    for chunk in [tokens] if isinstance(tokens, np.ndarray) else tokens:
                        if chunk.size and not 0 <= int(chunk.min()) <= int(chunk.max()) <= limit:
                            raise DataError(
                                f"Record {name!r} has token ids outside of [0, {limit}], which {dtype} holds."
                            )
                        file.write(np.ascontiguousarray(chunk, dtype=dtype).data)
                        length += len(chunk)
                    names.append(name)
                    lengths.append(length)
            if not sum(lengths):
                raise DataError(
                    f"There are no tokens to store in {folder}: the source has no records, or only empty ones."
                )
            starts = np.cumsum([0, *lengths[:-1]]).tolist()
            index = {
                "format": FORMAT,
                "dtype": dtype,
                "digest": _digest(temporary / TOKENS),
                "meta": meta,
                "records": {"name": names, "start": starts, "length": lengths},
            }
            (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        return cls(folder, check=False)

    @classmethod
    def cached(
        cls,
        label: str,
        records: Callable[[], Records],
        dtype: str,
        meta: dict[str, Any],
        *,
        cache: str | Path | None = None,
    ) -> TokenStore:
        """The store of these sources and options in the cache folder, built when it is not there or damaged.

        label: a readable part of the folder's name. records: makes the records, called only to build.
        meta: everything that the tokens depend on (see `cache.fingerprint`); another meta is another folder.
        Any number of processes may ask at once: each builds a copy of its own, the first to finish wins.
        """
        key = hashlib.sha256(json.dumps([FORMAT, dtype, meta], sort_keys=True).encode()).hexdigest()[:20]
        folder = cache_dir(cache) / "stores" / f"{label}-{key}"
        for _ in range(3):  # a folder that another process found damaged may vanish between two looks at it
            try:
                return cls(folder)
            except StoreError as error:
                damaged = folder.exists()
                if damaged:
                    logger.warning("%s It is rebuilt.", error)
            try:
                return cls.build(folder, records(), dtype, meta, replace=damaged)
            except (FileExistsError, StoreError):
                continue
        return cls(folder)
