"""Labelled sequences of one file, or folder: where their bases are, and what is said of them, kept for the next
time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.data.cache import Unchanged, fingerprint
from mambaseq.data.records import Refuse, raised
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import Bed, read_bed
from mambaseq_dna.files.fasta import strand_checksums
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.files.fields import ending
from mambaseq_dna.files.gff import Feature, read_gff
from mambaseq_dna.files.tables import Row, is_parquet, plain_sequence, table_rows
from mambaseq_dna.labelled.headers import fasta_rows
from mambaseq_dna.labelled.layouts import Part, class_files
from mambaseq_dna.tokenizer import BaseTokenizer, InvalidBase

_VERSION = 2
_LINES, _CONTENT = "\nline", "\nsha256"  # names that no column has


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    sequence, columns, name: see `table_rows`. assembly: of intervals. width: bases around an interval's centre; None
    for the interval itself. stranded: intervals on `-` are read as the other strand. features: the types of GFF
    features; all if empty. settings: which setting asks for a column, for messages.
    """

    sequence: str = "sequence"
    columns: Sequence[str] | None = None
    name: str | None = None
    assembly: Assembly | None = None
    width: int | None = None
    stranded: bool = True
    features: Sequence[str] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
    """The sequences of a part.

    stores: of tokens (`BaseTokenizer("keep")`). places: `(sequences, 5)` int64: number of the store, record, start,
        stop, and 1 for the other strand; what is outside of the record is N. lines: `(sequences,)` the line, row or
        number of each in its file. names: "" for what has none. fields: values by the column that was asked for.
        groups: the sequence of the assembly that each interval is on; None for what is no interval. checksum: of its
        contents.
    """

    part: Part
    stores: list[TokenStore]
    places: np.ndarray
    lines: np.ndarray
    names: Sequence[str]
    fields: dict[str, list[str]]
    groups: list[str] | None
    checksum: str

    def __len__(self) -> int:
        return len(self.places)

    def where(self, number: int) -> str:
        """A sequence's file and place in it, for messages."""
        return f"{self.part.path}, {self.place(number)}"

    def place(self, number: int) -> str:
        """A sequence's place in its file."""
        if self.part.kind in ("fasta", "folder"):
            return f"record {shown(self.names[number])}"
        return f"{'row' if is_parquet(self.part.path) else 'line'} {int(self.lines[number]):,}"


def read_source(
    part: Part, reading: Reading, fields: Sequence[str], cache: str | Path | None = None, refuse: Refuse = raised
) -> Source:
    """The sequences of a part, with the values in these columns. Files of sequences are parsed once and kept in the
    cache folder; intervals are read from their assembly. refuse: called for an interval that cannot be used.

    Raises DataError that names file and line for what cannot be used, ConfigError for intervals without an assembly.
    """
    fields = list(dict.fromkeys(fields))
    if part.kind in ("bed", "gff"):
        return _intervals(part, reading, fields, cache, refuse)
    return _stored(part, reading, fields, cache)


def rows_of(part: Part, reading: Reading, fields: Sequence[str], refuse: Refuse = raised) -> Iterator[Row]:
    """The rows of a table, FASTA file, or folder of a class, as they are read. refuse: called for one that cannot be
    used; the others are returned."""
    if part.kind == "table":
        return table_rows(part.path, reading.sequence, reading.name, fields, reading.columns, refuse, reading.settings)
    if part.kind == "fasta":
        return fasta_rows(part.path, fields, refuse)
    return _folder_rows(part.path, refuse)


def _folder_rows(folder: Path, refuse: Refuse) -> Iterator[Row]:
    number = 0
    for path in class_files(folder):
        if ending(path) != ".txt":
            rows = fasta_rows(path, refuse=refuse)
            while True:
                try:
                    row = next(rows, None)
                except DataError as error:
                    refuse(error)
                    break
                if row is None:
                    break
                number += 1
                yield row._replace(line=number)
            continue
        try:
            letters = plain_sequence(path)
            if not letters:
                raise DataError(f"{path} is empty. Remove it, or put a sequence into it.")
            ids = BaseTokenizer("keep").encode(letters)
        except InvalidBase as error:
            refuse(DataError(f"{path}: {error}"))
            continue
        except DataError as error:
            refuse(error)
            continue
        number += 1
        yield Row(number, path.name.partition(".")[0], ids, ())


class _Gathered:
    """Reads rows once, for two stores: of tokens, and of all else."""

    def __init__(self, rows: Callable[[], Iterator[Row]], fields: Sequence[str]) -> None:
        self.rows, self.names = rows, fields
        self.complete = False

    def tokens(self) -> Iterator[tuple[str | None, np.ndarray]]:
        self.lines: list[int] = []
        self.values: list[list[str]] = [[] for _ in self.names]
        content = hashlib.sha256()
        for row in self.rows():
            self.lines.append(row.line)
            for values, value in zip(self.values, row.fields, strict=False):
                values.append(value)
            content.update(f"\n{row.name}\n".encode())
            content.update(row.ids.data)
            yield row.name, row.ids
        self.content = content.hexdigest()
        self.complete = True

    def others(self) -> Iterator[tuple[str | None, np.ndarray]]:
        if not self.complete:
            for _ in self.tokens():
                pass
        yield _LINES, np.array(self.lines, dtype="<i8").view(np.uint8)
        yield _CONTENT, np.frombuffer(self.content.encode(), dtype=np.uint8)
        for name, values in zip(self.names, self.values, strict=True):
            text = "".join(f"{' '.join(value.splitlines())}\n" for value in values)
            yield name, np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)


