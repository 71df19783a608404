"""Parts of an assembly that a user names: `chr1`, `chr1:1,001-2,000`, or a BED file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mambaseq.errors import DataError, cut_list, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import read_bed

_REGION = re.compile(r"(.+):([\d,]{1,30})-([\d,]{1,30})", re.ASCII)


class Part(NamedTuple):
    """Bases [start, start + len(ids)) of a sequence of `total` bases, counted from 0. ids: of `BaseTokenizer("keep")`.
    label: the name that a BED file gives."""

    name: str
    start: int
    total: int
    ids: np.ndarray
    label: str = ""


def parse_region(text: str) -> tuple[str, int, int] | None:
    """Name, start from 0, and stop of `name:start-end`, counted from 1, the end in it; None for another text.

    >>> parse_region("chr1:1,001-2,000")
    ('chr1', 1000, 2000)
    """
    found = _REGION.fullmatch(text)
    if found is None:
        return None
    first, last = (int(number.replace(",", "") or 0) for number in found.groups()[1:])
    return found[1], first - 1, last


def read_regions(assembly: Assembly, regions: Sequence[str]) -> Iterator[Part]:
    """The regions of an assembly, in the order given, on the forward strand.

    regions: each a sequence's name; name:start-end, counted from 1, the end read too, as browsers and samtools write
        it; or a BED file, which counts from 0 and leaves the end out, and whose strands are not looked at.
    Raises DataError for one that is none of these, is not in the assembly, is empty, or goes beyond a sequence's end.
    """
    lengths, path = assembly.lengths, cut_list(assembly.paths)

    def part(name: str, start: int, stop: int, where: str, label: str = "") -> Part:
        known = assembly.resolve(name, where)
        total = lengths[known]
        if not 0 <= start < stop <= total:
            raise DataError(
                f"{where}: bases {start + 1:,} to {stop:,} are not all in {shown(known)}, which has {total:,} in "
                f"{cut_list(one.name for one in assembly.paths)}. Give regions of this assembly."
            )
        return Part(known, start, total, assembly.read(known, start, stop), label)

    for region in regions:
        where = f"The region {shown(region)}"
        if (known := assembly.find(region)) is not None:
            yield part(known, 0, lengths[known], where)
        elif found := parse_region(region):
            yield part(*found, where)
        elif Path(region).is_file():
            for bed in read_bed(region):
                yield part(bed.chrom, bed.start, bed.stop, f"{region}, line {bed.line:,}", bed.name)
        else:
            raise DataError(
                f"{where} is no sequence of {path}, none such as chr1:1,001-2,000, and no BED file. Check its name."
            )
