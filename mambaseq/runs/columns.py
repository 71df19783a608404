"""Tables that are kept by columns: in memory, parquet and npz. Files are written piece by piece, in bounded memory."""

from __future__ import annotations

import abc
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mambaseq.runs.tables import Block, Column, Table, Words

if TYPE_CHECKING:
    import pandas

_GROUP = 2**14  # rows that go to a file together


class Rows(NamedTuple):
    """A piece of a table: columns by name, COLUMNS first and the note last; unknown cells hold anything."""

    columns: dict[str, Column]
    known: np.ndarray


def _joined(columns: Sequence[Column]) -> Column:
    first = columns[0]
    if not isinstance(first, Words):
        return np.concatenate([column for column in columns if not isinstance(column, Words)])
    codes, names = [], dict[str, int]()
    for column in columns:
        assert isinstance(column, Words)
        numbers = np.array([names.setdefault(name, len(names)) for name in column.names], dtype=np.int64)
        codes.append(numbers[column.codes])
    return Words(np.concatenate(codes), list(names))


def _filled(column: Column, known: np.ndarray) -> np.ndarray:
    """A column as one array: objects with None, or numbers with NaN, for cells that are not known."""
    if isinstance(column, Words):
        texts = column.texts()
        texts[~known] = None
        return texts
    return column if known.all() else np.where(known, column, np.nan)


class _Gathered(NamedTuple):
    """Rows of one record; columns None for a row without a prediction."""

    file: str
    record: str
    starts: np.ndarray
    stops: np.ndarray
    columns: Sequence[Column] | None
    known: np.ndarray
    note: str


def _repeated(texts: Sequence[str], counts: Sequence[int]) -> Words:
    names: dict[str, int] = {}
    codes = [names.setdefault(text, len(names)) for text in texts]
    return Words(np.repeat(codes, counts), list(names))


class ColumnsTable(Table):
    """Gathers rows to pieces of `_GROUP` or more."""

    def __init__(self) -> None:
        super().__init__()
        self._gathered: list[_Gathered] = []
        self._count = 0
        self._like: list[Column] | None = None  # a cell of each column, for rows that have none

    def _header(self, columns: list[str]) -> None:
        self._names = columns

    def _write(self, place: tuple[str, str, int, int, str]) -> None:
        file, record, start, stop, note = place
        there = np.zeros(1, dtype=bool)
        self._gather(_Gathered(file, record, np.array([start]), np.array([stop]), None, there, note))

    def _put(self, file: str, record: str, block: Block) -> None:
        known = np.ones(block.count, dtype=bool) if block.known is None else block.known
        if self._like is None:
            self._like = [
                Words(np.zeros(1, np.int64), [""]) if isinstance(one, Words) else np.zeros(1, one.dtype)
                for one in block.columns
            ]
        self._gather(_Gathered(file, record, block.starts(), block.stops(), block.columns, known, block.note))

    def _gather(self, rows: _Gathered) -> None:
        self._gathered.append(rows)
        self._count += len(rows.known)
        if self._count >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._gathered or self._like is None:  # the first prediction says what kinds of values there are
            return
        gathered, counts = self._gathered, [len(rows.known) for rows in self._gathered]
        known = np.concatenate([rows.known for rows in gathered])
        columns: dict[str, Column] = {
            "file": _repeated([rows.file for rows in gathered], counts),
            "record": _repeated([rows.record for rows in gathered], counts),
            "start": np.concatenate([rows.starts for rows in gathered]),
            "stop": np.concatenate([rows.stops for rows in gathered]),
        }
        for number, name in enumerate(self._names):
            cells = [self._like[number] if rows.columns is None else rows.columns[number] for rows in gathered]
            columns[name] = _joined(cells)
        notes = _repeated(["", *(rows.note for rows in gathered)], [0, *counts])
        columns["note"] = Words(np.where(known, 0, notes.codes), notes.names)
        self._piece(Rows(columns, known))
        self._gathered, self._count = [], 0

    @abc.abstractmethod
    def _piece(self, rows: Rows) -> None: ...


