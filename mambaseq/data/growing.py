"""Token stores that take long to make: they grow part by part, and what is there stays when the process is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mambaseq.atomic import install, json_text, sync, sync_folder, write_failed
from mambaseq.data.cache import Unchanged
from mambaseq.data.store import FORMAT, TOKENS, StoreError, TokenStore, check_ids, no_tokens, write_index
from mambaseq.errors import DataError, UserError
from mambaseq.resources import cache_dir, make_private

_JOURNAL = "journal.jsonl"
_FORM = 2  # of the journal, and of places in it
_FORGOTTEN = 30 * 24 * 3600  # seconds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Part:
    """What is added to a store at once.

    records: name and tokens of each; the name None continues the record before.
    place: plain values from which reading goes on behind it. found: plain values that are kept with the store.
    """

    records: list[tuple[str | None, np.ndarray]]
    place: Any
    found: list[Any] = dataclasses.field(default_factory=list)


Parts = Callable[[Any], Iterator[Part]]
"""The parts from a place on; None is the beginning. Cut in the same way whenever they are made."""


def grown(
    label: str,
    parts: Parts,
    dtype: str,
    meta: dict[str, Any],
    *,
    unchanged: Unchanged | None = None,
    cache: str | Path | None = None,
) -> TokenStore:
    """The store of these sources and options in the cache folder: as `TokenStore.cached`, but made part by part in a
    folder beside it. A part is there once its tokens are on disk and its line is in the journal, with a checksum; a
    process that is killed leaves whole parts, and the next call goes on behind them.

    unchanged: the files that are read. Parts are kept only while none of them changes, and a call goes on with those
        of another only if sizes and times of change are the same still.

    Several processes may call this at once: one makes the store, the others wait for it.
    Raises DataError when there are no tokens, an id does not fit the dtype, or a file changes; UserError when the disk
    is full.
    """
    stores = cache_dir(cache) / "stores"
    key = hashlib.sha256(json_text([FORMAT, dtype, meta], sort_keys=True).encode()).hexdigest()[:20]
    place = stores / f"{label[:40]}-{key}"
    if (there := _opened(place, dtype, meta)) is not None:
        return there
    import filelock

    try:
        make_private(stores)
        _remove_forgotten(stores)
        with filelock.FileLock(stores / f".{place.name}.lock"):
            if (there := _opened(place, dtype, meta, warn=True)) is not None:
                return there  # another process was first
            growth = _Growth(place.with_name(f"{place.name}.growing"), dtype, meta, unchanged)
            with contextlib.closing(growth):
                for part in parts(growth.place):
                    growth.add(part)
                growth.finish(place)
    except UserError:
        raise
    except OSError as error:
        if write_failed(place, error) is None:
            raise
        raise UserError(
            f"{place} cannot be written: {error.strerror or error}. What is done so far is kept, and the next run goes "
            "on from there. Free some space, or set the variable MAMBASEQ_CACHE to a folder on another disk."
        ) from error
    return TokenStore(place, check=False)


def _opened(place: Path, dtype: str, meta: dict[str, Any], warn: bool = False) -> TokenStore | None:
    if not os.path.lexists(place):
        return None
    try:
        found = TokenStore(place)
        if [found.dtype, found.meta] != [np.dtype(dtype), json.loads(json_text(meta))]:
            raise StoreError(f"{place} describes other tokens than those of its name.")
        return found
    except StoreError as error:
        if warn:
            logger.warning("%s It is rebuilt.", error)
        return None


def _remove_forgotten(stores: Path) -> None:
    """Remove what killed processes left and nobody went on with for a month."""
    for folder in stores.glob("*.growing"):
        with contextlib.suppress(OSError):
            if time.time() - max(entry.stat().st_mtime for entry in [folder, *folder.iterdir()]) > _FORGOTTEN:
                shutil.rmtree(folder, ignore_errors=True)


class _Growth:
    """A folder with the parts so far. place: where reading goes on. unchanged: the files that are read."""

    def __init__(self, folder: Path, dtype: str, meta: dict[str, Any], unchanged: Unchanged | None = None) -> None:
        self.folder, self.dtype, self.meta, self.unchanged = folder, np.dtype(dtype), meta, unchanged
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.found: list[Any] = []
        self.place: Any = None
        self._size = 0  # tokens
        folder.mkdir(exist_ok=True)
        whole = self._recall()
        self._journal = (folder / _JOURNAL).open("r+b" if whole else "wb")
        self._journal.truncate(whole)
        self._journal.seek(whole)
        if not whole:
            self._journal.write(_sealed(self._head()))
        self._tokens = (folder / TOKENS).open("r+b" if self._size else "wb")
        self._tokens.truncate(self._size * self.dtype.itemsize)
        self._tokens.seek(0, os.SEEK_END)
        if self._size:
            logger.warning("Goes on behind %s tokens that were made before.", f"{self._size:,}")

    def _head(self) -> Any:
        """What the journal begins with: its form, and the files as they are read."""
        return [_FORM, None if self.unchanged is None else self.unchanged.seen()]

    def _recall(self) -> int:
        """Read the journal; returns how many of its bytes are of whole parts, 0 if those are of no use."""
        whole = 0
        with contextlib.suppress(OSError):
            there = (self.folder / TOKENS).stat().st_size // self.dtype.itemsize
            for line in (self.folder / _JOURNAL).read_bytes().splitlines(keepends=True):
                seal, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or seal.decode("latin-1") != xxhash.xxh3_64_hexdigest(text):
                    break
                if not whole:
                    if json.loads(text) != self._head():
                        break
                    whole = len(line)
                    continue
                names, lengths, place, found = json.loads(text)
                if self._size + sum(lengths) > there:
                    break
                self._take(names, lengths, found)
                self.place = place
                whole += len(line)
        return whole

    def _take(self, names: list[str | None], lengths: list[int], found: list[Any]) -> None:
        for name, length in zip(names, lengths, strict=True):
            if name is None:
                self.lengths[-1] += length
            else:
                self.names.append(name)
                self.lengths.append(length)
        self.found += found
        self._size += sum(lengths)

    def add(self, part: Part) -> None:
        """Put a part on disk, then into the journal. Raises DataError if a file has changed."""
        names: list[str | None] = []
        lengths: list[int] = []
        told = self.names[-1] if self.names else ""
        for name, tokens in part.records:
            if name is not None or not names:
                names.append(name)
                lengths.append(0)
            lengths[-1] += len(tokens)
            told = name or told
            self._tokens.write(check_ids(told, tokens, self.dtype).data)
        _sync(self._tokens)
        self._check()
        self._journal.write(_sealed([names, lengths, part.place, part.found]))
        _sync(self._journal)
        self._take(names, lengths, part.found)
        self.place = part.place

    def _check(self) -> None:
        """Raise DataError if a file has changed since, and forget all parts, which may be of other contents."""
        try:
            if self.unchanged is not None:
                self.unchanged.check()
        except DataError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def finish(self, place: Path) -> None:
        """Make it the store at `place`. Raises DataError if a file has changed."""
        self._check()
        if not self._size:
            raise no_tokens(self.meta, place, self.found)
        self.close()
        write_index(self.folder, str(self.dtype), self.meta, self.names, self.lengths, self.found)
        sync_folder(self.folder)
        install(self.folder, place, replace=True)
        sync(place.parent)
        (place / _JOURNAL).unlink(missing_ok=True)  # until here, a killed process goes on from it

    def close(self) -> None:
        self._tokens.close()
        self._journal.close()


def _sealed(values: Any) -> bytes:
    """A line of the journal: plain values behind their checksum."""
    text = json_text(values).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
