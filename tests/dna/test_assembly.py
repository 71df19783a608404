"""An assembly gives the bases of any interval, against slices by hand; BED lines are read and refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import read_bed
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.errors import DataError


@pytest.fixture
def assembly(tmp_path: Path) -> Assembly:
    (tmp_path / "one.fa").write_text(">chr1 first\nACGTac\ngtNN\n>chrM\nTTTT\n")
    (tmp_path / "two.fa").write_text(">7\nGATTACA\n")
    return Assembly([tmp_path / "one.fa", str(tmp_path / "t*.fa")], cache=tmp_path / "cache")


def text(ids) -> str:
    return BaseTokenizer("keep").decode(ids)


def test_intervals_of_both_strands(assembly: Assembly) -> None:
    assert assembly.lengths == {"chr1": 10, "chrM": 4, "7": 7}
    assert text(assembly.read("chr1", 2, 8)) == "GTacgt"
    assert text(assembly.read("1", 2, 8, "-")) == "acgtAC"
    assert text(assembly.read("chr7", -2, 9)) == "NNGATTACANN"
    assert text(assembly.read("MT", 10, 12)) == "NN"
    assert text(pickle.loads(pickle.dumps(assembly)).read("7", 0, 3)) == "GAT"
    assert sorted(assembly.sources()) == ["one.fa", "two.fa"]


def test_unknown_and_ambiguous_names(assembly: Assembly, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calls.bed, line 3: the assembly \(one.fa, two.fa\) has no sequence 'chr2'"):
        assembly.resolve("chr2", "calls.bed, line 3")
    (tmp_path / "twice.fa").write_text(">7\nACGT\n")
    with pytest.raises(DataError, match="Two files of the assembly have a sequence '7'"):
        Assembly([tmp_path / "two.fa", tmp_path / "twice.fa"], cache=tmp_path / "cache")


def test_bed(tmp_path: Path) -> None:
    path = tmp_path / "a.bed"
    path.write_bytes(b"\xef\xbb\xbf#made\r\ntrack name=x\r\nchr1\t0\t5\tgene a\t3.5\t-\tmore\r\nchr1 5 6\n")
    first, second = read_bed(path)
    assert (first.chrom, first.start, first.stop, first.name, first.score, first.strand) == (
        "chr1",
        0,
        5,
        "gene a",
        3.5,
        "-",
    )
    assert first.rest == ("more",)
    assert (len(second), second.strand, second.line) == (1, ".", 4)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("chr1\t5", "line 2: 'chr1\\\\t5' is not an interval"),
        ("chr1\tx\t5", "are not whole numbers"),
        ("chr1\t5\t5", "the interval 5 to 5 is empty"),
        ("chr1\t-1\t5", "are not whole numbers"),
        ("chr1\t1\t" + 20 * "9", "are not whole numbers"),
        ("chr1\t1_0\t20", "are not whole numbers"),
        ("chr1\t1\t5\ta\t0\t*", r"the strand \(column 6\) is '\*'"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "a.bed"
    path.write_text(f"chr1\t0\t5\n{line}\n")
    with pytest.raises(DataError, match=why):
        list(read_bed(path))


def test_no_interval(tmp_path: Path) -> None:
    (tmp_path / "a.bed").write_text("#only\n")
    with pytest.raises(DataError, match="has no interval"):
        list(read_bed(tmp_path / "a.bed"))
