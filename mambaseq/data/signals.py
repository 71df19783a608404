"""Reads and writes continuous signals as CSV files: a column for each channel, a row for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.data.records import Record
from mambaseq.data.tables import HEADER, read_table
from mambaseq.errors import ConfigError, DataError
from mambaseq.outputs import numbered, output_file, writes


def read_csv(path: str | Path, tokenizer: Any, columns: list[str] | None = None) -> Iterator[Record]:
    """The signal in a file, `(rows, columns)` float32, as one record with the file's name.

    columns: those that are read, in this order; others, such as dates, are left out. None takes all that there are.
    Raises DataError (see `read_table`).
    """
    path = Path(path)
    if columns is None:
        try:
            with path.open(encoding="utf-8-sig") as file:
                columns = [name.strip() for name in file.readline(HEADER).strip().split(",")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a CSV file in UTF-8: {error}.") from error
    yield Record(path.stem, signal=read_table(path, columns, others=True).astype(np.float32))


def _check_signal(values: np.ndarray, tokenizer: Any, columns: list[str] | None = None) -> None:
    if values.ndim != 2 or (columns is not None and len(columns) != values.shape[1]):
        raise ConfigError(
            f"The writer csv writes signals (length, channels){f' of {len(columns)} channels' if columns else ''}, "
            f"not what has the shape {values.shape}. Use the model's own writer."
        )


@writes("A signal is", ".csv", takes=_check_signal)
def write_csv(
    path: str | Path, sequences: Sequence[np.ndarray], tokenizer: Any, columns: list[str] | None = None
) -> list[Path]:
    """Write signals `(length, channels)` as CSV, each file completely or not at all. Returns the files.

    One goes to `path` itself, several to `NAME-000.csv`, ... next to it. columns: names of the channels; value_1, ...
    if not given. Raises ConfigError for anything but signals with that many channels, UserError if the place is not
    writable.
    """
    files = numbered(Path(path), len(sequences), ".csv")
    for file, values in zip(files, sequences, strict=True):
        _check_signal(values, tokenizer, columns)
        names = columns or [f"value_{number}" for number in range(1, values.shape[1] + 1)]
        lines = [",".join(names), *(",".join(f"{value:.9g}" for value in row) for row in values.tolist())]
        with output_file(file) as target:
            target.write(("\n".join(lines) + "\n").encode("utf-8"))
    return files
