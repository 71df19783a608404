"""FASTA in and out: plain, gzip and bgzip; one record in memory at a time."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.data.cache import fingerprint
from mambaseq.data.records import Record
from mambaseq.data.store import TokenStore
from mambaseq.errors import DataError
from mambaseq_dna.tokenizer import BaseTokenizer, InvalidBase

# The empty block that ends every bgzip file (SAM specification, 4.1.2). Without it a file that was cut
# between two blocks would look complete.
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_PROTEIN_ONLY = set("EFILPQXZJO*")
_LINE = 80


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open as text, decompressing by content and not by name. Raises DataError for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(18)
            if not head:
                raise DataError(f"{path} is empty (0 bytes). Check that it was copied or downloaded completely.")
            zipped = head.startswith(b"\x1f\x8b")
            if zipped and head[3] & 4 and head[12:14] == b"BC":
                file.seek(-min(len(_BGZF_END), path.stat().st_size), 2)
                if file.read() != _BGZF_END:
                    raise DataError(_cut_short(path, "the block that ends every bgzip file is missing"))
        # ASCII is all that sequences need, and a header may hold anything
        with (gzip.open if zipped else open)(path, "rt", encoding="latin-1") as text:
            yield text
    except EOFError as error:
        raise DataError(_cut_short(path, "the compressed stream ends early")) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged: it cannot be decompressed ({error}). Copy or download it again."
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Check the path.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error


def _cut_short(path: Path, reason: str) -> str:
    return f"{path} is cut short: {reason}. Copy or download it again (`gzip -t {path.name}` tests it)."


def iterate_fasta(path: str | Path) -> Iterator[tuple[str, str]]:
    """(header without `>`, sequence letters) of each record, in file order.

    Raises DataError naming file and record: no such file, an empty one, a truncated or damaged gzip, no
    header, a header without a name, a name that occurs twice, a record without sequence.
    """
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    path = Path(path)
    seen: set[str] = set()
    with _opened(path) as lines:
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            raise DataError(f"{path} has no sequence: only blank lines. Check that it is the file you mean.")
        if not first.startswith(">"):
            kind = "it looks like FASTQ; convert it (seqtk seq -A)" if first.startswith("@") else "is it FASTA?"
            raise DataError(
                f"{path} has no FASTA header: the first line that is not blank must start with '>' and a "
                f"name, and is {first.strip()[:30]!r} ({kind})."
            )
        for number, (header, sequence) in enumerate(SimpleFastaParser(itertools.chain([first], lines)), start=1):
            name = (header.split() or [""])[0]
            if not name:
                raise DataError(f"{path}: record {number} has no name. Write one after its '>'.")
            if name in seen:
                raise DataError(
                    f"{path}: two records are named {name!r} (the second is record {number}). The name is "
                    f"the header's first word; make it unique."
                )
            if not sequence:
                raise DataError(f"{path}: record {name!r} has a header and no sequence. Remove it, or complete it.")
            seen.add(name)
            yield header, sequence


def read_fasta(path: str | Path, tokenizer: BaseTokenizer) -> Iterator[Record]:
    """The records of a FASTA file as ids, in file order: name (the header's first word), description (the
    rest).

    Raises DataError as `iterate_fasta` does, and for letters that are no base, naming file, record, letter
    and position.
    """
    for header, sequence in iterate_fasta(path):
        name, *description = header.split(maxsplit=1)
        try:
            ids = tokenizer.encode(sequence)
        except InvalidBase as error:
            protein = len(_PROTEIN_ONLY.intersection(sequence.upper())) > 1
            raise DataError(
                f"{path}, record {name!r}: {error}"
                + (" This record looks like a protein; give the nucleotide sequence." if protein else "")
            ) from error
        yield Record(name=name, ids=ids, description="".join(description))


def fasta_store(path: Path, cache: str | Path | None = None) -> TokenStore:
    """The token store of a FASTA file, built at first use: ids of `BaseTokenizer("keep")`, uint8.

    Lower case is kept in the store, so that folding it or using it as a mask is decided where windows are
    read.
    """
    tokenizer = BaseTokenizer("keep")
    meta = {"sources": [fingerprint(path, cache)], "tokenizer": "dna/base", "options": tokenizer.options}

    def records() -> Iterator[tuple[str, np.ndarray]]:
        small = path.stat().st_size <= 64 * 2**20
        with tqdm(desc=f"reading {path.name}", unit="base", unit_scale=True, disable=small) as bar:
            for record in read_fasta(path, tokenizer):
                assert record.ids is not None
                bar.update(len(record))
                yield record.name, record.ids

    return TokenStore.cached(path.name, records, "uint8", meta, cache=cache)


def write_fasta(path: str | Path, sequences: Iterable[np.ndarray | Record], tokenizer: BaseTokenizer) -> list[Path]:
    """Write sequences of ids, 80 letters a line; gzipped when the name ends in `.gz`; complete or not at all.

    Records keep their names; bare ids are named `sequence_1`, `sequence_2`, ... Returns the files written:
    `path`.
    Raises UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    with atomic_file(path) as file:
        zipped = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if path.suffix == ".gz" else None
        with zipped or contextlib.nullcontext(file) as out:
            for number, sequence in enumerate(sequences, start=1):
                record = sequence if isinstance(sequence, Record) else Record(f"sequence_{number}", sequence)
                assert record.ids is not None
                letters = tokenizer.decode(record.ids)
                out.write(f">{record.name} {record.description}".rstrip().encode("latin-1", "replace") + b"\n")
                for start in range(0, len(letters), _LINE):
                    out.write(letters[start : start + _LINE].encode() + b"\n")
    return [path]
