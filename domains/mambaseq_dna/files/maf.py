"""Reads multiple alignments (MAF, the UCSC format): blocks of aligned pieces of several genomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mambaseq.errors import DataError, shown
from mambaseq_dna.files.bed import text_lines


@dataclasses.dataclass(frozen=True, slots=True)
class Aligned:
    """A row of a block: `size` bases of `source` from `start` on, counted from 0 on its strand. text has gaps (`-`)."""

    source: str
    start: int
    size: int
    strand: str
    length: int
    text: str

    @property
    def bases(self) -> str:
        """The text without gaps."""
        return self.text.replace("-", "")


def read_maf(path: str | Path) -> Iterator[list[Aligned]]:
    """The blocks of a MAF file, plain or packed, in file order.

    Raises DataError that names file and line, for a row that is not one of an alignment.
    """
    block: list[Aligned] = []
    for number, line in text_lines(path):
        kind = line[:1]
        if kind == "s":
            cells = line.split()
            try:
                _, source, start, size, strand, length, text = cells
                row = Aligned(source, int(start), int(size), strand, int(length), text)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number:,}: {shown(line[:80])} is not a row of an alignment (s, source, start, "
                    "size, strand, length of the source, text). Is it a MAF file?"
                ) from error
            if len(row.bases) != row.size:
                raise DataError(f"{path}, line {number:,}: the row says {row.size:,} bases and has {len(row.bases):,}.")
            block.append(row)
        elif block and (kind == "a" or not line.strip()):
            yield block
            block = []
    if block:
        yield block
