"""Reads GFF3 and GTF: features of an assembly, which count bases from 1 and include the last one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.bed import text_lines
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.files.fields import whole

STRANDS = ("+", "-", ".", "?")
_COLUMNS = "sequence, source, type, start, end, score, strand, phase, attributes"
_KINDS_TOLD = 1000
_GTF_PART = re.compile(r'\s*([^\s;"]+)\s+(?:"([^"]*)"|([^\s;"]+))\s*(?:;|$)')
_NAMES = ("Name", "gene_name", "gene", "ID", "transcript_id", "gene_id")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One line, in the positions of BED: `[start, stop)`, counted from 0.

    kind: column 3, such as `CDS`. score is nan and phase None where the file has a point. strand: `+`, `-`, `.` (none)
    or `?` (unknown). raw: column 9 as it is in the file. path, line: where it was read.
    """

    chrom: str
    source: str
    kind: str
    start: int
    stop: int
    score: float
    strand: str
    phase: int | None
    raw: str
    path: Path
    line: int

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """The values of each attribute: of GFF3 those between commas, unescaped; of GTF those of a repeated key.

        Raises DataError that names file and line for text that is neither GFF3's `key=value` nor GTF's `key "value"`.
        """
        return _attributes(self.raw, f"{self.path}, line {self.line:,}")

    @property
    def name(self) -> str:
        """The first value of `Name`, `gene_name`, `gene`, `ID`, `transcript_id` or `gene_id`; "" if there is none."""
        return next((self.attributes[key][0] for key in _NAMES if key in self.attributes), "")


def _attributes(raw: str, where: str) -> dict[str, tuple[str, ...]]:
    text = raw.strip()
    if text in ("", "."):
        return {}
    found: dict[str, tuple[str, ...]] = {}
    if re.match(r'[^\s="]+=', text):
        for part in filter(None, map(str.strip, text.split(";"))):
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise DataError(
                    f"{where}: {shown(part)} is not an attribute. GFF3 has key=value, separated by semicolons; a "
                    "semicolon in a value is written %3B."
                )
            found[unquote(key)] = found.get(unquote(key), ()) + tuple(map(unquote, value.split(",")))
        return found
    place = 0
    while place < len(text):
        match = _GTF_PART.match(text, place)
        if match is None:
            raise DataError(
                f"{where}: the attributes {shown(text[place:])} cannot be read. GFF3 has key=value, and GTF has "
                'key "value"; each is followed by a semicolon.'
            )
        key, quoted, bare = match.groups()
        found[key] = (*found.get(key, ()), quoted if quoted is not None else bare)
        place = match.end()
    return found


def read_gff(path: str | Path, kinds: Collection[str] | None = None) -> Iterator[Feature]:
    """The features of a GFF3 or GTF file, plain or packed, in file order; comments and sequences behind `##FASTA` are
    left out.

    kinds: only features of these types (column 3); None for all.

    Raises DataError that names file and line: another number of columns than 8 or 9, positions that are no whole
    numbers from 1 on, an end before the start, another strand than `+`, `-`, `.` and `?`, another phase than 0, 1, 2
    and a point; for a file without features; and ConfigError for a kind that no feature has.
    """
    path = Path(path)
    others: Counter[str] = Counter()
    missing = set(kinds or ())
    found, faults = False, Faults()
    for number, line in text_lines(path):
        if line.startswith(("##FASTA", ">")):
            break
        if line.startswith("#") or not line.strip():
            continue
        cells = line.split("\t")
        place = f"line {number:,}"
        if len(cells) not in (8, 9):
            faults.add(
                place,
                f"{path}, {place}: {shown(line)} has {len(cells)} columns between tabs, not 9 ({_COLUMNS}). Is it GFF3 "
                "or GTF?",
            )
            continue
        found = True
        if kinds is not None:
            if cells[2] not in kinds:
                if cells[2] in others or len(others) < _KINDS_TOLD:
                    others[cells[2]] += 1
                continue
            missing.discard(cells[2])
        try:
            feature = _feature(cells, path, number)
        except DataError as error:
            faults.add(place, error)
            continue
        if not faults.count:
            yield feature
    faults.check()
    if not found:
        raise DataError(f"{path} has no feature. Check that it is the right file.")
    if missing:
        kind, known = min(missing), [one for one, _ in others.most_common()]
        also = sorted(set(kinds or ()) - missing)
        raise ConfigError(
            f"{path} has no feature of type {shown(kind)} (column 3).{did_you_mean(kind[:80], known)} It has: "
            f"{cut_list([*also, *known], most=12)}."
        )


def _feature(cells: list[str], path: Path, number: int) -> Feature:
    where = f"{path}, line {number:,}"
    try:
        first, last = whole(cells[3]), whole(cells[4])
    except ValueError as error:
        raise DataError(
            f"{where}: {shown(cells[3])} and {shown(cells[4])} (columns 4 and 5) are not whole numbers: a first base, "
            "counted from 1, and a last one."
        ) from error
    if not 1 <= first <= last:
        raise DataError(
            f"{where}: there are no bases {first:,} to {last:,}. GFF counts from 1, includes the last base, and has "
            "the smaller number first on either strand. A BED file counts from 0."
        )
    if cells[6] not in STRANDS:
        raise DataError(f"{where}: the strand (column 7) is {shown(cells[6])}. It is +, -, a point or ?.")
    if cells[7] not in ("0", "1", "2", "."):
        raise DataError(f"{where}: the phase (column 8) is {shown(cells[7])}. It is 0, 1, 2 or a point.")
    try:
        score = float("nan") if cells[5] == "." else float(cells[5])
    except ValueError as error:
        raise DataError(f"{where}: the score (column 6) is {shown(cells[5])}, not a number or a point.") from error
    phase = None if cells[7] == "." else int(cells[7])
    raw = cells[8] if len(cells) > 8 else ""
    return Feature(cells[0], cells[1], cells[2], first - 1, last, score, cells[6], phase, raw, path, number)
