"""2bit files hold the same as the FASTA files they stand for; damaged ones are refused in one paragraph."""

from __future__ import annotations

import contextlib
import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.fasta import fasta_store, read_fasta
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.tokenizer import BaseTokenizer
from pyfaidx import Fasta

from mambaseq.errors import DataError

KEEP = BaseTokenizer("keep")


def twobit(records: dict[str, str], order: str = "<", version: int = 0) -> bytes:
    """The file, by UCSC's description of the format."""
    offset_kind = "Q" if version else "I"
    names = {name: name.encode() for name in records}
    place = 16 + sum(1 + len(name) + struct.calcsize(offset_kind) for name in names.values())
    index, bodies = b"", b""
    for name, letters in records.items():
        blocks = b""
        for pattern in ("[Nn]+", "[a-z]+"):
            found = [match.span() for match in re.finditer(pattern, letters)]
            starts, sizes = [start for start, _ in found], [stop - start for start, stop in found]
            blocks += struct.pack(f"{order}{1 + 2 * len(found)}I", len(found), *starts, *sizes)
        digits = ["TCAG".index(letter) if letter in "TCAG" else 0 for letter in letters.upper()]
        digits += [0] * (-len(digits) % 4)
        packed = bytes(a << 6 | b << 4 | c << 2 | d for a, b, c, d in zip(*[iter(digits)] * 4, strict=True))
        index += bytes([len(names[name])]) + names[name] + struct.pack(order + offset_kind, place + len(bodies))
        bodies += struct.pack(f"{order}I", len(letters)) + blocks + struct.pack(f"{order}I", 0) + packed
    return struct.pack(f"{order}4I", 0x1A412743, version, len(records), 0) + index + bodies


