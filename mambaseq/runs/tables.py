"""Tables of predictions: CSV, TSV, parquet and npz by the name's ending, what domains add (`Domain.tables`), and tables
in memory.

Rows are in order, no spreadsheet takes a cell for a formula, and finished rows survive an error.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import csv
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mambaseq.atomic import atomic_path
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.outputs import Lines, is_stream, output_stream, output_target, safe_cell

COLUMNS = ("file", "record", "start", "stop")
ENDINGS = (".csv", ".tsv", ".parquet", ".npz")

Value = str | int | float


class Words(NamedTuple):
    """A column of words, each one of a few: names[codes]. codes: `(n,)` integers."""

    codes: np.ndarray
    names: Sequence[str]

    def texts(self) -> np.ndarray:
        """`(n,)` objects."""
        return np.array([*self.names, ""], dtype=object)[:-1][self.codes]


Column = np.ndarray | Words


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of one record that follow one another: places [start, stop) in steps, the last of which may be shorter.

    columns: each with a cell a row. known: `(n,)` bool, rows with a prediction; None for all. note: why others have
        none. each: the rows answer for positions, not for a whole that happens to be read in windows.
    """

    start: int
    stop: int
    step: int
    columns: Sequence[Column]
    known: np.ndarray | None = None
    note: str = ""
    each: bool = False

    def starts(self) -> np.ndarray:
        return np.arange(self.start, max(self.stop, self.start + 1), self.step)

    def stops(self) -> np.ndarray:
        return np.minimum(self.starts() + self.step, self.stop)

    @property
    def count(self) -> int:
        return len(self.starts())


def texts_of(column: Column) -> list[str]:
    """Cells as text. Fractions have eight digits."""
    if isinstance(column, Words):
        names = [safe_cell(name) for name in column.names]
        return [names[code] for code in column.codes.tolist()]
    if column.dtype.kind == "f":
        return [f"{value:.8g}" for value in column.tolist()]
    return [str(value) for value in column.tolist()]


def column_of(value: Value) -> Column:
    """A column of one cell."""
    return Words(np.zeros(1, dtype=np.int64), [value]) if isinstance(value, str) else np.array([value])


def named(files: Sequence[Path]) -> str:
    """Files for a message: the first, and how many more there are."""
    return f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"


def partial_path(path: Path) -> Path:
    """The file that keeps the rows finished before an error: `bits.csv` → `bits.partial.csv`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class Table(abc.ABC):
    """Rows of predictions: file, record, start, stop, columns of values, a note.

    A row without a prediction has empty cells and a note that says why. Such rows before the first prediction wait for
    it, because the columns are not known earlier.

    rows: written so far. predicted: those with a prediction. notes: how often each note was written.
    only: the columns to keep, by name; () for all. unit: what rows are, for messages.
    """

    unit = "rows"

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str, int, int, str]] = []
        self._columns: list[str] | None = None
        self._kept: list[int] | None = None
        self.only: Sequence[str] = ()
        self.rows = self.predicted = 0
        self.notes: collections.Counter[str] = collections.Counter()

    def sequence(self, file: str, record: str, length: int) -> None:  # noqa: B027 - most tables have no use for it
        """Called before the rows of a record. length: of the whole sequence that has this name."""

    def sequences(self, file: str, lengths: Mapping[str, int]) -> None:  # noqa: B027 - most tables have no use for it
        """Called before the records of a file of which parts alone are read. lengths: of all its sequences."""

    def told(self) -> str:
        """How much was written, for a message, after `close`."""
        return f"{self.rows:,} {self.unit.removesuffix('s') if self.rows == 1 else self.unit}"

    def begin(self, columns: Sequence[str]) -> None:
        """Set the columns of values, at the first prediction. Names that are taken get an underscore. Raises
        ConfigError if a column that is to be kept does not exist."""
        if self._columns is None:
            if self.only:
                if missing := [name for name in self.only if name not in columns]:
                    raise ConfigError(
                        f"--column {shown(missing[0])}: there is no such column.{did_you_mean(missing[0], columns)} "
                        f"There are: {cut_list(columns)}."
                    )
                self._kept = [number for number, name in enumerate(columns) if name in self.only]
                columns = [columns[number] for number in self._kept]
            taken, names = {*COLUMNS, "note"}, []
            for name in columns:  # a class may have the name of another column
                while name in taken:
                    name += "_"
                taken.add(name)
                names.append(name)
            self._columns = names
            self._header(self._columns)
            for place in self._waiting:
                self._write(place)
            self._waiting.clear()

    def add(
        self, file: str, record: str, start: int, stop: int, values: Sequence[Value] | None, note: str = ""
    ) -> None:
        """One row. values: None if there is no prediction; `note` then says why."""
        if values is not None:
            self.put(file, record, Block(start, stop, max(stop - start, 1), [column_of(value) for value in values]))
            return
        self.rows += 1
        self.notes[note] += 1
        place = file, record, start, stop, note
        if self._columns is None:
            self._waiting.append(place)
        else:
            self._write(place)

    def put(self, file: str, record: str, block: Block) -> None:
        """Rows of a record, after `begin`."""
        if self._kept is not None:
            block = dataclasses.replace(block, columns=[block.columns[number] for number in self._kept])
        self._put(file, record, block)
        count = block.count
        known = count if block.known is None else int(np.count_nonzero(block.known))
        self.rows += count
        self.predicted += known
        if known < count:
            self.notes[block.note] += count - known

    @abc.abstractmethod
    def _header(self, columns: list[str]) -> None: ...

    @abc.abstractmethod
    def _write(self, place: tuple[str, str, int, int, str]) -> None:
        """A row without a prediction."""

    @abc.abstractmethod
    def _put(self, file: str, record: str, block: Block) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is still unwritten."""


