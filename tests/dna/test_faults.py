"""What is wrong with the rows of a file is told together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mambaseq_dna.files import faults
from mambaseq_dna.files.bed import read_bed
from mambaseq_dna.files.bedgraph import read_bedgraph
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.files.gff import read_gff
from mambaseq_dna.files.vcf import read_variants

from mambaseq.errors import DataError

GFF = "a\tx\tgene\t{}\t{}\t.\t+\t.\tID=a\n"
VCF = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n"


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        (
            read_bed,
            "a\t0\t9\na\t9\t0\na\t1\t4\na\tx\t4\na\n",
            r"line 2: the interval 9 to 0 .* 2 other .*line 4 \('x'.*line 5",
        ),
        (read_bedgraph, "a\t0\t9\t1\na\t9\t12\tx\na\t9\t9\t1\n", r"line 2: .* 1 other .*line 3 \(the interval 9"),
        (
            read_gff,
            GFF.format(1, 4) + GFF.format(0, 4) + "a\tb\n" + GFF.format(2, 1),
            r"line 2: .* 2 other .*line 3 \(.*line 4",
        ),
        (read_variants, VCF + "1\t5\t.\tA\tC\n1\tx\t.\tA\tC\n1\n", r"line 4: the position .* 1 other .*line 5 \("),
        (read_variants, "CHROM,POS,REF,ALT\n1,x,A,C\n1,2,A,C\n1,-1,A,C\n", r"line 2: the pos.* 1 other .*line 4 \("),
    ],
)
def test_wrong_lines_are_told_together(tmp_path: Path, read: Callable[[Path], Any], text: str, told: str) -> None:
    path = tmp_path / "f"
    path.write_text(text)
    found = read(path)
    told_of: list[int] = []
    with pytest.raises(DataError, match=told):
        told_of.extend(one.line for one in found)
    assert len(told_of) <= 1, "nothing is returned after a fault"


def test_many_faults_end_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_MOST", 50)
    many = Faults()
    for number in range(49):
        many.add(f"line {number}", f"x.csv, line {number}: {'wrong ' * 400}")
    with pytest.raises(
        DataError, match=r"49 or more other row\(s\) .*line 1, 2, .* and 38 more \(the same\); and 1 more\.$"
    ) as error:
        many.add("line 49")
    assert len(str(error.value)) < 1000
