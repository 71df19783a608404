"""Where scores of variants go: a table in memory, CSV, TSV or parquet, or the VCF with fields added."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from mambaseq.atomic import atomic_path
from mambaseq.errors import ConfigError, UserError
from mambaseq.outputs import is_stream, output_file, output_target, safe_cell
from mambaseq.runs.tables import partial_path
from mambaseq_dna.files.bed import text_lines

if TYPE_CHECKING:
    import pandas

ENDINGS = (".csv", ".tsv", ".parquet", ".vcf")


def check_ending(out: Path, endings: Sequence[str] = ENDINGS) -> None:
    """Raise ConfigError for a name that says no known format."""
    output_target(out)
    if not is_stream(out) and out.suffix.lower() not in endings:
        raise ConfigError(f"--out {out} must end in {', '.join(endings[:-1])} or {endings[-1]}: that says the format.")


class Rows(Protocol):
    """A table that is written a part after the other."""

    def add(self, frame: pandas.DataFrame) -> None:
        """The next rows."""

    def finish(self) -> None:
        """All rows have been added."""

    def keep(self, path: Path) -> None:
        """Copy what was added to another file."""


class _Text:
    """CSV or TSV. Fractions have eight digits, and no spreadsheet takes a cell for a formula."""

    def __init__(self, file: IO[str], separator: str) -> None:
        self._file, self._separator, self._begun = file, separator, False

    def add(self, frame: pandas.DataFrame) -> None:
        texts = frame.select_dtypes(exclude="number").columns
        safe = frame.assign(**{name: [safe_cell(str(cell)) for cell in frame[name]] for name in texts})
        safe.to_csv(
            self._file,
            sep=self._separator,
            index=False,
            header=not self._begun,
            float_format="%.8g",
            lineterminator="\n",
        )
        self._begun = True

    def finish(self) -> None:
        pass

    def keep(self, path: Path) -> None:
        self._file.flush()
        shutil.copyfile(self._file.name, path)


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def add(self, frame: pandas.DataFrame) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = None if self._writer is None else self._writer.schema
        table = pyarrow.Table.from_pandas(frame, schema=schema, preserve_index=False)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def keep(self, path: Path) -> None:
        self.finish()
        shutil.copyfile(self._path, path)


class _Vcf:
    """The lines of a VCF with the scores (a row for each alternative, in order) in their INFO column: a number, or a
    point, for each alternative. A copy as TSV is kept for `keep`, since a VCF that ends early looks complete."""

    def __init__(self, file: IO[str], source: Path, columns: Sequence[str], copy: IO[str]) -> None:
        self._file, self._columns, self._copy, self._rows = file, columns, copy, _Text(copy, "\t")
        self._names = {column: f"MS_{re.sub('[^A-Za-z0-9_]', '_', column)}" for column in columns}
        self._lines = text_lines(source)
        self._told = False

    def add(self, frame: pandas.DataFrame) -> None:
        self._rows.add(frame)
        places = {column: list(frame.columns).index(column) for column in (*self._columns, "note")}
        rows: dict[int, list[Any]] = {}
        for row in frame.itertuples(index=False):
            rows.setdefault(row.line, []).append(row)
        last = max(rows)
        for number, line in self._lines:
            self._header(line)
            self._file.write(f"{self._scored(line, rows[number], places) if number in rows else line}\n")
            if number == last:
                return

    def _header(self, line: str) -> None:
        if self._told or line.startswith("##"):
            return
        for column, name in self._names.items():
            said = re.sub(r'[\\"\s]+', " ", column)  # names of classes are the user's
            self._file.write(f'##INFO=<ID={name},Number=A,Type=Float,Description="mambaseq dna/variants: {said}">\n')
        self._file.write('##INFO=<ID=MS_note,Number=A,Type=String,Description="why there is no score">\n')
        self._told = True

    def _scored(self, line: str, here: list[Any], places: dict[str, int]) -> str:
        cells = line.split("\t")
        cells += ["."] * (8 - len(cells))
        fields = [] if cells[7] in (".", "") else [cells[7]]
        for column, name in self._names.items():
            values = [row[places[column]] for row in here]
            fields.append(f"{name}={','.join('.' if value != value else f'{value:.6g}' for value in values)}")
        notes = [re.sub(r"[\s;=,%]+", "_", row[places["note"]]) or "." for row in here]
        if set(notes) != {"."}:
            fields.append(f"MS_note={','.join(notes)}")
        cells[7] = ";".join(fields)
        return "\t".join(cells)

    def finish(self) -> None:
        for _, line in self._lines:
            self._file.write(f"{line}\n")

    def keep(self, path: Path) -> None:
        self._rows.keep(path)


@contextlib.contextmanager
def _opened(out: Path, source: Path | None, columns: Sequence[str]) -> Iterator[Rows]:
    ending = "" if is_stream(out) else out.suffix.lower()
    if ending == ".parquet":
        with atomic_path(output_target(out)) as path:
            yield _Parquet(path)
        return
    with output_file(out, "w", encoding="utf-8", newline="") as file:
        if ending == ".vcf":
            assert source is not None
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=Path(file.name).parent) as copy:
                yield _Vcf(file, source, columns, copy)
        else:
            yield _Text(file, "," if out.suffix.lower() == ".csv" else "\t")


@contextlib.contextmanager
def rows_to(out: Path, source: Path | None = None, columns: Sequence[str] = ()) -> Iterator[tuple[Rows, list[int]]]:
    """A file of scores by its name's ending, whole or not there; TSV for a pipe. For a VCF: the file that was scored,
    and the columns of scores.

    Yields it, and a list to which the caller adds how many rows of each part have a score. If there are any when the
    block ends with a UserError, with Ctrl-C or for lack of memory, the parts are kept at
    `mambaseq.runs.tables.partial_path` (of a VCF as TSV), and the error says so.
    """
    scored: list[int] = []
    with _opened(out, source, columns) as rows:
        try:
            yield rows, scored
            rows.finish()
        except (UserError, KeyboardInterrupt, MemoryError) as error:
            if is_stream(out) or not sum(scored):
                raise
            kept = partial_path(output_target(out))
            kept = kept.with_suffix(".tsv") if kept.suffix.lower() == ".vcf" else kept
            rows.keep(kept)
            told = f"The rows finished before it are in {kept}."
            if isinstance(error, UserError):
                raise type(error)(f"{error} {told}") from error
            print(f"\n{told}", file=sys.stderr)
            raise


def write_table(frame: pandas.DataFrame, out: Path) -> None:
    """A whole table as `rows_to` writes it."""
    with rows_to(out) as (rows, _):
        rows.add(frame)
