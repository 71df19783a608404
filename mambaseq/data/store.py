"""Tokens on disk, memory-mapped: built once from the source files, shared by all processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mambaseq.atomic import atomic_file, atomic_folder, json_text
from mambaseq.errors import DataError, UserError, cut_list, shown
from mambaseq.resources import cache_dir, make_private

FORMAT = 2
TOKENS, NAMES, LENGTHS, CHECKSUMS, INDEX = "tokens.bin", "names.json", "lengths.bin", "checksums.bin", "index.json"
FOUND = "found.json"
DTYPES = ("uint8", "uint16", "uint32")
_WRITTEN_AT_ONCE = 1 << 19  # below what readers give at once, which is then not copied
_READ_AT_ONCE = 1 << 24  # tokens
_LONG = 1 << 20  # tokens of a record whose checksums are worth a thread
_WORKERS = 4

logger = logging.getLogger(__name__)

Records = Iterable[tuple[str | None, np.ndarray | Iterable[np.ndarray]]]
"""(name, tokens) of records in order. tokens is an array, or an iterable of arrays, that must not change afterwards.
The name None continues the record before."""

Checksums = Callable[[np.ndarray], tuple[int, int]]
"""Tokens of a record → two checksums below 2^64: of the record, and of its other strand."""


class StoreError(DataError):
    """A token store is missing, cut short, damaged, or has another format version."""


def smallest_dtype(vocab_size: int) -> str:
    """The smallest unsigned type for ids in `[0, vocab_size)`."""
    return next(name for name in DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))


def content_checksums(tokens: np.ndarray) -> tuple[int, int]:
    """The checksum of tokens, `(length,)`, without another strand, twice."""
    found = xxhash.xxh3_64_intdigest(tokens.data)
    return found, found


class _OfRecords:
    """Checksums of records, long ones on threads while others are still read.

    tokens: gives those of the file from start to stop.
    """

    def __init__(self, checksums: Checksums, tokens: Callable[[int, int], np.ndarray]) -> None:
        self._checksums, self._tokens = checksums, tokens
        self._threads = ThreadPoolExecutor(_WORKERS, "token-store-checksums")
        self._long: dict[int, Future[tuple[int, int]]] = {}

    def begin(self, record: int, start: int, stop: int) -> None:
        """Of a long record, whose tokens are in the file."""
        self._long[record] = self._threads.submit(lambda: self._checksums(self._tokens(start, stop)))

    def all(self, lengths: np.ndarray) -> np.ndarray:
        """Those of all records, end to end, `(records, 2)` uint64."""
        found = np.empty((len(lengths), 2), dtype="<u8")
        tokens = self._tokens(0, int(lengths.sum()))
        start = 0
        for record, stop in enumerate(np.cumsum(lengths).tolist()):
            if record not in self._long:
                found[record] = self._checksums(tokens[start:stop])
            start = stop
        for record, pair in self._long.items():
            found[record] = pair.result()
        return found

    def close(self) -> None:
        """Stop, also in the middle."""
        self._threads.shutdown(cancel_futures=True)


def check_ids(name: str, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Tokens of a record as they are written. Raises DataError for ids outside of the range of the dtype."""
    if tokens.dtype == dtype and tokens.flags.c_contiguous:
        return tokens
    limit = np.iinfo(dtype).max
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= limit:
        raise DataError(f"Record {shown(name)} has token ids outside [0, {limit}], the range of {dtype}.")
    return np.ascontiguousarray(tokens, dtype=dtype)


def no_tokens(meta: dict[str, Any], place: Path, found: Sequence[Any] = ()) -> DataError:
    """The error of a store that would be empty. found: see `TokenStore`."""
    sources = [source.get("name") for source in meta.get("sources", []) if isinstance(source, dict)]
    return DataError(
        f"There are no tokens in {cut_list(sources) if sources else 'the source'}, which has no records, or only empty "
        f"ones; nothing is stored in {place}. Give files with contents."
        + (f" {len(found):,} rows were left out, the first is {shown(found[0], 200)}." if found else "")
    )


