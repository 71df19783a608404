"""Reads and writes FASTA: plain, gzip and bgzip, with one record in memory at a time."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xxhash
from tqdm import tqdm

from mambaseq.data.cache import fingerprint
from mambaseq.data.records import Record
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, shown
from mambaseq.outputs import output_file
from mambaseq_dna.files.parsing import fasta_pieces
from mambaseq_dna.tokenizer import BaseTokenizer, N, complement, fold_case

Lowercase = Literal["fold", "keep", "unscored"]

_LINE = 80
_SHORT, _CHUNK = 1 << 12, 1 << 20
_FOLD = bytes(fold_case(np.arange(256, dtype=np.uint8)))
_N = bytes([N])
_COMPLEMENT = bytes(complement(np.arange(256, dtype=np.uint8)))


def read_fasta(path: str | Path, tokenizer: BaseTokenizer, lowercase: Lowercase = "fold") -> Iterator[Record]:
    """The records of a FASTA file as ids, in file order: name (the header's first word), description (the
    rest), and which bases count in a likelihood: N never does.

    lowercase: as in the model's training data; with `"unscored"` lower case does not count either.
    Raises DataError as `fasta_pieces` does, ConfigError for another value of lowercase.
    """
    if lowercase not in get_args(Lowercase):
        raise ConfigError(
            f"reader_options.lowercase must be one of {', '.join(get_args(Lowercase))}, not {shown(lowercase)}."
        )

    def record(name: str, description: str, pieces: list[bytes]) -> Record:
        kept = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        folded = kept.translate(_FOLD)
        ids = np.frombuffer(folded if tokenizer.lowercase == "fold" else kept, dtype=np.uint8)
        scored = None
        if lowercase == "unscored":
            scored = np.frombuffer(kept, dtype=np.uint8) < N  # upper case, and no N
        elif _N in folded:
            scored = np.frombuffer(folded, dtype=np.uint8) != N
        return Record(name=name, ids=ids, description=description, scored=scored)

    pieces: list[bytes] = []
    name = description = ""
    for begins, told, ids in fasta_pieces(Path(path), BaseTokenizer("keep").table):
        if begins is not None:
            if pieces:
                yield record(name, description, pieces)
            name, description, pieces = begins, told, []
        pieces.append(ids)
    yield record(name, description, pieces)


def strand_checksums(ids: np.ndarray) -> tuple[int, int]:
    """Checksums of a record in a store: of its bases in upper case, and of its other strand's.

    ids: `(length,)` uint8 of `BaseTokenizer("keep")`. A record and its reverse complement have the same two numbers in
        the other order.
    """
    if len(ids) <= _SHORT:
        forward = ids.tobytes().translate(_FOLD)
        return xxhash.xxh3_64_intdigest(forward), xxhash.xxh3_64_intdigest(forward[::-1].translate(_COMPLEMENT))
    one, other = xxhash.xxh3_64(), xxhash.xxh3_64()
    for start in range(0, len(ids), _CHUNK):
        one.update(fold_case(ids[start : start + _CHUNK]).data)
    for stop in range(len(ids), 0, -_CHUNK):
        turned = complement(fold_case(ids[max(stop - _CHUNK, 0) : stop]))[::-1]
        other.update(np.ascontiguousarray(turned).data)
    return one.intdigest(), other.intdigest()


def fasta_store(path: Path, cache: str | Path | None = None) -> TokenStore:
    """The token store of a FASTA file, built at first use: ids of `BaseTokenizer("keep")`, uint8.

    The store keeps lower case; whether it is folded or used as a mask is decided when windows are read.
    """
    tokenizer = BaseTokenizer("keep")
    meta = {"sources": [fingerprint(path, cache)], "tokenizer": "dna/base", "options": tokenizer.options}

    def records() -> Iterator[tuple[str | None, np.ndarray]]:
        small = path.stat().st_size <= 64 * 2**20
        with tqdm(desc=f"reading {path.name}", unit="base", unit_scale=True, disable=small) as bar:
            read = 0
            for name, _, ids in fasta_pieces(path, tokenizer.table):
                yield name, np.frombuffer(ids, dtype=np.uint8)
                read += len(ids)
                if read >= _CHUNK:
                    bar.update(read)
                    read = 0
            bar.update(read)

    return TokenStore.cached(path.name, records, "uint8", meta, checksums=strand_checksums, cache=cache)


def write_fasta(path: str | Path, sequences: Iterable[np.ndarray | Record], tokenizer: BaseTokenizer) -> list[Path]:
    """Write sequences of ids, 80 letters a line; gzipped when the name ends in `.gz`; complete or not at all.

    Records keep their names; bare ids are named `sequence_1`, `sequence_2`, ... Returns the files written:
    `path`.
    Raises UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    with output_file(path) as file:
        zipped = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if path.suffix == ".gz" else None
        with zipped or contextlib.nullcontext(file) as out:
            for number, sequence in enumerate(sequences, start=1):
                record = sequence if isinstance(sequence, Record) else Record(f"sequence_{number}", sequence)
                assert record.ids is not None
                letters = tokenizer.decode(record.ids)
                out.write(f">{record.name} {record.description}".rstrip().encode("utf-8", "replace") + b"\n")
                for start in range(0, len(letters), _LINE):
                    out.write(letters[start : start + _LINE].encode() + b"\n")
    return [path]
