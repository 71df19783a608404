"""Reads files of labelled layouts for `predict`: tables, FASTA, folders, intervals, cut and padded as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mambaseq.data.records import Record, Refuse, raised, rest_left_out
from mambaseq.errors import DataError
from mambaseq.limits import check_choice
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.tables import Row
from mambaseq_dna.labelled.items import Align, Sequences, fitted
from mambaseq_dna.labelled.layouts import Format, Part, kind_of, parts_of
from mambaseq_dna.labelled.sources import Reading, is_row, read_source, rows_of
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case


def read_labelled(
    path: str | Path,
    tokenizer: BaseTokenizer,
    format: Format = "auto",
    columns: list[str] | None = None,
    sequence: str = "sequence",
    names: str | None = None,
    assembly: list[str] | str | None = None,
    width: int | None = None,
    stranded: bool = True,
    features: list[str] | None = None,
    length: int | None = None,
    align: Align = "centre",
    pad: bool = False,
    fields: Sequence[str] = (),
    refuse: Refuse = raised,
) -> Iterator[Record]:
    """The sequences of a file, or of a folder, as ids in upper case, in order; labels are not read. A name is that in
    the file, or the row's or line's number, or the interval. N, padding too, does not count: of nothing else there is
    no answer.

    The options are those of the dataset `dna/labelled`; fields: other columns of tables, places in FASTA headers,
    columns of intervals, which records then have. refuse: called for a row or file that cannot be used; the others are
    read.
    Raises DataError as `read_source` does, ConfigError for another format or align.
    """
    check_choice("reader_options.format", format, get_args(Format))
    check_choice("reader_options.align", align, get_args(Align))
    path = Path(path)
    if path.is_dir():
        parts = parts_of(str(path), format, remedy="Name the files, by one of these endings.")
    else:  # predict has no data.format
        parts = [Part(path, kind_of(path, format, "Rename it, so that it ends in one of these."))]
    bases = Assembly(assembly) if assembly and any(not is_row(part) for part in parts) else None
    reading = Reading(sequence, columns, names, bases, width, stranded, tuple(features or ()))
    for part in parts:
        source = str(part.path) if len(parts) > 1 else ""
        rows = _rows(part, reading, fields, length, align, pad, refuse)
        while True:
            try:
                found = next(rows, None)
            except DataError as error:
                refuse(error if refuse is raised else rest_left_out(error, part.path))
                break
            if found is None:
                break
            told, ids, values = found
            more: dict[str, Any] = dict(zip(fields, values, strict=False))
            ids = fold_case(ids)
            known = ids != N
            yield Record(told, ids, scored=None if known.all() else known, source=source, fields=more)


def _rows(
    part: Part, reading: Reading, fields: Sequence[str], length: int | None, align: Align, pad: bool, refuse: Refuse
) -> Iterator[tuple[str, np.ndarray, tuple[str, ...]]]:
    if is_row(part):
        for row in rows_of(part, reading, fields, refuse):
            yield _name(part, row), _cut(row.ids, length, align, pad), row.fields
        return
    source = read_source(part, reading, fields, refuse=refuse)
    places = source.places if length is None else fitted(source.places, length, align, pad)
    sequences = Sequences(source.stores, places)
    for number in range(len(sequences)):
        values = tuple(source.fields[field][number] for field in fields)
        yield source.names[number], sequences.read(number), values


def _name(part: Part, row: Row) -> str:
    return row.name or f"{part.path.name}:{row.line}"


def _cut(ids: np.ndarray, length: int | None, align: Align, pad: bool) -> np.ndarray:
    if length is None or len(ids) == length or (len(ids) < length and not pad):
        return ids
    place = fitted(np.array([[0, 0, 0, len(ids), 0]]), length, align, pad)[0]
    start, stop = int(place[2]), int(place[3])
    inside = ids[max(start, 0) : min(stop, len(ids))]
    return np.pad(inside, (max(-start, 0), max(stop - len(ids), 0)), constant_values=N)