def _stored(part: Part, reading: Reading, fields: Sequence[str], cache: str | Path | None) -> Source:
    path = part.path
    files = Unchanged([path, *class_files(path)] if part.kind == "folder" else [path])
    if part.kind == "folder":
        states = [[one.name, (state := one.stat()).st_size, state.st_mtime_ns] for one in class_files(path)]
        fields = []
        place = str(
            path.resolve()
        )  # a relative path stands for other folders elsewhere, and times of archives are alike
        meta: dict[str, Any] = {"sources": [{"name": path.name, "states": _digest(repr(states))}], "path": place}
    else:
        meta = {"sources": [fingerprint(path, cache)]}
    meta |= {"what": "labelled", "version": _VERSION, "kind": part.kind, "fields": list(fields)}
    if part.kind == "table":
        columns = None if reading.columns is None else list(reading.columns)
        meta |= {"sequence": reading.sequence, "columns": columns, "name": reading.name}
    gathered = _Gathered(lambda: rows_of(part, reading, fields), fields)
    store = TokenStore.cached(
        path.name, gathered.tokens, "uint8", meta, checksums=strand_checksums, unchanged=files.check, cache=cache
    )
    others = TokenStore.cached(
        path.name, gathered.others, "uint8", {**meta, "of": "fields"}, unchanged=files.check, cache=cache
    )
    kept = {name: others[number] for number, name in enumerate(others.names)}
    values = {name: kept[name].tobytes().decode().split("\n")[:-1] for name in fields}
    places = np.zeros((len(store), 5), dtype=np.int64)
    places[:, 1], places[:, 3] = np.arange(len(store)), store.lengths
    lines = np.frombuffer(kept[_LINES].tobytes(), dtype="<i8")
    checksum = kept[_CONTENT].tobytes().decode() if part.kind == "folder" else meta["sources"][0]["sha256"]
    return Source(part, [store], places, lines, store.names, values, None, checksum)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _intervals(part: Part, reading: Reading, fields: Sequence[str], cache: str | Path | None, refuse: Refuse) -> Source:
    assembly = reading.assembly
    if assembly is None:
        raise ConfigError(
            f"{part.path} holds intervals, without bases. Name the FASTA files that they refer to: data.assembly."
        )
    numbers = {id(store): number for number, store in enumerate(assembly.stores)}
    known: dict[str, tuple[str, int, int, int]] = {}
    faults = Faults(refuse)
    rows, lines, names, groups = [], [], [], []
    values: list[list[str]] = [[] for _ in fields]
    for one in _read_intervals(part, reading):
        line = f"line {one.line:,}"
        where = f"{part.path}, {line}"
        try:
            if one.chrom not in known:
                if faults.named and assembly.find(one.chrom) is None:
                    faults.add(line)
                    continue
                name = assembly.resolve(one.chrom, where)
                store, record = assembly.place(name)
                known[one.chrom] = name, numbers[id(store)], record, int(store.lengths[record])
            name, number, record, length = known[one.chrom]
            if one.stop > length:
                raise DataError(
                    f"{where}: the interval ends at {one.stop:,}, but {shown(name)} has {length:,} bases. Give the "
                    "assembly that the positions refer to (a window around an interval may pass the ends; N stands "
                    "there)."
                )
            told = [_field(one, field, where) for field in fields]
        except DataError as error:
            faults.add(line, error)
            continue
        start, stop = one.start, one.stop
        if reading.width is not None:
            start = (start + stop) // 2 - reading.width // 2
            stop = start + reading.width
        rows.append((number, record, start, stop, reading.stranded and one.strand == "-"))
        lines.append(one.line)
        names.append(f"{name}:{start}-{stop}")
        groups.append(name)
        for column, value in zip(values, told, strict=True):
            column.append(value)
    faults.check()
    if not rows:
        raise DataError(f"{part.path} has no feature of the types in data.features. Name others.")
    return Source(
        part,
        assembly.stores,
        np.array(rows, dtype=np.int64),
        np.array(lines),
        names,
        dict(zip(fields, values, strict=True)),
        groups,
        fingerprint(part.path, cache)["sha256"],
    )


def _read_intervals(part: Part, reading: Reading) -> Iterable[Bed | Feature]:
    if part.kind == "gff":
        return read_gff(part.path, reading.features or None)
    return read_bed(part.path)


def _field(one: Bed | Feature, field: str, where: str) -> str:
    """What an interval has in a column: `chrom`, `name`, `score`, `strand`; `column:7` and on of BED; `type`, or an
    attribute, of GFF."""
    if field == "score":
        return "" if math.isnan(one.score) else f"{one.score:.12g}"
    if field in ("chrom", "strand"):
        return str(getattr(one, field))
    if isinstance(one, Feature):
        if field == "type":
            return one.kind
        if field in one.attributes:
            return one.attributes[field][0]
        raise DataError(
            f"{where}: the feature has no attribute {shown(field)}.{did_you_mean(field, one.attributes)} It has: "
            f"{cut_list(one.attributes, 8)}. Name one that all features have, their types in data.features, or type "
            "(column 3)."
        )
    if field == "name":
        return one.name
    number = field.removeprefix("column:")
    if not field.startswith("column:") or not number.isdecimal() or int(number) < 7:
        raise ConfigError(
            f"A BED file has no column {shown(field)}.{did_you_mean(field, ('chrom', 'name', 'score', 'strand'))} Name "
            "chrom, name, score or strand, or column:7 (and on) by number."
        )
    try:
        return one.rest[int(number) - 7]
    except IndexError:
        raise DataError(
            f"{where}: the line has {6 + len(one.rest)} columns or fewer, so that there is no {field}. Correct it, or "
            "name another column."
        ) from None


def is_row(part: Part) -> bool:
    """Whether a part holds sequences itself, rather than intervals of an assembly."""
    return part.kind not in ("bed", "gff")
