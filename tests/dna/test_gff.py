"""GFF3 and GTF: positions worked out by hand, attributes, and what is refused with file and line."""

from __future__ import annotations

import lzma
import math

import pytest
from mambaseq_dna.files.gff import read_gff

from mambaseq.errors import ConfigError, DataError

GFF3 = """\
##gff-version 3
chr1\tsgd\tgene\t3\t8\t.\t+\t.\tID=g1;Name=ABC%3B1;Alias=a,b%2Cc
chr1\tsgd\tCDS\t3\t8\t0.5\t+\t0\tID=c1;Parent=g1
# a comment

chr2\tsgd\tCDS\t1\t1\t.\t-\t2\t.
chr2\tsgd\tregion\t1\t9\t.\t?\t.
##FASTA
>chr1
ACGT
"""
GTF = (
    'chr1\tx\texon\t3\t8\t.\t-\t.\tgene_id "G 1"; transcript_id "T;1"; tag "basic"; tag "CCDS"; exon_number 2;\r\n'
    'chr1\tx\tCDS\t4\t8\t.\t-\t0\tgene_id "G 1"; gene_name ""'
)


def test_features_of_gff3_count_from_0_and_leave_the_end_out(tmp_path):
    (tmp_path / "a.gff3.xz").write_bytes(lzma.compress(GFF3.encode()))
    gene, cds, one, region = read_gff(tmp_path / "a.gff3.xz")
    assert [(f.chrom, f.kind, f.start, f.stop, f.strand, f.phase, f.line) for f in (gene, cds, one, region)] == [
        ("chr1", "gene", 2, 8, "+", None, 2),  # bases 3 to 8 of 1, 2, ... are 2 to 7 of 0, 1, ...
        ("chr1", "CDS", 2, 8, "+", 0, 3),
        ("chr2", "CDS", 0, 1, "-", 2, 6),  # one base, the first
        ("chr2", "region", 0, 9, "?", None, 7),
    ]
    assert len(gene) == 6
    assert math.isnan(gene.score)
    assert cds.score == 0.5
    assert gene.attributes == {"ID": ("g1",), "Name": ("ABC;1",), "Alias": ("a", "b,c")}
    assert (gene.name, cds.name, one.name, region.name) == ("ABC;1", "c1", "", "")
    assert [f.line for f in read_gff(tmp_path / "a.gff3.xz", {"CDS"})] == [3, 6]


def test_attributes_of_gtf(tmp_path):
    (tmp_path / "a.gtf").write_text(GTF, newline="")
    exon, cds = read_gff(tmp_path / "a.gtf")
    assert exon.attributes == {
        "gene_id": ("G 1",),
        "transcript_id": ("T;1",),
        "tag": ("basic", "CCDS"),
        "exon_number": ("2",),
    }
    assert (exon.start, exon.stop, exon.strand, exon.name) == (2, 8, "-", "T;1")
    assert cds.attributes == {"gene_id": ("G 1",), "gene_name": ("",)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("chr1 x CDS 3 8 . + 0 ID=a", ["1 columns", "not 9", "GFF3 or GTF"]),
        ("chr1\tx\tCDS\tthree\t8\t.\t+\t0\tID=a", ["'three'", "counted from 1"]),
        ("chr1\tx\tCDS\t0\t8\t.\t+\t0\tID=a", ["0 to 8", "from 1"]),
        ("chr1\tx\tCDS\t8\t3\t.\t-\t0\tID=a", ["8 to 3", "smaller number first"]),
        ("chr1\tx\tCDS\t3\t8\t.\tplus\t0\tID=a", ["'plus'", "column 7"]),
        ("chr1\tx\tCDS\t3\t8\thigh\t+\t0\tID=a", ["'high'", "column 6"]),
        ("chr1\tx\tCDS\t3\t8\t.\t+\t3\tID=a", ["'3'", "column 8"]),
        ("chr1\tx\tCDS\t3\t8\t.\t+\t0\tID=a;b", ["'b'", "key=value"]),
        ('chr1\tx\tCDS\t3\t8\t.\t+\t0\tgene_id "a', ["cannot be read", 'key "value"']),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "bad.gff").write_text(f"# one\nchr1\tx\tgene\t1\t2\t.\t+\t.\tID=g\n{line}\n")
    with pytest.raises(DataError) as error:
        [feature.attributes for feature in read_gff(tmp_path / "bad.gff")]
    assert all(word in str(error.value) for word in ["bad.gff, line 3", *words])
    assert len(str(error.value)) < 1000


def test_no_features_and_types_that_there_are_not(tmp_path):
    (tmp_path / "empty.gff").write_text("##gff-version 3\n")
    with pytest.raises(DataError, match="has no feature"):
        list(read_gff(tmp_path / "empty.gff"))
    (tmp_path / "a.gff").write_text("c\tx\tgene\t1\t2\t.\t+\t.\tID=g\nc\tx\tCDS\t1\t2\t.\t+\t.\tID=g\n")
    with pytest.raises(ConfigError, match=r"no feature of type 'cds'.*Did you mean 'CDS'.*It has: .*gene"):
        list(read_gff(tmp_path / "a.gff", ["gene", "cds"]))
