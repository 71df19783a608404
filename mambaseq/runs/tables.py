"""Tables of predictions: in files (CSV, TSV, parquet, npz, by the name's ending) and in memory.

Rows are in order, no spreadsheet takes a cell for a formula, and finished rows survive an error.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import csv
import itertools
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mambaseq.atomic import atomic_path
from mambaseq.errors import ConfigError, UserError
from mambaseq.outputs import is_stream, output_stream, output_target, safe_cell

if TYPE_CHECKING:
    import pandas

COLUMNS = ("file", "record", "start", "stop")
ENDINGS = (".csv", ".tsv", ".parquet", ".npz")
_GROUP = 2**14  # rows that go to a parquet file together

Value = str | int | float


def partial_path(path: Path) -> Path:
    """The file that keeps the rows finished before an error: `bits.csv` → `bits.partial.csv`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class Table(abc.ABC):
    """Rows of predictions: file, record, start, stop, columns of values, a note.

    A row without a prediction has empty cells and a note that says why. Such rows before the first prediction wait for
    it, because the columns are not known earlier.

    rows: written so far. predicted: those with a prediction. notes: how often each note was written.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str, int, int, str]] = []
        self._columns: list[str] | None = None
        self.rows = self.predicted = 0
        self.notes: collections.Counter[str] = collections.Counter()

    def begin(self, columns: Sequence[str]) -> None:
        """Set the columns of values, at the first prediction. Names that are taken get an underscore."""
        if self._columns is None:
            taken, names = {*COLUMNS, "note"}, []
            for name in columns:  # a class may have the name of another column
                while name in taken:
                    name += "_"
                taken.add(name)
                names.append(name)
            self._columns = names
            self._header(self._columns)
            for place in self._waiting:
                self._write(place, None)
            self._waiting.clear()

    def add(
        self, file: str, record: str, start: int, stop: int, values: Sequence[Value] | None, note: str = ""
    ) -> None:
        """values: None if there is no prediction; `note` then says why."""
        place = file, record, start, stop, note
        self.rows += 1
        if values is None:
            self.notes[note] += 1
            if self._columns is None:
                self._waiting.append(place)
                return
        else:
            self.predicted += 1
        self._write(place, values)

    @abc.abstractmethod
    def _header(self, columns: list[str]) -> None: ...

    @abc.abstractmethod
    def _write(self, place: tuple[str, str, int, int, str], values: Sequence[Value] | None) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is still unwritten."""


class TextTable(Table):
    """CSV or TSV. Fractions have eight digits."""

    def __init__(self, file: IO[str], delimiter: str = ",") -> None:
        super().__init__()
        self._file, self._writer = file, csv.writer(file, delimiter=delimiter)

    def _header(self, columns: list[str]) -> None:
        self._writer.writerow([*COLUMNS, *map(safe_cell, columns), "note"])
        self._empty = [""] * len(columns)

    def _write(self, place: tuple[str, str, int, int, str], values: Sequence[Value] | None) -> None:
        file, record, start, stop, note = place
        cells = self._empty if values is None else [_cell(value) for value in values]
        self._writer.writerow([safe_cell(file), safe_cell(record), start, stop, *cells, safe_cell(note)])

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _cell(value: Value) -> str:
    return f"{value:.8g}" if isinstance(value, float) else safe_cell(str(value))


class _Columns(Table):
    """Rows gathered as columns."""

    def _header(self, columns: list[str]) -> None:
        self.gathered: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *columns, "note")}
        self._names = columns

    def _write(self, place: tuple[str, str, int, int, str], values: Sequence[Value] | None) -> None:
        for name, value in zip((*COLUMNS, "note"), place, strict=True):
            self.gathered[name].append(value)
        for name, cell in itertools.zip_longest(self._names, values or []):
            self.gathered[name].append(cell)


class Frame(_Columns):
    """A table in memory."""

    def close(self) -> None:
        pass

    def frame(self) -> pandas.DataFrame:
        import pandas

        return pandas.DataFrame(self.gathered)


class ParquetTable(_Columns):
    """A parquet file, written in groups of rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._writer: Any = None

    def _write(self, place: tuple[str, str, int, int, str], values: Sequence[Value] | None) -> None:
        super()._write(place, values)
        if len(self.gathered["note"]) >= _GROUP and (values is not None or self._writer is not None):
            self._flush()  # the first row with a prediction, whose values have the columns' types

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if self._writer is None:
            kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
            first = {name: next((v for v in column if v is not None), 0.0) for name, column in self.gathered.items()}
            self._schema = pyarrow.schema([(name, kinds[type(value)]) for name, value in first.items()])
            self._writer = pyarrow.parquet.ParquetWriter(self._path, self._schema)
        self._writer.write_table(pyarrow.table(self.gathered, schema=self._schema))
        for column in self.gathered.values():
            column.clear()

    def close(self) -> None:
        if self._columns is not None:
            self._flush()
            assert self._writer is not None
            self._writer.close()


class ArraysTable(_Columns):
    """An npz file with an array for each column; an embedding's columns are one array, `embedding` `(rows, d_model)`
    float32."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if self._columns is None:
            return
        arrays: dict[str, np.ndarray] = {}
        parts = [name for name in self._names if re.fullmatch(r"embedding_\d+", name)]
        for name, column in self.gathered.items():
            if name in parts:
                continue
            numbers = all(value is None or not isinstance(value, str) for value in column)
            holes = any(value is None for value in column)
            filled = [("" if not numbers else np.nan) if value is None else value for value in column]
            arrays[name] = np.asarray(filled, dtype=np.float64 if holes and numbers else None)
        if parts:
            rows = zip(*(self.gathered[name] for name in parts), strict=True)
            arrays["embedding"] = np.asarray(
                [[np.nan if value is None else value for value in row] for row in rows], dtype=np.float32
            )
        with zipfile.ZipFile(self._path, "w") as archive:  # as np.savez does, which cannot name an array "file"
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)


@contextlib.contextmanager
def table(out: Path | None) -> Iterator[Table]:
    """A table that is moved to `out` when the block ends without an error. The name's ending says the format (CSV for
    any other); see `mambaseq.outputs` for links, devices and pipes. None: a table in memory.

    If the block ends with a UserError, with Ctrl-C or for lack of memory, the finished predictions are kept at
    `partial_path(out)`, if there are any; a UserError is raised again and says so.
    """
    if out is None:
        yield Frame()
        return
    target, ending = output_target(out), out.suffix.lower()
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    delimiter = "\t" if ending == ".tsv" else ","
    if is_stream(out):
        if ending in (".parquet", ".npz"):
            raise ConfigError(f"--out {out} is a pipe or device, but {ending[1:]} needs a file. Give a file's name.")
        with output_stream(out, "w", **options) as file:
            yield TextTable(file, delimiter)
        return
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(target))
        rows: Table
        if ending == ".parquet":
            rows = ParquetTable(temporary)
        elif ending == ".npz":
            rows = ArraysTable(temporary)
        else:
            rows = TextTable(stack.enter_context(temporary.open("x", **options)), delimiter)
        try:
            yield rows
            rows.close()
        except (UserError, KeyboardInterrupt, MemoryError) as error:
            if not rows.predicted:
                raise
            rows.close()
            kept = partial_path(target)
            temporary.replace(kept)
            told = f"The {rows.rows:,} rows finished before it are in {kept}."
            if isinstance(error, UserError):
                raise UserError(f"{error} {told}") from error
            print(f"\n{told}", file=sys.stderr)
            raise