def write_index(
    folder: Path, dtype: str, meta: dict[str, Any], names: list[str], lengths: list[int], found: list[Any]
) -> None:
    """Make a store of a folder with tokens: read them once, and write what describes them. found: see `TokenStore`."""
    whole, size = xxhash.xxh3_64(), sum(lengths)
    tokens = np.memmap(folder / TOKENS, dtype, "r", shape=(size,))
    for start in range(0, size, _READ_AT_ONCE):
        whole.update(tokens[start : start + _READ_AT_ONCE].data)
    written = np.array(lengths, dtype="<i8")
    checksums = np.empty((len(written), 2), dtype="<u8")
    for record, stop in enumerate(np.cumsum(written).tolist()):
        checksums[record] = content_checksums(tokens[stop - lengths[record] : stop])
    _describe(folder, dtype, meta, names, written, checksums, [tokens.nbytes, whole.hexdigest()], found)


def _describe(
    folder: Path,
    dtype: str,
    meta: dict[str, Any],
    names: list[str],
    lengths: np.ndarray,
    checksums: np.ndarray,
    tokens: list[Any],
    found: list[Any],
) -> None:
    """Write what describes the tokens. tokens: the size of their file and its checksum."""
    parts = {
        NAMES: json.dumps(names, allow_nan=False).encode(),
        LENGTHS: lengths.tobytes(),
        CHECKSUMS: checksums.tobytes(),
    }
    if found:
        parts[FOUND] = json_text(found).encode()
    files = {TOKENS: tokens}
    for name, data in parts.items():
        (folder / name).write_bytes(data)
        files[name] = [len(data), xxhash.xxh3_64_hexdigest(data)]
    index = json.loads(json_text({"format": FORMAT, "dtype": dtype, "meta": meta, "files": files}))
    (folder / INDEX).write_text(json_text(index | {"checksum": _seal(index)}), encoding="utf-8")


def _seal(index: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json_text(index, sort_keys=True).encode())


