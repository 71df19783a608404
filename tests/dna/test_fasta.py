"""FASTA in and out; every kind of bad file is one paragraph that names file, record and remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from mambaseq_dna.files.fasta import (
    fasta_store,
    fasta_stores,
    read_fasta,
    sequence_pieces,
    strand_checksums,
    write_fasta,
)
from mambaseq_dna.files.parsing import _HeaderLines
from mambaseq_dna.tokenizer import BaseTokenizer, fold_case

from mambaseq import resources
from mambaseq.data import cache as data_cache
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, DataError, UserError

TOKENIZER = BaseTokenizer()
PLAIN = ">one first record\nACGT\nacgtN\n\n>two\nTTTT\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bgzip(path: Path, content: str) -> Path:
    with bgzf.BgzfWriter(str(path)) as file:
        file.write(content)
    return path


KINDS = {
    "plain": PLAIN.encode(),
    "crlf": PLAIN.replace("\n", "\r\n").encode(),
    "cr": PLAIN.replace("\n", "\r").encode(),
    "without a last line end": PLAIN.rstrip().encode(),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "comments": (";one\n\n;two\n" + PLAIN.replace("\n", "\n;AC>GT; x\n")).encode(),
    "lower case alone": PLAIN.lower().encode(),
    "spaces and tabs": PLAIN.replace("CG", " C\tG ").replace("\n\n", "\n  \n").encode(),
    "gzip": gzip.compress(PLAIN.encode()),
    "two gzip members": gzip.compress(PLAIN[:20].encode()) + gzip.compress(PLAIN[20:].encode()),
    "an empty member": gzip.compress(b"") + gzip.compress(PLAIN.encode()),
    "zeros at the end": gzip.compress(PLAIN.encode()) + bytes(1000),
    "zeros between members": gzip.compress(PLAIN[:20].encode()) + bytes(7) + gzip.compress(PLAIN[20:].encode()),
}


def check_plain(path: Path) -> None:
    records = list(read_fasta(path, TOKENIZER))
    assert [(record.name, record.description) for record in records] == [("one", "first record"), ("two", "")]
    assert [TOKENIZER.decode(record.ids) for record in records] == ["ACGTACGTN", "TTTT"]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".fa", ".fa.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading(tmp_path: Path, kind: str, suffix: str) -> None:
    check_plain(write(tmp_path / f"a{suffix}", KINDS[kind]))


@pytest.mark.parametrize("size", [3, 4, 5, 18, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int) -> None:
    monkeypatch.setattr("mambaseq.data.unpacking.PIECE", size)
    monkeypatch.setattr("mambaseq.data.unpacking._PACKED_PIECE", size)
    check_plain(write(tmp_path / "a.fa", KINDS[kind]))


@pytest.mark.parametrize("size", [3, 4, 5, 18, 40, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("begin", ["", "\n \n;one >no\n\n", "\ufeff;>no\n;two\n"])
def test_lines_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, end: str, size: int) -> None:
    """Over pieces, blank lines, comments and long sequences."""
    monkeypatch.setattr("mambaseq.data.unpacking.PIECE", size)
    monkeypatch.setattr("mambaseq.data.unpacking._PACKED_PIECE", size)
    long = "ACGT\n" * 10
    text = f"{begin}>a x>y\n{long};c\n;>no\n>b\n\nAC\n;e\n>empty one\n\n;f\n>c\n{long}>d\n>e\nA\n>a\nA\n>last"
    path = write(tmp_path / "a.fa", text.replace("\n", end).encode())
    faults: list[str] = []
    names = [record.name for record in read_fasta(path, TOKENIZER, refuse=lambda error: faults.append(str(error)))]
    lines = text.split("\n")
    wrong = [lines.index(header) + 1 for header in (">empty one", ">d", ">a", ">last")]
    assert names == ["a", "b", "c", "e"]
    assert [int(re.search(r"a\.fa, line (\d+):", fault)[1]) for fault in faults] == wrong  # type: ignore[index]
    with pytest.raises(DataError, match=r"a\.fa was changed while it was read"):
        _HeaderLines(path).of(9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">a\nAC\n;one>\nGT\n>b x\nA\nC", [("a", "", b"ACGT"), ("b", "x", b"AC")]),
        ("\n\n>a\r\nAC\r\n\r\n GT\r\n>b\rA", [("a", "", b"ACGT"), ("b", "", b"A")]),
        (">a\nAC>b\nGT\n", "record 'a': The letter '>' at position 3"),
        (">a\nACGT;C\n", "record 'a': The letter ';' at position 5"),
        (">a\nACGT\n>b\n>c\nA\n", "record 'b' has a header and no sequence"),
        ("ACGT\n>a\nAC\n", "has no FASTA header"),
    ],
)
def test_lines_of_bases_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: list[tuple[str, str, bytes]] | str
) -> None:
    path, identity = write(tmp_path / "a.fa", text), BaseTokenizer("keep")
    for size in range(1, 20):
        monkeypatch.setattr("mambaseq.data.unpacking.PIECE", size)
        monkeypatch.setattr("mambaseq.data.unpacking._PACKED_PIECE", size)
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                list(read_fasta(path, identity))
        else:
            found = [
                (one.name, one.description, identity.decode(one.ids).encode()) for one in read_fasta(path, identity)
            ]  # type: ignore[arg-type]
            assert found == expected, size


def test_a_mistyped_option_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reader_options\.lowercase must be one of fold, keep, unscored, not 'x'"):
        next(read_fasta(write(tmp_path / "a.fa", PLAIN), TOKENIZER, "x"))  # type: ignore[arg-type]


def random_fasta(rng: np.random.Generator) -> str:
    """Records of 1 to 300 bases in lines of any length, with lower case, N and blank lines."""
    text = []
    for number in range(int(rng.integers(1, 8))):
        text.append(f">r{number} {'x' * int(rng.integers(0, 9))}\n")
        letters = "".join(rng.choice(list("ACGTNacgtn"), int(rng.integers(1, 300))))
        while letters:
            width = int(rng.integers(1, 90))
            text.append(letters[:width] + "\n" * int(rng.integers(1, 3)))
            letters = letters[width:]
    return "".join(text)


def test_random_files_equal_biopython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keep = BaseTokenizer("keep")
    for size in (7, 64, 500):
        monkeypatch.setattr("mambaseq.data.unpacking.PIECE", size)
        for _ in range(30):
            text = random_fasta(rng)
            path = write(tmp_path / "a.fa", text)
            expected = [(record.id, str(record.seq)) for record in SeqIO.parse(io.StringIO(text), "fasta")]
            found = [(record.name, keep.decode(record.ids)) for record in read_fasta(path, keep)]  # type: ignore[arg-type]
            assert found == expected
            store = fasta_store(path, tmp_path / "cache")
            assert [(name, keep.decode(store[i])) for i, name in enumerate(store.names)] == expected


def test_names_are_utf8(tmp_path: Path) -> None:
    text = ">Å_1 première\nAC\n>Ã\x85_1\nGT\n>à\nA\n"
    path = write(tmp_path / "a.fa", text)
    records = list(read_fasta(path, TOKENIZER))
    assert [(record.name, record.description) for record in records] == [
        ("Å_1", "première"),
        ("Ã\x85_1", ""),
        ("à", ""),
    ]
    assert fasta_store(path, tmp_path / "cache").names == ["Å_1", "Ã\x85_1", "à"]
    write_fasta(tmp_path / "b.fa", records, TOKENIZER)
    assert (tmp_path / "b.fa").read_text(encoding="utf-8") == text


def test_what_counts_in_a_likelihood(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", ">a\nACGTacgtNnRGG\n>b\nACGT\n")
    for tokenizer in (TOKENIZER, BaseTokenizer("keep")):
        for lowercase, scored in (("fold", "1111111100011"), ("keep", "1111111100011"), ("unscored", "1111000000011")):
            one, two = read_fasta(path, tokenizer, lowercase)  # type: ignore[arg-type]
            assert one.scored is not None
            assert "".join(str(int(value)) for value in one.scored) == scored
            assert two.scored is None or two.scored.all()
            assert one.ids is not None
            assert one.ids.tolist() == tokenizer.encode("ACGTacgtNnRGG").tolist()


PROTEIN = ">sp|P69905|HBA_HUMAN Hemoglobin\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF\n"
GOOD = ">good\nACGT\n"

BAD = {
    "a protein": (
        GOOD + PROTEIN,
        r"'sp\|P69905\|HBA_HUMAN'.*'L' at position 3 is not a base.*looks like a protein; give the",
    ),
    "a stop": (">x\nACG*\n", r"record 'x': The letter '\*' at position 4"),
    "a gap": (">x\nAC-G\n", r"record 'x': The letter '-' at position 3.*remove gaps"),
    "empty": ("", r"is empty \(0 bytes\)"),
    "blank": ("\n\n  \n", "only blank lines"),
    "no header": ("ACGT\n", r"no FASTA header.*'ACGT'"),
    "fastq": ("@r\nACGT\n+\nIIII\n", "looks like FASTQ; convert"),
    "binary": (bytes(range(256)) * 4, "no FASTA header"),
    "no name": (GOOD + "> \nACGT\n", "line 3: record 2 has no name"),
    "same name twice": (
        GOOD + ">b\nA\n>good again\nAC\n",
        r"line 5: two records are named 'good' \(the second is record 3\)",
    ),
    "no sequence": (GOOD + ">nothing\n>b\nA\n", "line 3: record 'nothing' has a header and no sequence"),
    "no last sequence": (GOOD + ">nothing\n", "line 3: record 'nothing' has a header and no sequence"),
    "a gap between lines": (">x\nAC\nG-\n", r"record 'x': The letter '-' at position 4.*remove gaps"),
    "a digit": (">x\n  1 ACGT\n", r"record 'x': The letter '1' at position 1"),
    "a letter of two bytes": (">x\nACGTÅ\n", r"record 'x': The letter 'Å' at position 5"),
    "a byte that is no letter": (b">x\nAC\xc5GT\n", r"record 'x': The letter '.*xc5' at position 3"),
    "a header within a line": (">x\nAC>y\nGT\n", r"record 'x': The letter '>' at position 3"),
    "only comments": ("; a\n;b\n\n", "only blank lines and comments"),
    "headers of old": (";a header\nACGT\n", r"no FASTA header.*'ACGT' \(lines that begin with ';'.*write '>'"),
    "latin-1": (GOOD.encode() + b">x caf\xe9\nAC\n", r"header of record 2 is not UTF-8: byte 0xe9 in 'caf.'.*iconv"),
    "utf-16": (GOOD.encode("utf-16"), "looks like UTF-16; convert it"),
    "cut bzip2": (bz2.compress(GOOD.encode())[:-5], "cut short: .* too early, in or after record 'good'"),
    "genbank": ("LOCUS       SCU49845\n", "looks like GenBank; convert it"),
    "embl": ("ID   X56734; SV 1; linear; mRNA\n", "looks like EMBL; convert it"),
    "a header without an end": (">" + "x" * (2 << 20), r"line of more than 1,048,576 bytes where a header"),
    "zeros": (gzip.compress(bytes(2 << 20)), "no FASTA header.*is it FASTA"),
    "empty gzip": (gzip.compress(b""), r"is empty \(0 bytes once unpacked\)"),
    "cut gzip": (gzip.compress(PLAIN.encode())[:-12], r"cut short: .* too early, in or after record .*gzip -t"),
    "cut gzip, first bytes": (gzip.compress(PLAIN.encode())[:7], r"cut short: .* too early, before any record"),
    "cut second member": (
        gzip.compress(PLAIN.encode()) + gzip.compress(b">three\nAC\n")[:-9],
        r"cut short: .* too early, in or after record 'three' \(number 3\).*gzip -t",
    ),
    "not gzip at the end": (
        gzip.compress(PLAIN.encode()) + b"ACGT",
        r"data that are not gzip .* from byte \d\d on, in or after record .two",
    ),
    "damaged gzip": (
        gzip.compress(PLAIN.encode() * 9)[:10] + b"\xff" * 40,
        "damaged: it cannot be unpacked .*gzip -t",
    ),
    "wrong checksum": (
        gzip.compress(PLAIN.encode())[:-8] + bytes(8),
        r"damaged: it cannot be unpacked \(.*incorrect data check\), before any record",
    ),
}


@pytest.mark.parametrize("letters", ["AC-", "", "AC\n>{name}\nAC"])
def test_messages_stay_short_whatever_a_record_is_called(tmp_path: Path, letters: str) -> None:
    name = "\x01" * 9000
    path = write(tmp_path / "bad.fa", f">{name}\n{letters.format(name=name)}\n")
    with pytest.raises(DataError) as caught:
        list(read_fasta(path, TOKENIZER))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("what", BAD)
def test_bad_files(tmp_path: Path, what: str) -> None:
    content, told = BAD[what]
    path = write(tmp_path / "bad.fa", content)
    with pytest.raises(DataError, match=told) as caught:
        list(read_fasta(path, TOKENIZER))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_packed_otherwise(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.fa"
    path.write_bytes(pack(PLAIN.encode()))
    check_plain(path)


def test_bgzip_without_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = bgzip(tmp_path / "a.fa.gz", PLAIN)
    check_plain(path)
    assert not caplog.records
    end = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
    write(path, path.read_bytes().removesuffix(end))
    check_plain(path)
    (told,) = caplog.records
    assert f"{path} is bgzip without an end block" in told.getMessage()
    write(path, path.read_bytes() + gzip.compress(b">three\nAC"))
    assert [record.name for record in read_fasta(path, TOKENIZER)] == ["one", "two", "three"]
    write(path, bgzip(path, PLAIN.rstrip()).read_bytes().removesuffix(end))
    with pytest.raises(DataError, match=r"stops within a line.*if it is complete, pack it again"):
        list(read_fasta(path, TOKENIZER))


def test_bgzip_cut_between_two_blocks(tmp_path: Path) -> None:
    path = bgzip(tmp_path / "a.fa.gz", ">a\n" + "ACGT\n" * 40_000)
    with path.open("rb") as file:
        blocks = [start for start, *_ in bgzf.BgzfBlocks(file)]
    write(path, path.read_bytes()[: blocks[2]])
    with pytest.raises(DataError, match=r"cut short: it is bgzip without .* within a line, in or after record 'a'"):
        list(read_fasta(path, TOKENIZER))


def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.fa.gz"
    with gzip.open(path, "wb") as file:
        file.write(b">x\n")
        for _ in range(80):
            file.write(b"N" * 2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{path} asks for .* each byte of the packed file; .*MAX_UNPACKED_RATIO"):
        fasta_store(path, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20
    monkeypatch.setenv("MAMBASEQ_MAX_UNPACKED_RATIO", "2000")
    assert len(fasta_store(path, tmp_path / "cache").tokens) == 80 * 2**20


@pytest.mark.parametrize("on_threads_from", [1 << 24, 5000])
def test_strand_checksums(monkeypatch: pytest.MonkeyPatch, on_threads_from: int) -> None:
    monkeypatch.setattr("mambaseq_dna.files.fasta._WORTH_A_THREAD", on_threads_from)
    keep = BaseTokenizer("keep")
    rng = np.random.default_rng(0)
    for length in (1, 20, 4096, 4097, 2**20 + 5):
        ids = rng.integers(0, 10, length).astype(np.uint8)
        one, other = strand_checksums(ids)
        assert strand_checksums(keep.reverse_complement(ids)) == (other, one)
        assert strand_checksums(fold_case(ids)) == (one, other)
        changed = ids.copy()
        changed[length // 2] = (changed[length // 2] + 1) % 5
        assert one not in strand_checksums(changed)


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


def test_a_file_replaced_while_its_checksum_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens have been read: they are not stored under the checksum of the new file."""
    path = write(tmp_path / "a.fa", ">a\nACGT\n")
    read, sha256 = threading.Event(), data_cache._sha256

    def pieces(*given: object) -> Iterator[object]:
        yield from sequence_pieces(*given)  # type: ignore[arg-type]
        read.set()

    def slow(path: Path, *more: object) -> str:
        assert read.wait(10)
        found = sha256(path)
        path.write_text(">a\nGGGG\n")
        return found

    with monkeypatch.context() as patched:
        patched.setattr("mambaseq_dna.files.fasta.sequence_pieces", pieces)
        patched.setattr("mambaseq.data.cache._sha256", slow)
        with pytest.raises(DataError, match=r"a\.fa changes while it is read"):
            fasta_store(path, tmp_path)
    assert not list((tmp_path / "stores").iterdir())
    assert BaseTokenizer("keep").decode(fasta_store(path, tmp_path)[0]) == "GGGG"


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.fa", ">a\nACGT\n")

    def pieces(*given: object) -> Iterator[object]:
        time.sleep(0.01)
        path.write_text(">a\nGGGG\n")
        yield from sequence_pieces(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("mambaseq_dna.files.fasta.sequence_pieces", pieces)
        with pytest.raises(DataError, match=r"a\.fa changes while it is read"):
            fasta_store(path, tmp_path)
    assert not list((tmp_path / "stores").iterdir())


def test_an_interrupt_ends_the_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.fa", ">a\nACGT\n")
    ended = []

    def endless(path: Path, cache: object, *, stopped: Callable[[], bool], **_: object) -> dict[str, object]:
        until = time.monotonic() + 5
        while not stopped() and time.monotonic() < until:
            time.sleep(0.01)
        ended.append(stopped())
        raise data_cache.Stopped

    def interrupted(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("mambaseq_dna.files.fasta.fingerprint", endless)
    monkeypatch.setattr("mambaseq_dna.files.fasta.sequence_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fasta_store(path, tmp_path)
    assert ended == [True]
    with pytest.raises(data_cache.Stopped):
        data_cache.fingerprint(path, stopped=lambda: True)


def test_several_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with the error of the first bad one; what is interrupted leaves no store and is built later."""
    paths = [write(tmp_path / f"{k}.fa", f">r{k}\n{'ACGT' * (k + 1)}\n") for k in range(6)]
    stores = fasta_stores(paths, tmp_path / "cache")
    assert [(store.names, len(store.tokens)) for store in stores] == [([f"r{k}"], 4 * k + 4) for k in range(6)]
    write(paths[1], PROTEIN)
    write(paths[4], "ACGT\n")
    with pytest.raises(DataError, match=r"1\.fa, record .* looks like a protein"):
        fasta_stores(paths, tmp_path / "other")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mambaseq_dna.files.fasta.sequence_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fasta_stores(paths[2:4], tmp_path / "third")
    assert list((tmp_path / "third" / "stores").iterdir()) == []
    assert [store.names for store in fasta_stores(paths[2:4], tmp_path / "third")] == [["r2"], ["r3"]]


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


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """It waited for ever: it is looked at, then read."""
    os.mkfifo(tmp_path / "x.fa")
    refused = "is a pipe or device, and sequences are read several times"
    with pytest.raises(DataError, match=refused):
        list(read_fasta(tmp_path / "x.fa", TOKENIZER))
    with pytest.raises(DataError, match=refused):
        fasta_stores([tmp_path / "x.fa"], tmp_path / "cache")
