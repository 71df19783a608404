"""Electrocardiograms from CSV files, for `mambaseq predict`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mambaseq.data.records import Record
from mambaseq.data.tables import read_table
from mambaseq.errors import DataError
from mambaseq_ecg.window import RATE, Window


def read_csv(path: str | Path, tokenizer: None, samples: int, after: int, patch: int) -> Iterator[Record]:
    """A record for each beat of a file, named by its sample number; `signal` is its window (see `Window.read`).

    The file has a header `seconds,signal,beat` and a row a sample: time, voltage in any unit, 1 where a beat is and 0
    elsewhere. samples, after, patch: the model's `Window`.
    Raises DataError for another header, what is no number, a gap, another rate than 100 Hz, a file without beats.
    """
    window, path = Window(samples, after, patch), Path(path)
    seconds, signal, marks = read_table(path, ("seconds", "signal", "beat")).T
    if len(beats := np.flatnonzero(marks)) == 0:
        raise DataError(f"{path}: no beat is marked with 1 in the column 'beat'. Run a QRS detector over it first.")
    rate = (len(seconds) - 1) / max(float(seconds[-1] - seconds[0]), 1e-9)
    if abs(rate / RATE - 1) > 0.01:
        raise DataError(f"{path} has {rate:.4g} samples a second, and the model wants {RATE}. Resample it.")
    steps = np.diff(seconds, prepend=seconds[0] - 1 / RATE)
    if (wrong := ~np.isin(marks, (0, 1)) | (steps < 0) | (steps > 2.5 / RATE)).any():
        line, problem = int(np.argmax(wrong)) + 2, "is after a gap in time, or has neither 0 nor 1 in the column 'beat'"
        raise DataError(f"{path}: line {line} {problem}. Correct it, or cut the file there.")
    signal = 100 * (signal - signal.mean()) / (signal.std() or 1)  # about what the training records' units give
    for number, beat in enumerate(beats):
        yield Record(name=f"{path.stem}:{beat}", signal=window.read(signal, beats, number))