class Frame(ColumnsTable):
    """A table in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[Rows] = []

    def _piece(self, rows: Rows) -> None:
        self._pieces.append(rows)

    def close(self) -> None:
        self._flush()

    def frame(self) -> pandas.DataFrame:
        import pandas

        self.close()
        known = np.concatenate([piece.known for piece in self._pieces])
        found = {}
        for name in self._pieces[0].columns:
            column = _joined([piece.columns[name] for piece in self._pieces])
            found[name] = _filled(column, known if name in self._names else np.ones(len(known), dtype=bool))
        return pandas.DataFrame(found)


class ParquetTable(ColumnsTable):
    """A parquet file, written in groups of rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._writer: Any = None

    def _piece(self, rows: Rows) -> None:
        import pyarrow
        import pyarrow.parquet

        arrays = {}
        for name, column in rows.columns.items():
            mask = ~rows.known if name in self._names else None
            if isinstance(column, Words):
                arrays[name] = pyarrow.array(column.texts(), pyarrow.string(), mask=mask)
            else:
                kind = pyarrow.float64() if column.dtype.kind == "f" else pyarrow.int64()
                arrays[name] = pyarrow.array(column.astype(kind.to_pandas_dtype()), kind, mask=mask)
        table = pyarrow.table(arrays)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._columns is not None:
            self._flush()
            if self._writer is not None:
                self._writer.close()


class _Spool:
    """Arrays of one type that wait in a file, `(n, *shape)` in all."""

    def __init__(self, folder: Path, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self.dtype, self.shape, self.count = np.dtype(dtype), shape, 0
        self.integers = False  # float64 that stands for integers, since NaN may come

    def add(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def pieces(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        size = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        while read := self._file.read(2**14 * size):
            yield np.frombuffer(read, dtype=self.dtype).reshape(-1, *self.shape)

    def close(self) -> None:
        self._file.close()


class ArraysTable(ColumnsTable):
    """An npz file with an array for each column; an embedding's columns are one array, `embedding` `(rows, d_model)`
    float32. Arrays wait in files next to it until their lengths are known."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._spools: dict[str, _Spool] = {}
        self._words: dict[str, dict[str, int]] = {}
        self._holes = False

    def _spool(self, name: str, dtype: Any, shape: tuple[int, ...] = ()) -> _Spool:
        if name not in self._spools:
            self._spools[name] = _Spool(self._path.parent, dtype, shape)
        return self._spools[name]

    def _piece(self, rows: Rows) -> None:
        parts = [name for name in self._names if re.fullmatch(r"embedding_\d+", name)]
        self._holes = self._holes or not rows.known.all()
        for name, column in rows.columns.items():
            ours = rows.known if name in self._names else np.ones(len(rows.known), dtype=bool)
            if name in parts:
                continue
            if isinstance(column, Words):
                words = self._words.setdefault(name, {"": 0})
                numbers = np.array([words.setdefault(one, len(words)) for one in column.names], dtype=np.int32)
                self._spool(name, np.int32).add(np.where(ours, numbers[column.codes], 0))
            elif name in self._names:
                spool = self._spool(name, np.float64)
                spool.add(np.where(ours, column, np.nan))
                spool.integers = column.dtype.kind != "f"
            else:
                self._spool(name, np.int64).add(column)
        if parts:
            vectors = [column for column in map(rows.columns.get, parts) if isinstance(column, np.ndarray)]
            values = np.stack(vectors, axis=1).astype(np.float32)
            values[~rows.known] = np.nan
            self._spool("embedding", np.float32, (len(parts),)).add(values)

    def _converted(self, name: str, spool: _Spool) -> tuple[np.dtype, Iterator[np.ndarray]]:
        if name in self._words:
            names = np.array(list(self._words[name]))
            return names.dtype, (names[piece] for piece in spool.pieces())
        dtype = np.dtype(np.int64) if spool.integers and not self._holes else spool.dtype
        return dtype, (piece.astype(dtype) for piece in spool.pieces())

    def close(self) -> None:
        if self._columns is None:
            return
        self._flush()
        with zipfile.ZipFile(self._path, "w") as archive:  # as np.savez does, which cannot name an array "file"
            for name, spool in self._spools.items():
                dtype, pieces = self._converted(name, spool)
                header = {"descr": dtype.str, "fortran_order": False, "shape": (spool.count, *spool.shape)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for piece in pieces:
                        file.write(piece.tobytes())
                spool.close()
