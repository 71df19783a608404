"""FASTA in and out; every kind of bad file is one paragraph that names file, record and remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from mambaseq_dna.fasta import fasta_store, read_fasta, write_fasta
from mambaseq_dna.tokenizer import BaseTokenizer, fold_case

from mambaseq import resources
from mambaseq.data.records import Record
from mambaseq.errors import DataError

TOKENIZER = BaseTokenizer()
PLAIN = ">one first record\nACGT\nacgtN\n\n>two\nTTTT\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bgzip(path: Path, content: str) -> Path:
    with bgzf.BgzfWriter(str(path)) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("kind", ["plain", "crlf", "gzip", "gzip without suffix", "bgzip", "two gzip members"])
def test_reading(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.fa.gz"
    if kind == "bgzip":
        bgzip(path, PLAIN)
    elif kind == "crlf":
        write(path, PLAIN.replace("\n", "\r\n"))
    elif kind == "gzip without suffix":
        path = write(tmp_path / "a.fa", gzip.compress(PLAIN.encode()))
    elif kind == "two gzip members":
        write(path, gzip.compress(PLAIN[:20].encode()) + gzip.compress(PLAIN[20:].encode()))
    else:
        write(path, gzip.compress(PLAIN.encode()) if kind == "gzip" else PLAIN)
    records = list(read_fasta(path, TOKENIZER))
    assert [(record.name, record.description) for record in records] == [("one", "first record"), ("two", "")]
    assert [TOKENIZER.decode(record.ids) for record in records] == ["ACGTACGTN", "TTTT"]  # type: ignore[arg-type]


PROTEIN = ">sp|P69905|HBA_HUMAN Hemoglobin\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF\n"
GOOD = ">good\nACGT\n"

BAD = {
    "a protein": (
        GOOD + PROTEIN,
        r"'sp\|P69905\|HBA_HUMAN'.*'L' at position 3 is no base.*looks like a protein; give the",
    ),
    "a stop": (">x\nACG*\n", r"record 'x': The letter '\*' at position 4"),
    "a gap": (">x\nAC-G\n", r"record 'x': The letter '-' at position 3.*remove gaps"),
    "empty": ("", r"is empty \(0 bytes\)"),
    "blank": ("\n\n  \n", "only blank lines"),
    "no header": ("ACGT\n", r"no FASTA header.*'ACGT'"),
    "fastq": ("@r\nACGT\n+\nIIII\n", "looks like FASTQ; convert"),
    "binary": (bytes(range(256)) * 4, "no FASTA header"),
    "no name": (GOOD + "> \nACGT\n", "record 2 has no name"),
    "same name twice": (
        GOOD + ">b\nA\n>good again\nAC\n",
        r"two records are named 'good' \(the second is record 3\)",
    ),
    "no sequence": (GOOD + ">nothing\n>b\nA\n", "'nothing' has a header and no sequence"),
    "no last sequence": (GOOD + ">nothing\n", "'nothing' has a header and no sequence"),
    "empty gzip": (gzip.compress(b""), "only blank lines"),
    "cut gzip": (gzip.compress(PLAIN.encode())[:-12], r"cut short: the compressed.*gzip -t"),
    "damaged gzip": (
        gzip.compress(PLAIN.encode() * 9)[:10] + b"\xff" * 40,
        "damaged: it cannot be decompressed",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(tmp_path: Path, what: str) -> None:
    content, told = BAD[what]
    path = write(tmp_path / "bad.fa", content)
    with pytest.raises(DataError, match=told) as caught:
        list(read_fasta(path, TOKENIZER))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bgzip_cut_between_two_blocks(tmp_path: Path) -> None:
    path = bgzip(tmp_path / "a.fa.gz", ">a\n" + "ACGT\n" * 40_000)
    with path.open("rb") as file:
        blocks = [start for start, *_ in bgzf.BgzfBlocks(file)]
    write(path, path.read_bytes()[: blocks[2]])
    with pytest.raises(DataError, match="cut short: the block that ends every bgzip file is missing"):
        list(read_fasta(path, TOKENIZER))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        list(read_fasta(tmp_path / "none.fa", TOKENIZER))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_fasta(tmp_path, TOKENIZER))


def test_shipped_file_equals_biopython(tmp_path: Path) -> None:
    path = resources.find("mambaseq:data/encode/dog.ENm002.fa.gz")
    with gzip.open(path, "rt") as file:
        expected = str(next(SeqIO.parse(file, "fasta")).seq)
    store = fasta_store(path, cache=tmp_path)
    assert BaseTokenizer("keep").decode(store[0]) == expected
    assert TOKENIZER.decode(fold_case(store[0])) == expected.upper()


def test_store_follows_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", GOOD)
    first = fasta_store(path, cache=tmp_path / "cache")
    assert fasta_store(path, cache=tmp_path / "cache").folder == first.folder
    write(path, ">good\nACGA\n")
    assert BaseTokenizer("keep").decode(fasta_store(path, cache=tmp_path / "cache")[0]) == "ACGA"


def test_a_bad_file_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="looks like a protein"):
        fasta_store(write(tmp_path / "a.fa", GOOD + PROTEIN), cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "stores").iterdir()) == []


@pytest.mark.parametrize("name", ["out.fa", "out.fa.gz"])
def test_written_files_read_back(tmp_path: Path, name: str) -> None:
    ids = np.random.default_rng(0).integers(0, 5, 201).astype(np.uint8)
    sequences = [Record("named", ids, description="by hand"), ids[:80]]
    assert write_fasta(tmp_path / name, sequences, TOKENIZER) == [tmp_path / name]
    raw = (tmp_path / name).read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().split("\n")
    assert (text[0], [len(line) for line in text[1:4]]) == (">named by hand", [80, 80, 41])
    assert text[4:] == [">sequence_2", text[1], ""]
    named, bare = read_fasta(tmp_path / name, TOKENIZER)
    assert (named.name, named.description, bare.name) == ("named", "by hand", "sequence_2")
    assert (named.ids.tolist(), bare.ids.tolist()) == (ids.tolist(), ids[:80].tolist())  # type: ignore[union-attr]