class _Tokens:
    """Writes tokens to a file, many small records at once, and keeps the checksum of the written bytes.

    Not on a thread: what reads records seldom lets go of the interpreter, so that handing them over would take longer
    than writing them.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._file = path, path.open("wb", buffering=_WRITTEN_AT_ONCE)
        self._dtype = np.dtype(dtype)
        self._thread = ThreadPoolExecutor(1, "token-store")
        self.checksum = xxhash.xxh3_64()

    def write(self, name: str, tokens: np.ndarray) -> None:
        """Append tokens of a record. name: for messages."""
        tokens = check_ids(name, tokens, self._dtype)
        self._file.write(tokens.data)
        self.checksum.update(tokens.data)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens that have been written, as an array in the file."""
        if stop <= start:
            return np.empty(0, dtype=self._dtype)
        return np.asarray(np.memmap(self._path, self._dtype, "r", shape=(stop,)))[start:]

    def flush(self) -> None:
        """Make what has been written readable."""
        self._file.flush()

    def to_disk(self) -> Future[None]:
        """Begin to wait for the disk, which takes as long as it takes."""
        self._file.flush()
        return self._thread.submit(os.fsync, self._file.fileno())

    def close(self) -> None:
        """Stop, also in the middle."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()


class TokenStore:
    """Records of tokens in one memory-mapped file. `store[i]` is record i, `(length,)`, read from disk when used.

    folder: holds `tokens.bin` (the records end to end), `names.json`, `lengths.bin` (int64), `checksums.bin` (uint64,
        two for each record) and `index.json` (dtype, meta, size and checksum of each of the files and of itself); and
        what was found out about the tokens (`kept`).
    names, starts, lengths: of the records, in file order. meta: what the store was built from.
    found: plain values about what was read and is in no record (see `growing.Part`).
    tokens: all records end to end, `(tokens,)`. checksums: `(records, 2)` uint64, see `Checksums`. A store pickles as
        its path, so loader workers map the same file.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        """Open a store. Raises StoreError if it is missing, cut short or damaged.

        check: read all tokens once and compare their checksum; the files that describe them are always checked.
        """
        self.folder = Path(folder)
        remedy = "Delete the folder; it is rebuilt from its source."
        try:
            index = json.loads(self._read(INDEX))
            if index["format"] != FORMAT:
                raise StoreError(f"The token store {self.folder} has format {index['format']}, not {FORMAT}. {remedy}")
            if index.pop("checksum") != _seal(index):
                raise StoreError(f"{self.folder / INDEX} is damaged: its checksum differs. {remedy}")
            self.dtype = np.dtype(index["dtype"])
            self.meta: dict[str, Any] = index["meta"]
            parts: dict[str, bytes] = {}
            self._checksum: str = index["files"][TOKENS][1]
            for name, (size, checksum) in index["files"].items():
                found = (self.folder / name).stat().st_size
                if found != size:
                    raise StoreError(f"{self.folder / name} has {found} bytes and should have {size}. {remedy}")
                if name != TOKENS:
                    parts[name] = self._read(name)
                    actual = xxhash.xxh3_64_hexdigest(parts[name])
                elif check:
                    actual = xxhash.xxh3_64_hexdigest(np.memmap(self.folder / TOKENS, dtype=np.uint8, mode="r").data)
                else:
                    continue
                if actual != checksum:
                    raise StoreError(f"{self.folder / name} is damaged: its checksum differs. {remedy}")
            self.names: list[str] = json.loads(parts[NAMES])
            self.found: list[Any] = json.loads(parts.get(FOUND, b"[]"))
            self.lengths = np.frombuffer(parts[LENGTHS], dtype="<i8")
            self.checksums = np.frombuffer(parts[CHECKSUMS], dtype="<u8").reshape(-1, 2)
            self.starts = np.cumsum(self.lengths) - self.lengths
            self.tokens = np.memmap(self.folder / TOKENS, dtype=self.dtype, mode="r")
            if not len(self.names) == len(self.lengths) == len(self.checksums):
                raise ValueError("names, lengths and checksums differ in number")
            if self.lengths.min() < 0 or int(self.lengths.sum()) != len(self.tokens):
                raise ValueError("lengths do not add up to the tokens")
        except FileNotFoundError as error:
            raise StoreError(f"There is no token store at {self.folder} ({error.filename} is missing).") from error
        except OSError as error:
            raise StoreError(f"The token store {self.folder} cannot be read: {error.strerror}. {remedy}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(f"The index of the token store {self.folder} cannot be read: {error}. {remedy}") from error

    def _read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, record: int) -> np.ndarray:
        start = self.starts[record]
        return self.tokens[start : start + self.lengths[record]]

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What follows from the tokens alone and takes a while to find, such as the places of gaps: int64 values, made
        once and kept beside the tokens, as far as that folder is writable.

        name: of what it is; another name when what `make` gives changes. Returns a flat array.
        """
        path = self.folder / f"{name}.kept"
        with contextlib.suppress(OSError, ValueError):
            data = path.read_bytes()
            if data[:16] == self._seal_of(name, data[16:]):
                return np.frombuffer(data, dtype="<i8", offset=16)
        found = np.ascontiguousarray(make(), dtype="<i8").reshape(-1)
        with contextlib.suppress(OSError, UserError), atomic_file(path, "wb") as file:
            file.write(self._seal_of(name, found.tobytes()) + found.tobytes())
        return found

    def _seal_of(self, name: str, data: bytes) -> bytes:
        return xxhash.xxh3_128_digest(f"{self._checksum} {name} ".encode() + data)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], check=False)  # type: ignore[misc]

    @classmethod
    def build(
        cls,
        folder: str | Path,
        records: Records,
        dtype: str,
        meta: dict[str, Any],
        *,
        checksums: Checksums = content_checksums,
        replace: bool = True,
    ) -> TokenStore:
        """Write a store and open it. Records are streamed: at most one of them (or one chunk) is in memory.

        records: see `Records`. dtype: uint8, uint16 or uint32. meta: plain values that say what it was built from.
        checksums: computes those of a record.
        replace: replace an existing folder; False raises FileExistsError.
        Raises DataError when there are no tokens, or when an id does not fit the dtype; UserError when the disk is
        full.
        """
        return cls(
            cls._built(Path(folder), records, dtype, lambda: meta, lambda: Path(folder), checksums, replace),
            check=False,
        )

    @staticmethod
    def _built(
        folder: Path,
        records: Records,
        dtype: str,
        describe: Callable[[], dict[str, Any]],
        place: Callable[[], Path],
        checksums: Checksums,
        replace: bool,
    ) -> Path:
        """Write a store beside `folder`, put it at `place()`, and return that. describe, place: called when all records
        have been read."""
        names: list[str] = []
        lengths: list[int] = []
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_folder(folder, replace=replace, place=place))
            file = stack.enter_context(contextlib.closing(_Tokens(temporary / TOKENS, dtype)))
            of_records = stack.enter_context(contextlib.closing(_OfRecords(checksums, file.read)))
            start = 0

            def ended() -> None:
                """The last record so far is complete."""
                nonlocal start
                if lengths and lengths[-1] >= _LONG:
                    file.flush()
                    of_records.begin(len(lengths) - 1, start, start + lengths[-1])
                start += lengths[-1] if lengths else 0

            for name, tokens in records:
                if name is not None:
                    ended()
                    names.append(name)
                    lengths.append(0)
                for chunk in [tokens] if isinstance(tokens, np.ndarray) else tokens:
                    file.write(names[-1], chunk)
                    lengths[-1] += len(chunk)
            ended()
            on_disk = file.to_disk()
            meta = describe()
            if not sum(lengths):
                raise no_tokens(meta, place())
            written = np.array(lengths, dtype="<i8")
            checksum = [start * np.dtype(dtype).itemsize, file.checksum.hexdigest()]
            _describe(temporary, dtype, meta, names, written, of_records.all(written), checksum, [])
            on_disk.result()
        return place()

    @classmethod
    def cached(
        cls,
        label: str,
        records: Callable[[], Records],
        dtype: str,
        meta: dict[str, Any] | Future[dict[str, Any]],
        *,
        checksums: Checksums = content_checksums,
        unchanged: Callable[[], None] | None = None,
        cache: str | Path | None = None,
    ) -> TokenStore:
        """The store of these sources and options in the cache folder, built if it is missing or damaged.

        label: a readable part of the folder's name. records: makes the records, called only to build.
        meta: everything that the tokens depend on (see `cache.fingerprint`); a different meta gives a different folder.
            While another thread still computes it, the store is built, and left if it turns out to be there.
        unchanged: called when all records have been read; raises if the sources are no longer those that meta
            describes (see `cache.Unchanged`).

        Any number of processes may call this at once: each builds its own copy, and the first to finish wins.
        """
        stores = cache_dir(cache) / "stores"

        def described() -> dict[str, Any]:
            return meta.result() if isinstance(meta, Future) else meta

        @functools.cache
        def place() -> Path:
            key = hashlib.sha256(json_text([FORMAT, dtype, described()], sort_keys=True).encode()).hexdigest()[:20]
            return stores / f"{label[:40]}-{key}"  # names have at most 255 bytes

        def of_one_state() -> Records:
            yield from records()
            if unchanged is not None:
                unchanged()

        def missing(meta: Future[dict[str, Any]]) -> Records:
            """The records, as long as it may be that there is no store of them."""
            checked = False
            for name, tokens in of_one_state():
                if not checked and meta.done():
                    checked = True
                    if os.path.lexists(place()):
                        raise FileExistsError
                yield name, tokens

        def build(folder: Path, found: Records, replace: bool) -> TokenStore:
            with contextlib.suppress(OSError):  # reported when the store is written
                make_private(stores)
            return cls(cls._built(folder, found, dtype, described, place, checksums, replace), check=False)

        if isinstance(meta, Future) and not meta.done():
            with contextlib.suppress(FileExistsError, StoreError):
                return build(stores / label[:40], missing(meta), replace=False)
        for _ in range(3):  # a folder that another process found damaged may vanish between two checks
            try:
                found = cls(place())
                if [found.dtype, found.meta] != [np.dtype(dtype), json.loads(json_text(described()))]:
                    raise StoreError(f"{place() / INDEX} describes other tokens than those of {label[:40]}.")
                return found
            except StoreError as error:
                damaged = os.path.lexists(place())
                if damaged:
                    logger.warning("%s It is rebuilt.", error)
            try:
                return build(place(), of_one_state(), replace=damaged)
            except (FileExistsError, StoreError):
                continue
        return cls(place())
