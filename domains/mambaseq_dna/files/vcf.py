"""Reads variants: VCF files (the VCF 4.x columns 1 to 5), and tables with columns CHROM, POS, REF and ALT."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mambaseq.data.unpacking import Unreadable, read_pieces
from mambaseq.errors import DataError, shown
from mambaseq_dna.files.bed import text_lines
from mambaseq_dna.files.faults import parsed
from mambaseq_dna.files.fields import whole

_NAMES = {  # of a table's columns, in lower case and without a # before them
    "chrom": ("chrom", "chr", "chromosome", "seqname"),
    "pos": ("pos", "position"),
    "ref": ("ref", "reference", "ref_allele"),
    "alt": ("alt", "alternate", "alternative", "alt_allele"),
}
_LOOKS_LIKE = (
    (b"BCF", "it is BCF; convert it (bcftools view -O z)"),
    (b"##gff", "it looks like GFF, which holds features, not variants"),
    (b">", "it looks like FASTA, which is what --reference takes"),
    (b"track", "it looks like BED, which holds intervals, not variants"),
)
_VCF = b"##"  # its first line is ##fileformat=VCFv4.x
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One alternative of a line. pos: of REF's first base, from 1, as in the file. alt: one of the line's alternatives,
    as it is written there; number: which one, from 0. id: "" for none."""

    chrom: str
    pos: int
    ref: str
    alt: str
    id: str = ""
    line: int = 0
    number: int = 0


def is_vcf(path: str | Path) -> bool:
    """Whether a file begins as a VCF does, and not as a table. Raises DataError for a file that is neither, and for a
    pipe, which cannot be read a second time."""
    path = Path(path)
    if path.is_fifo() or path.is_char_device() or path.is_socket():
        raise DataError(
            f"{path} is a pipe or device, and variants are read several times. Give a file: packed ones (.vcf.gz) are "
            "read as they are; write what a command prints into one first."
        )
    try:
        piece = next((piece for piece in read_pieces(path) if piece.strip()), b"").removeprefix(_BOM).lstrip()
    except Unreadable as error:
        raise error.at("before any variant") from error
    if not piece:
        raise DataError(f"{path} is empty. Check that it was copied or written completely.")
    for begin, told in _LOOKS_LIKE:
        if piece.startswith(begin):
            raise DataError(f"{path} is not a VCF file or a table of variants: {told}.")
    first = piece.partition(b"\n")[0].rstrip(b"\r")
    return first.startswith(_VCF) or (first.startswith(b"#CHROM\t") and first.split(b"\t")[2:3] == [b"ID"])


def read_variants(path: str | Path) -> Iterator[Variant]:
    """The variants of a VCF file or of a table, plain or packed, in file order: one for each alternative of a line.

    A table has a header with CHROM, POS (from 1), REF and ALT, in any case and order, with tabs or commas between them.
    Alleles that are no bases (`*`, `.`, `<DEL>`, breakends) are returned as they are.
    Raises DataError that names file and line: for a file of another kind, one without header or variants, a line with
    fewer columns, and a position that is not a whole number.
    """
    path = Path(path)
    found = False
    for variant in _of_vcf(path) if is_vcf(path) else _of_table(path):
        found = True
        yield variant
    if not found:
        raise DataError(f"{path} has a header and no variant. Check that it is the right file.")


def _of_vcf(path: Path) -> Iterator[Variant]:
    def parse(number: int, line: str) -> list[Variant]:
        if not line.strip() or line.startswith("#"):
            return []
        cells = line.split("\t")
        if len(cells) < 5:
            raise DataError(
                f"{path}, line {number:,}: {shown(line)} is not a variant. A VCF line has CHROM, POS, ID, REF and ALT, "
                "separated by tabs."
            )
        chrom, pos, name, ref, alts = cells[:5]
        return _variants(path, number, chrom, pos, "" if name == "." else name, ref, alts)

    return parsed(text_lines(path), parse)


def _of_table(path: Path) -> Iterator[Variant]:
    lines = text_lines(path)
    number, line = next((one for one in lines if one[1].strip()), (1, ""))
    delimiter = "\t" if "\t" in line else ","
    places = _header(path, number, _cells(path, number, line, delimiter))

    def parse(number: int, line: str) -> list[Variant]:
        if not line.strip() or line.startswith("#"):
            return []
        cells = _cells(path, number, line, delimiter)
        if len(cells) <= max(places):
            raise DataError(f"{path}, line {number:,}: {shown(line)} has {len(cells)} columns, fewer than the header.")
        chrom, pos, ref, alts = (cells[place].strip() for place in places[:4])
        name = cells[places[4]].strip() if len(places) > 4 else ""
        return _variants(path, number, chrom, pos, "" if name == "." else name, ref, alts)

    return parsed(lines, parse)


def _cells(path: Path, number: int, line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:  # a cell of more than 131,072 characters, unless a table of sequences was read before
        raise DataError(f"{path}, line {number:,}: the row cannot be read ({error}). Leave it out.") from error


def _header(path: Path, number: int, cells: list[str]) -> list[int]:
    """The places of CHROM, POS, REF, ALT and, where there is one, ID."""
    names = [cell.strip().lower().removeprefix("#") for cell in cells]
    places = [next((names.index(name) for name in known if name in names), -1) for known in _NAMES.values()]
    if -1 not in places:
        return places + ([names.index("id")] if "id" in names else [])
    if len(cells) > 1 and cells[1].strip().isdigit():
        raise DataError(
            f"{path}, line {number:,}: the file begins with {shown(' '.join(cells))} and has no header. Put one before "
            "it: ##fileformat=VCFv4.2 and #CHROM POS ID REF ALT for VCF, or CHROM POS REF ALT for a table."
        )
    missing = ", ".join(key.upper() for key, place in zip(_NAMES, places, strict=True) if place == -1)
    raise DataError(
        f"{path}, line {number:,}: {shown(' '.join(cells))} is neither the beginning of a VCF file nor a table's "
        f"header: it has no column {missing}. Give a VCF file, or a table with CHROM, POS (from 1), REF and ALT."
    )


def _variants(path: Path, line: int, chrom: str, pos: str, name: str, ref: str, alts: str) -> list[Variant]:
    try:
        place = whole(pos)
    except ValueError as error:
        raise DataError(
            f"{path}, line {line:,}: the position is {shown(pos)}, which is not a whole number, counted from 1."
        ) from error
    return [Variant(chrom, place, ref, alt, name, line, number) for number, alt in enumerate(alts.split(","))]