class TextTable(Table):
    """CSV or TSV."""

    def __init__(self, file: IO[str], delimiter: str = ",") -> None:
        super().__init__()
        self._file, self._writer = file, csv.writer(Lines(file), delimiter=delimiter)

    def _header(self, columns: list[str]) -> None:
        self._writer.writerow([*COLUMNS, *map(safe_cell, columns), "note"])
        self._empty = [""] * len(columns)

    def _write(self, place: tuple[str, str, int, int, str]) -> None:
        file, record, start, stop, note = place
        self._writer.writerow([safe_cell(file), safe_cell(record), start, stop, *self._empty, safe_cell(note)])

    def _put(self, file: str, record: str, block: Block) -> None:
        named, note = (safe_cell(file), safe_cell(record)), safe_cell(block.note)
        places = zip(block.starts().tolist(), block.stops().tolist(), strict=True)
        cells = zip(*(texts_of(column) for column in block.columns), strict=True)
        known = [True] * block.count if block.known is None else block.known.tolist()
        self._writer.writerows(
            (*named, *place, *values, "") if there else (*named, *place, *self._empty, note)
            for place, values, there in zip(places, cells, known, strict=True)
        )

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Files:
    """The files of a table that the user named `target`: temporary ones, until the table is finished.

    written: what they will be called.
    """

    def __init__(self, target: Path, stack: contextlib.ExitStack) -> None:
        self.target, self._stack = target, stack
        self._temporary: dict[str, tuple[Path, Path]] = {}

    @property
    def written(self) -> list[Path]:
        return [target for _, target in self._temporary.values()]

    def path(self, part: str = "") -> Path:
        """Where to write: the file that the user named, or with a part's name in its own: `out.bw` → `out.PART.bw`."""
        if part not in self._temporary:
            target = self.target
            if part:
                word = re.sub(r"[^\w.+-]", "_", part)[:80]
                target = target.with_name(f"{target.stem}.{word}{target.suffix}")
                if target in self.written:
                    target = target.with_name(f"{target.stem}.{len(self.written)}{target.suffix}")
            self._temporary[part] = self._stack.enter_context(atomic_path(target)), target
        return self._temporary[part][0]

    def keep_partial(self) -> list[Path]:
        """Move what there is to `partial_path`s."""
        kept = []
        for temporary, target in self._temporary.values():
            if temporary.exists():
                temporary.replace(partial_path(target))
                kept.append(partial_path(target))
        return kept


