"""Electrocardiograms from CSV files, for `mambaseq predict`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mambaseq.data.records import Record
from mambaseq.errors import DataError
from mambaseq_ecg.window import RATE, Window

HEADER = "seconds,signal,beat"


def read_csv(path: str | Path, tokenizer: None, samples: int, after: int, patch: int) -> Iterator[Record]:
    """A record for each beat of a file, named by its sample number; `signal` is its window (see `Window.read`).

    The file has a header `seconds,signal,beat` and a row a sample: time, voltage in any unit, 1 where a beat is and 0
    elsewhere. samples, after, patch: the model's `Window`.
    Raises DataError for another header, what is no number, another rate than 100 Hz, a file without beats.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().strip().replace(" ", "")
            if header != HEADER:
                raise DataError(f"{path}: the first line must be {HEADER!r}, not {header[:40]!r}. Add that header.")
            rows = file.readlines()
        table = np.loadtxt(rows, delimiter=",", usecols=(0, 1, 2), ndmin=2) if rows else np.zeros((0, 3))
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Check the path.") from error
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"{path}: a row is not three numbers ({error}). Correct or remove it.") from error
    if not np.isfinite(table).all():
        line = int(np.argmin(np.isfinite(table).all(axis=1))) + 2
        raise DataError(f"{path}: line {line} has a gap (nan or inf). Fill or cut it out.")
    beats = np.flatnonzero(table[:, 2])
    if len(beats) == 0:
        raise DataError(f"{path}: no beat is marked with 1 in the column 'beat'. Run a QRS detector over it first.")
    rate = (len(table) - 1) / max(float(table[-1, 0] - table[0, 0]), 1e-9)
    if abs(rate / RATE - 1) > 0.01:
        raise DataError(f"{path} has {rate:.4g} samples a second, and the model wants {RATE}. Resample it.")
    window = Window(samples, after, patch)
    for number, beat in enumerate(beats):
        yield Record(name=f"{path.stem}:{beat}", signal=window.read(table[:, 1], beats, number))
