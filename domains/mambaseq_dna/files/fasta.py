"""Reads FASTA and 2bit, and writes FASTA, with one record in memory at a time."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xxhash
from tqdm import tqdm

from mambaseq.data.cache import Stopped, Unchanged, fingerprint
from mambaseq.data.records import Record, Refuse, raised
from mambaseq.data.store import TokenStore
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.outputs import output_file, writes
from mambaseq.resources import cores
from mambaseq_dna.files.parsing import Piece, fasta_pieces, usable
from mambaseq_dna.files.twobit import is_twobit, twobit_pieces
from mambaseq_dna.tokenizer import BaseTokenizer, N, complement, fold_case

Lowercase = Literal["fold", "keep", "unscored"]

_LINE = 80
_LETTERS = re.compile(r"[A-Za-z*.-]*")
_NO_LETTERS = (
    "FASTA holds sequences of letters, and the model's tokenizer gives something else. Use the model's own writer."
)
_ENDINGS = tuple(f"{ending}{packed}" for ending in (".fa", ".fasta", ".fna", ".fas") for packed in ("", ".gz"))
_SHORT, _CHUNK = 1 << 12, 1 << 20
_PART = 1 << 18  # what stays in a processor's cache
_WORTH_A_THREAD = 1 << 24
_FILES_AT_ONCE = 4
_SOON = 0.05  # seconds: small files and known ones have a checksum by then
_FOLD = bytes(fold_case(np.arange(256, dtype=np.uint8)))
_N = bytes([N])
_COMPLEMENT = bytes(complement(np.arange(256, dtype=np.uint8)))


def _check_file(path: Path) -> None:
    """Raise DataError for what cannot be read a second time."""
    if path.is_fifo() or path.is_char_device() or path.is_socket():
        raise DataError(
            f"{path} is a pipe or device, and sequences are read several times. Give a file: packed ones (.fa.gz) are "
            "read as they are; write what a command prints into one first."
        )


def sequence_pieces(path: Path, table: bytes, refuse: Refuse = raised) -> Iterator[Piece]:
    """The sequences of a FASTA or 2bit file, told apart by their first bytes: see `fasta_pieces`, `twobit_pieces`.
    Raises DataError for a pipe, too."""
    _check_file(path)
    return twobit_pieces(path, table) if is_twobit(path) else fasta_pieces(path, table, refuse)


def read_fasta(
    path: str | Path,
    tokenizer: BaseTokenizer,
    lowercase: Lowercase = "fold",
    regions: Sequence[str] = (),
    refuse: Refuse = raised,
) -> Iterator[Record]:
    """The records of a FASTA or 2bit file as ids, in file order: name (the header's first word), description (the
    rest), and which bases count in a likelihood, and have labels or values: N never does.

    lowercase: as in the model's training data; with `"unscored"` lower case does not count either.
    regions: parts of the records instead, in the order given (see `mambaseq_dna.files.regions`).
    refuse: called for a record of FASTA that cannot be used; the others are read.
    Raises DataError as `fasta_pieces` and `twobit_pieces` do, ConfigError for another value of lowercase.
    """
    if lowercase not in get_args(Lowercase):
        raise ConfigError(
            f"reader_options.lowercase must be one of {', '.join(get_args(Lowercase))}, not {shown(lowercase)}."
        )

    totals: Mapping[str, int] | None = None

    def record(name: str, description: str, pieces: list[bytes], start: int = 0, total: int | None = None) -> Record:
        kept = b"".join(pieces)
        folded = kept.translate(_FOLD)
        ids = np.frombuffer(folded if tokenizer.lowercase == "fold" else kept, dtype=np.uint8)
        scored = None
        if lowercase == "unscored":
            scored = np.frombuffer(kept, dtype=np.uint8) < N  # upper case, and no N
        elif _N in folded:
            scored = np.frombuffer(folded, dtype=np.uint8) != N
        return Record(name, ids, description=description, scored=scored, start=start, total=total, totals=totals)

    if regions:
        from mambaseq_dna.files.assembly import Assembly  # which need this module
        from mambaseq_dna.files.regions import read_regions

        assembly = Assembly(path)
        totals = assembly.lengths
        for part in read_regions(assembly, regions):
            yield record(part.name, part.label, [part.ids.tobytes()], part.start, part.total)
        return
    pieces: list[bytes] = []
    name = description = ""
    for begins, told, ids in sequence_pieces(Path(path), BaseTokenizer("keep").table, refuse):
        if begins is not None:
            if usable(pieces):
                yield record(name, description, pieces)
            name, description, pieces = begins, told, []
        pieces.append(ids)
    if usable(pieces):
        yield record(name, description, pieces)


def strand_checksums(ids: np.ndarray) -> tuple[int, int]:
    """Checksums of a record in a store: of its bases in upper case, and of its other strand's.

    ids: `(length,)` uint8 of `BaseTokenizer("keep")`. A record and its reverse complement have the same two numbers in
        the other order.
    """
    if len(ids) <= _SHORT:
        forward = ids.tobytes().translate(_FOLD)
        return xxhash.xxh3_64_intdigest(forward), xxhash.xxh3_64_intdigest(forward[::-1].translate(_COMPLEMENT))
    if len(ids) < _WORTH_A_THREAD:
        return _checksum(ids), _checksum_of_other_strand(ids)
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(_checksum_of_other_strand, ids)
        return _checksum(ids), other.result()


def _checksum(ids: np.ndarray) -> int:
    digest, buffer = xxhash.xxh3_64(), np.empty(_PART, dtype=np.uint8)
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        digest.update(fold_case(part, out=buffer[: len(part)]).data)
    return digest.intdigest()


def _turn(ids: np.ndarray, into: np.ndarray) -> None:
    """Write `(length,)` uint8 ids in reverse order; eight at a time where they come in eights, several times faster."""
    if len(ids) % 8:
        into[:] = ids[::-1]
        return
    words = into.view(np.uint64)
    words[:] = ids.view(np.uint64)[::-1]
    words.byteswap(inplace=True)


def _checksum_of_other_strand(ids: np.ndarray) -> int:
    digest, buffer, turned = xxhash.xxh3_64(), np.empty(_PART, dtype=np.uint8), np.empty(_PART, dtype=np.uint8)
    for stop in range(len(ids), 0, -_PART):
        part = ids[max(stop - _PART, 0) : stop]
        folded, into = fold_case(part, out=buffer[: len(part)]), turned[: len(part)]
        _turn(complement(folded, out=folded), into)
        digest.update(into.data)
    return digest.intdigest()


def fasta_store(path: Path, cache: str | Path | None = None) -> TokenStore:
    """The token store of a FASTA or 2bit file, built at first use: ids of `BaseTokenizer("keep")`, uint8.

    The store keeps lower case; whether it is folded or used as a mask is decided when windows are read.
    """
    return _store(path, cache, lambda: False)


def fasta_stores(paths: Sequence[Path], cache: str | Path | None = None) -> list[TokenStore]:
    """`fasta_store` of each file, several at once. Raises the error of the first file that has one."""
    if len(paths) < 2:
        return [fasta_store(path, cache) for path in paths]
    stop = threading.Event()
    with ThreadPoolExecutor(min(len(paths), cores(), _FILES_AT_ONCE)) as threads:
        try:
            return list(threads.map(_store, paths, itertools.repeat(cache), itertools.repeat(stop.is_set)))
        except BaseException:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _store(path: Path, cache: str | Path | None, stopped: Callable[[], bool]) -> TokenStore:
    """stopped: becomes true when another file cannot be read, or the user interrupts."""
    _check_file(path)
    tokenizer = BaseTokenizer("keep")
    file = Unchanged([path])
    ended = threading.Event()

    def described() -> dict[str, Any]:
        source = fingerprint(path, cache, state=file.state(path), stopped=lambda: ended.is_set() or stopped())
        return {"sources": [source], "tokenizer": "dna/base", "options": tokenizer.options}

    def records() -> Iterator[tuple[str | None, np.ndarray]]:
        small = path.stat().st_size <= 64 * 2**20
        with tqdm(desc=f"reading {path.name}", unit="base", unit_scale=True, disable=small) as bar:
            read = 0
            for name, _, ids in sequence_pieces(path, tokenizer.table):
                if stopped():
                    raise Stopped
                yield name, np.frombuffer(ids, dtype=np.uint8)
                read += len(ids)
                if read >= _CHUNK:
                    bar.update(read)
                    read = 0
            bar.update(read)

    with ThreadPoolExecutor(1) as thread:  # the checksum of a large file takes as long as reading it
        try:
            meta = thread.submit(described)
            wait([meta], timeout=_SOON)
            return TokenStore.cached(
                path.name, records, "uint8", meta, checksums=strand_checksums, unchanged=file.check, cache=cache
            )
        finally:
            ended.set()  # leaving waits for the thread: after Ctrl-C or an error, nobody needs its checksum


def _check_letters(begun: np.ndarray, tokenizer: Tokenizer | None, **_: Any) -> None:
    """Raise ConfigError for a tokenizer whose ids, all at once, are no sequence of letters: others may be drawn."""
    letters: Any = None
    if tokenizer is not None:
        with contextlib.suppress(ValueError, TypeError, IndexError):  # of ids of another shape
            letters = tokenizer.decode(np.arange(tokenizer.vocab_size))
    if not _is_letters(letters):
        raise ConfigError(_NO_LETTERS)


def _is_letters(decoded: Any) -> bool:
    return isinstance(decoded, str) and _LETTERS.fullmatch(decoded) is not None


@writes("DNA is", *_ENDINGS, takes=_check_letters)
def write_fasta(
    path: str | Path,
    sequences: Iterable[np.ndarray | Record],
    tokenizer: BaseTokenizer,
    *,
    described: Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write sequences of ids, 80 letters a line; gzipped when the name ends in `.gz`; complete or not at all.

    Records keep their names; bare ids are named `sequence_1`, `sequence_2`, ..., and described by what `described` says
    of their prompt and sample. Returns the files written: `path`.
    Raises ConfigError for a name without the ending of a FASTA; UserError when the disk is full or the place is not
    writable.
    """
    path = Path(path)
    with output_file(path) as file:
        zipped = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if path.suffix == ".gz" else None
        with zipped or contextlib.nullcontext(file) as out:
            for number, sequence in enumerate(sequences, start=1):
                if isinstance(sequence, Record):
                    record = sequence
                else:
                    of = {} if described is None else described[number - 1]
                    told = " ".join(f"{key}={of[key]}" for key in ("prompt", "record", "sample") if key in of)
                    record = Record(f"sequence_{number}", sequence, description=" ".join(told.split()))
                assert record.ids is not None
                letters = tokenizer.decode(record.ids)
                if not _is_letters(letters):
                    raise ConfigError(_NO_LETTERS)
                out.write(f">{record.name} {record.description}".rstrip().encode("utf-8", "replace") + b"\n")
                for start in range(0, len(letters), _LINE):
                    out.write(letters[start : start + _LINE].encode() + b"\n")
    return [path]
