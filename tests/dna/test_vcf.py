"""Variants of VCF files and tables: against pysam, and files that are something else."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pysam
import pytest
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.vcf import Variant, read_variants
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_dna.variants.sites import Places

from mambaseq.errors import DataError

HEADER = "##fileformat=VCFv4.2\n##contig=<ID=chr1,length=16>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
SEQUENCE = "ACGTTTGACCAGTNca"


def line(*cells: object) -> str:
    return "\t".join(map(str, cells)) + "\t.\t.\t.\n"


def test_lines_and_places_are_those_of_pysam(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("ACGT"), 400))
    (tmp_path / "a.fa").write_text(f">chr1\n{letters}\n")
    lines = []
    for number in range(60):
        pos, length = int(rng.integers(1, 390)), int(rng.integers(1, 6))
        alts = ["".join(rng.choice(list("ACGT"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        name = f"rs{number}" if number % 2 else "."
        lines.append(line("chr1", pos, name, letters[pos - 1 : pos - 1 + length], ",".join(alts)))
    text = HEADER.replace("length=16", "length=400") + "".join(lines)
    (tmp_path / "a.vcf").write_text(text)
    pysam.tabix_compress(str(tmp_path / "a.vcf"), str(tmp_path / "b.vcf.gz"))
    (tmp_path / "c.vcf.gz").write_bytes(gzip.compress(text.encode()))
    with pysam.VariantFile(str(tmp_path / "a.vcf")) as file, pysam.FastaFile(str(tmp_path / "a.fa")) as fasta:
        theirs = []
        for record in file:
            assert fasta.fetch("chr1", record.start, record.stop) == record.ref
            left, right = max(record.start - 10, 0), min(record.stop + 10, 400)
            flanks = fasta.fetch("chr1", left, record.start), fasta.fetch("chr1", record.stop, right)
            theirs += [(record.chrom, record.pos, record.ref, alt, record.id or "", *flanks) for alt in record.alts]
    assembly = Assembly(tmp_path / "a.fa", tmp_path / "cache")
    for name in ("a.vcf", "b.vcf.gz", "c.vcf.gz"):
        found = list(read_variants(tmp_path / name))
        ours = []
        for variant in found:
            places = Places(assembly, BaseTokenizer(), 20 + len(variant.ref))
            site = places.site([variant])
            flanks = BaseTokenizer().decode(site.before), BaseTokenizer().decode(site.after)
            ours.append((variant.chrom, variant.pos, variant.ref, variant.alt, variant.id, *flanks))
        assert ours == theirs


def test_tables_have_any_order_and_separator(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('\ufeffid,Position,ALT,Reference,chr,more\r\nv1,5,"G,T",A,7,x\r\n.,9,C,T,7,\r\n')
    assert list(read_variants(tmp_path / "t.csv")) == [
        Variant("7", 5, "A", "G", "v1", 2, 0),
        Variant("7", 5, "A", "T", "v1", 2, 1),
        Variant("7", 9, "T", "C", "", 3, 0),
    ]
    (tmp_path / "t.tsv").write_text("#CHROM\tPOS\tREF\tALT\n7\t5\tA\tG\n")  # no ID: a table
    assert list(read_variants(tmp_path / "t.tsv")) == [Variant("7", 5, "A", "G", "", 2, 0)]


BAD = {
    "empty": ("", "is empty"),
    "only a header": (HEADER, "has a header and no variant"),
    "GFF": ("##gff-version 3\nchr1\ts\tgene\t1\t9\t.\t+\t.\tID=a\n", "looks like GFF"),
    "FASTA": (">chr1\nACGT\n", "looks like FASTA"),
    "no header": ("chr1\t5\t.\tA\tG\n", "has no header"),
    "another table": ("gene,score\na,1\n", "no column CHROM, POS, REF, ALT"),
    "blanks for tabs": (HEADER + "chr1 5 . A G\n", "line 4: 'chr1 5 . A G' is not a variant"),
    "no number": (HEADER + line("chr1", "five", ".", "A", "G"), "line 4: the position is 'five'"),
    "negative": (HEADER + line("chr1", "-5", ".", "A", "G"), "line 4: the position is '-5'"),
    "beyond 64 bits": (HEADER + line("chr1", 20 * "9", ".", "A", "G"), "line 4: the position is '999"),
    "long cell": (f"CHROM\tPOS\tREF\tALT\nchr1\t5\t{'A' * 200_000}\tA\n", "line 2: the row cannot be read"),
    "short row": ("CHROM\tPOS\tREF\tALT\nchr1\t5\tA\n", "line 2: .* has 3 columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_named_as_what_they_are(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    (tmp_path / "bad.vcf").write_text(text)
    limit = csv.field_size_limit(131_072)  # tables of sequences raise it
    try:
        with pytest.raises(DataError, match=message) as error:
            list(read_variants(tmp_path / "bad.vcf"))
    finally:
        csv.field_size_limit(limit)
    assert "bad.vcf" in str(error.value)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    """It would be read to its end, and then waited for: nobody writes to this one."""
    os.mkfifo(tmp_path / "pipe.vcf")
    with pytest.raises(DataError, match=r"pipe\.vcf is a pipe or device"):
        list(read_variants(tmp_path / "pipe.vcf"))


def test_a_cut_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "cut.vcf.gz").write_bytes(gzip.compress((HEADER + line("chr1", 1, ".", "A", "G")).encode())[:-9])
    with pytest.raises(DataError, match=r"cut\.vcf\.gz"):
        list(read_variants(tmp_path / "cut.vcf.gz"))


CANNOT = [
    (("chr1", 3, "T", "A"), "REF is T, but the reference has G"),
    (("chr1", 16, "AC", "A"), "not within chr1, which has 16 bases"),
    (("chr1", 17, "A", "C"), "not within chr1, which has 16 bases"),
    (("chr1", 0, "A", "C"), "not within chr1, which has 16 bases"),
    (("chr9", 3, "G", "A"), "the reference has no sequence chr9"),
    (("chr1", 3, "G", "."), "there is no alternative"),
    (("chr1", 3, "G", "*"), "ALT is *: deleted by another variant"),
    (("chr1", 3, "G", "<DEL>"), "ALT is symbolic (<DEL>): its bases are not given"),
    (("chr1", 3, "G", "G]chr2:7]"), "ALT is a breakend (G]chr2:7])"),
    (("chr1", 3, "G", ".A"), "ALT is a breakend (.A)"),
    (("chr1", 3, "G", "g"), "ALT is the same as REF"),
    (("chr1", 3, "G", "N"), "ALT has N or another ambiguous base"),
    (("chr1", 14, "N", "A"), "REF has N or another ambiguous base"),
    (("chr1", 14, "A", "C"), "REF is A, but the reference has N"),
    (("chr1", 3, "G", "E"), "ALT is 'E', which is no sequence of bases"),
    (("chr1", 3, ".", "A"), "REF is '.', which is no sequence of bases"),
    (("chr1", 3, "G", "GAAAAAAA"), "an allele of 8 bases does not fit into a window of 8"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("assembly")
    (folder / "a.fa").write_text(f">chr1\n{SEQUENCE}\n")
    return Places(Assembly(folder / "a.fa", folder / "cache"), BaseTokenizer(), 8)


@pytest.mark.parametrize(("cells", "reason"), CANNOT, ids=[reason for _, reason in CANNOT])
def test_what_cannot_be_scored_has_a_reason(cells: tuple[str, int, str, str], reason: str, places: Places) -> None:
    assert places.why_not(Variant(*cells)) == reason


SITES = [  # POS, REF, ALT: before, after (window 8), by hand on ACGTTTGACCAGTNca
    (("chr1", 7, "G", "T"), "TTT", "ACCA"),
    (("1", 8, "a", "C"), "TTG", "CCAG"),  # case does not count, nor chr
    (("chr1", 4, "TTT", "T"), "CG", "GAC"),  # a deletion with its anchor
    (("chr1", 2, "C", "CAA"), "A", "GTTT"),  # an insertion near the start: fewer before, as many after
    (("chr1", 15, "c", "g"), "AGTN"[-3:], "A"),
    (("chr1", 9, "CC", "TG"), "TGA", "AGT"),
]


@pytest.mark.parametrize(("cells", "before", "after"), SITES)
def test_windows_by_hand(cells: tuple[str, int, str, str], before: str, after: str, places: Places) -> None:
    variant, text = Variant(*cells), BaseTokenizer().decode
    assert places.why_not(variant) == ""
    site = places.site([variant])
    assert (text(site.before), text(site.after)) == (before, after)
    assert text(site.ref) == variant.ref.upper()
    assert [text(alt) for alt in site.alts] == [variant.alt.upper()]
    turned = site.turned(BaseTokenizer())
    other = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
    whole = text(site.whole(site.alts[0]))
    assert text(turned.whole(turned.alts[0])) == "".join(other[base] for base in reversed(whole))


def test_alternatives_keep_the_case_of_the_reference(places: Places) -> None:
    keep = Places(places.assembly, BaseTokenizer("keep"), 8)
    text = BaseTokenizer("keep").decode
    assert text(keep.site([Variant("chr1", 15, "C", "GT")]).alts[0]) == "gt"
    assert text(keep.site([Variant("chr1", 3, "G", "t")]).alts[0]) == "T"
    assert text(keep.site([Variant("chr1", 15, "C", "G")]).before) == "GTN"
