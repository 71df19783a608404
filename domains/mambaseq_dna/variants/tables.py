"""Where scores of variants go: a table in memory, CSV, TSV or parquet, or the VCF with fields added."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambaseq.atomic import atomic_path
from mambaseq.errors import ConfigError
from mambaseq.outputs import is_stream, output_file, output_target, safe_cell
from mambaseq_dna.files.bed import text_lines

if TYPE_CHECKING:
    import pandas

ENDINGS = (".csv", ".tsv", ".parquet", ".vcf")


def check_ending(out: Path, endings: Sequence[str] = ENDINGS) -> None:
    """Raise ConfigError for a name that says no known format."""
    output_target(out)
    if not is_stream(out) and out.suffix.lower() not in endings:
        raise ConfigError(f"--out {out} must end in {', '.join(endings[:-1])} or {endings[-1]}: that says the format.")


def write_table(frame: pandas.DataFrame, out: Path) -> None:
    """CSV, TSV or parquet, whole or not at all; TSV for a pipe. Fractions have eight digits, and no spreadsheet takes a
    cell for a formula."""
    if out.suffix.lower() == ".parquet" and not is_stream(out):
        with atomic_path(output_target(out)) as path:
            frame.to_parquet(path, index=False)
        return
    texts = frame.select_dtypes(exclude="number").columns
    safe = frame.assign(**{name: [safe_cell(str(cell)) for cell in frame[name]] for name in texts})
    separator = "," if out.suffix.lower() == ".csv" else "\t"
    with output_file(out, "w", encoding="utf-8", newline="") as file:
        safe.to_csv(file, sep=separator, index=False, float_format="%.8g", lineterminator="\n")


def write_vcf(source: Path, frame: pandas.DataFrame, columns: Sequence[str], out: Path) -> None:
    """The lines of a VCF with the scores of `frame` (one row for each alternative, in order) in their INFO column: a
    number, or a point, for each alternative."""
    names = {column: f"MS_{re.sub('[^A-Za-z0-9_]', '_', column)}" for column in columns}
    rows: dict[int, list[Any]] = {}
    for row in frame.itertuples(index=False):
        rows.setdefault(row.line, []).append(row)
    places = {column: list(frame.columns).index(column) for column in (*columns, "note")}
    with output_file(out, "w", encoding="utf-8", newline="") as file:
        told = False
        for number, line in text_lines(source):
            if not told and not line.startswith("##"):
                for column, name in names.items():
                    said = re.sub(r'[\\"\s]+', " ", column)  # names of classes are the user's
                    file.write(f'##INFO=<ID={name},Number=A,Type=Float,Description="mambaseq dna/variants: {said}">\n')
                file.write('##INFO=<ID=MS_note,Number=A,Type=String,Description="why there is no score">\n')
                told = True
            if line.startswith("#") or not line.strip():
                file.write(line + "\n")
                continue
            cells = line.split("\t")
            cells += ["."] * (8 - len(cells))
            fields = [] if cells[7] in (".", "") else [cells[7]]
            here = rows[number]
            for column, name in names.items():
                values = [row[places[column]] for row in here]
                fields.append(f"{name}={','.join('.' if value != value else f'{value:.6g}' for value in values)}")
            notes = [re.sub(r"[\s;=,%]+", "_", row[places["note"]]) or "." for row in here]
            if set(notes) != {"."}:
                fields.append(f"MS_note={','.join(notes)}")
            cells[7] = ";".join(fields)
            file.write("\t".join(cells) + "\n")