def random_records(seed: int, n: int, longest: int) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(n):
        runs = [
            "".join(rng.choice(list(letters), int(rng.integers(1, longest // 4))))
            for letters in rng.choice(["ACGT", "acgt", "N", "n"], 8, p=[0.4, 0.3, 0.2, 0.1])
        ]
        found[f"chr{number}"] = "".join(runs)[:longest]
    return found


@pytest.mark.parametrize(("order", "version"), [("<", 0), (">", 0), ("<", 1)])
def test_the_same_as_biopython_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, version: int) -> None:
    records = random_records(0, 5, 300)
    path = tmp_path / "a.2bit"
    path.write_bytes(twobit(records, order, version))
    if not version:  # which Biopython does not read
        assert {record.id: str(record.seq) for record in SeqIO.parse(path, "twobit")} == records
    for piece in (1, 3, 1 << 18):
        monkeypatch.setattr("mambaseq_dna.files.twobit._PACKED_PIECE", piece)
        found = {record.name: KEEP.decode(record.ids) for record in read_fasta(path, KEEP)}  # type: ignore[arg-type]
        assert found == records
    packed = tmp_path / "a.2bit.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="it is 2bit; unpack it if it is packed"):
        list(read_fasta(packed, KEEP))


def test_random_intervals_of_fasta_and_2bit_equal_pyfaidx(tmp_path: Path) -> None:
    records = random_records(1, 4, 4000)
    text = "".join(f">{name}\n" + re.sub("(.{1,50})", r"\1\n", letters) for name, letters in records.items())
    (tmp_path / "a.fa").write_text(text)
    (tmp_path / "a.2bit").write_bytes(twobit(records))
    ours = [Assembly(tmp_path / name, tmp_path / "cache") for name in ("a.fa", "a.2bit")]
    rng = np.random.default_rng(2)
    with Fasta(str(tmp_path / "a.fa"), rebuild=True) as theirs:
        for _ in range(200):
            name = str(rng.choice(list(records)))
            start, stop = np.sort(rng.integers(0, len(records[name]) + 1, 2)).tolist()
            strand = str(rng.choice(["+", "-"]))
            expected = theirs[name][start:stop]
            letters = (expected.reverse.complement if strand == "-" else expected).seq if stop > start else ""
            for assembly in ours:
                assert KEEP.decode(assembly.read(name, start, stop, strand)) == letters


def test_runs_notice_a_changed_2bit(tmp_path: Path) -> None:
    path = tmp_path / "a.2bit"
    sources = []
    for letters in ("ACGT" * 30, "ACGA" * 30):
        path.write_bytes(twobit({"8": letters, "9": "GGCA" * 20}))
        data = GenomeData(fasta=[str(path)], test_records=[9], length=8, validation_fraction=0, cache=str(tmp_path))
        assert data.train()[0].inputs.shape == (1, 8)
        sources.append(data.sources())
    assert sources[0] != sources[1]


GOOD = {"one": "ACGTNNacgt", "two": "TTTT"}
BAD = {
    "no sequence": (twobit({}), "has no sequence"),
    "an empty one": (twobit({"one": "ACGT", "void": ""}), "sequence 'void' has no bases"),
    "one name twice": (twobit(GOOD).replace(b"two", b"one"), r"two sequences are named 'one' \(the second is seq"),
    "no name": (twobit({"": "ACGT"}), "sequence 1 has no name"),
    "another version": (twobit(GOOD, version=1).replace(b"\1", b"\7", 1), "its version is 7, not 0 or 1"),
    "a name in latin-1": (twobit({"Å": "A"}).replace("Å".encode(), b"\xc5\xc5"), "name of sequence 1 is not UTF-8"),
    "too many announced": (twobit(GOOD)[:8] + b"\xff" * 4 + twobit(GOOD)[12:], "cannot hold the 4,294,967,295 seq"),
    "cut in a sequence": (twobit(GOOD)[:-1], "cut short: it has .* bytes, and ends within sequence 'two'"),
    "cut in the index": (twobit(GOOD)[:40], "said to begin behind|cut short"),
    "sequences that overlap": (  # 40 names of one sequence
        twobit({f"{k:02}": "ACGT" * 40 if k == 39 else "A" for k in range(40)}),
        "",
    ),
}
_one = struct.pack("<I", 16 + 40 * 7 + 39 * 17)
_whole = BAD["sequences that overlap"][0]
BAD["sequences that overlap"] = (
    _whole[:16] + b"".join(_whole[16 + 7 * k : 19 + 7 * k] + _one for k in range(40)) + _whole[16 + 40 * 7 :],
    "longer than the file, so they overlap",
)
BAD["stretches beyond the end"] = (
    twobit({"one": "ACNN"}).replace(struct.pack("<2I", 2, 2), struct.pack("<2I", 2, 3)),
    "stretches of N in sequence 'one' overlap, are empty or leave it",
)


@pytest.mark.parametrize("what", BAD)
def test_bad_2bit(tmp_path: Path, what: str) -> None:
    content, told = BAD[what]
    path = tmp_path / "bad.2bit"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        list(read_fasta(path, KEEP))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_damage_is_refused_or_read(tmp_path: Path) -> None:
    """No cut and no flipped byte gets further than a DataError, and no cut file is read."""
    whole = twobit(GOOD)
    path = tmp_path / "bad.2bit"
    for end in range(4, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError):
            list(read_fasta(path, KEEP))
    rng = np.random.default_rng(0)
    for place in range(4, len(whole)):
        path.write_bytes(whole[:place] + bytes([int(rng.integers(256))]) + whole[place + 1 :])
        with contextlib.suppress(DataError):
            list(read_fasta(path, KEEP))


def test_a_store_of_2bit_equals_that_of_fasta(tmp_path: Path) -> None:
    records = random_records(3, 3, 500)
    (tmp_path / "a.fa").write_text("".join(f">{name}\n{letters}\n" for name, letters in records.items()))
    (tmp_path / "a.2bit").write_bytes(twobit(records))
    one, other = (fasta_store(tmp_path / name, tmp_path / "cache") for name in ("a.fa", "a.2bit"))
    assert (one.names, one.tokens.tobytes(), one.checksums.tobytes()) == (
        other.names,
        other.tokens.tobytes(),
        other.checksums.tobytes(),
    )