def known_ending(name: Path) -> bool:
    """Whether a name ends as a table of ours, or of a domain's."""
    ending = name.suffix.lower()
    return ending in ENDINGS or any(entry.name.endswith(f"/{ending[1:]}") for entry in catalog()["tables"])


def check_ending(out: Path, home: str = "") -> Path:
    """Where a table named `out` is written (see `output_target`, whose errors are raised). Raises ConfigError for an
    ending that no table has.

    home: the model's domain, whose endings the message names.
    """
    target = output_target(out)
    if out.suffix.lower() not in ("", ".txt") and not known_ending(out) and not is_stream(out):
        others = sorted(
            f".{entry.name.partition('/')[2]}" for entry in catalog()["tables"] if entry.name.startswith(f"{home}/")
        )
        known = cut_list([*ENDINGS, *others])
        raise ConfigError(f"A table is written as {known}, not as {cut(out.name)}. Give another name with --out.")
    return target


def _made(ending: str, home: str) -> Any | None:
    """The class of a domain's table; home: the model's domain, whose table it is if several have one."""
    fitting = [entry.name for entry in catalog()["tables"] if entry.name.partition("/")[2] == ending[1:]]
    if f"{home}/{ending[1:]}" in fitting:
        fitting = [f"{home}/{ending[1:]}"]
    if len(fitting) > 1:
        raise ConfigError(f"--out: several domains write {ending}: {cut_list(fitting)}. Give another ending.")
    return catalog()["tables"].get(fitting[0]) if fitting else None


def _opened(ending: str, files: Files, home: str, stack: contextlib.ExitStack, options: dict[str, Any]) -> Table:
    from mambaseq.runs.columns import ArraysTable, ParquetTable

    if ending == ".parquet":
        return ParquetTable(files.path())
    if ending == ".npz":
        return ArraysTable(files.path())
    if (kind := _made(ending, home)) is not None:
        return kind(files)
    file = stack.enter_context(files.path().open("x", **options))
    return TextTable(file, "\t" if ending == ".tsv" else ",")


@contextlib.contextmanager
def table(out: Path | None, home: str = "", only: Sequence[str] = ()) -> Iterator[tuple[Table, list[Path]]]:
    """A table that is moved to `out` when the block ends without an error, and the files that were written, then. The
    name's ending says the format, CSV for none and for .txt; see `mambaseq.outputs` for links, devices and pipes. None:
    a table in memory.

    home: the model's domain. only: the columns to keep.
    If the block ends with a UserError, with Ctrl-C or for lack of memory, the finished predictions are kept at
    `partial_path(out)`, if there are any; a UserError is raised again and says so. What an earlier one kept there is
    removed once the whole is finished.
    """
    from mambaseq.runs.columns import Frame

    written: list[Path] = []
    rows: Table
    if out is None:
        rows = Frame()
        rows.only = only
        yield rows, written
        return
    target, ending = check_ending(out, home), out.suffix.lower()
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    if is_stream(out):
        if known_ending(out) and ending not in (".csv", ".tsv"):
            raise ConfigError(f"--out {out} is a pipe or device, but {ending[1:]} needs a file. Give a file's name.")
        with output_stream(out, "w", **options) as file:
            rows = TextTable(file, "\t" if ending == ".tsv" else ",")
            rows.only = only
            yield rows, written
        return
    with contextlib.ExitStack() as moved, contextlib.ExitStack() as opened:
        files = Files(target, moved)
        rows = _opened(ending, files, home, opened, options)
        rows.only = only
        try:
            yield rows, written
            rows.close()
            written += files.written
        except (UserError, KeyboardInterrupt, MemoryError) as error:
            if not rows.predicted:
                raise
            rows.close()
            told = f"What was finished before it, {rows.told()}, is in {named(files.keep_partial())}."
            if isinstance(error, UserError):
                raise UserError(f"{error} {told}") from error
            print(f"\n{told}", file=sys.stderr)
            raise
    for path in written:
        with contextlib.suppress(OSError):
            partial_path(path).unlink()
