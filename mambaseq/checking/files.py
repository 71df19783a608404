"""Checks of readers and writers: they take what a model saves for them, and refuse other files with a message."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.checking.laws import LawBroken
from mambaseq.data.module import SequenceData
from mambaseq.data.records import Record
from mambaseq.errors import UserError

_BAD = {"missing": None, "empty": b"", "noise": bytes(range(256)) * 4}


def _takes(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise LawBroken(f"it does not take (path, ..., tokenizer) and the data set's options: {error}.") from error


def check_reader(read: Any, data: SequenceData, folder: Path) -> None:
    """A reader takes a path, a tokenizer and `reader_options`. A file of another kind gives a UserError, or records.
    Raises LawBroken."""
    options = data.reader_options()
    _takes(read, (folder, data.tokenizer), options)
    for name, content in _BAD.items():
        path = folder / f"{name}.dat"
        if content is not None:
            path.write_bytes(content)
        try:
            records = list(read(path, data.tokenizer, **options))
        except UserError:
            continue
        except Exception as error:  # a third party's reader may raise anything
            raise LawBroken(
                f"for a file with {name} content it raises {type(error).__name__} ({str(error)[:100]}); raise a "
                "DataError that names file and remedy."
            ) from error
        if content is None:
            raise LawBroken("a missing file gives no error; raise a DataError that names it.")
        if wrong := [type(record).__name__ for record in records if not isinstance(record, Record)]:
            raise LawBroken(f"it gives a {wrong[0]}, not a mambaseq.data.records.Record.")


def check_writer(write: Any, data: SequenceData, folder: Path) -> None:
    """A writer takes a path, sequences, a tokenizer and `writer_options`, and returns the files that it wrote. A writer
    may refuse the file's name with a UserError. Raises LawBroken."""
    ids = np.array(list(data.start_ids) or [0])
    arguments = (folder / "out.dat", [ids, ids], data.tokenizer)
    _takes(write, arguments, data.writer_options())
    try:
        files = write(*arguments, **data.writer_options())
    except UserError:
        return
    if not (isinstance(files, list) and files and all(Path(file).exists() for file in files)):
        raise LawBroken(f"it returns {str(files)[:100]}; return the list of files that were written.")
