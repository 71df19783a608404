"""What readers give to `predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mambaseq.data.spooled import Spooled
from mambaseq.errors import DataError, UserError

Refuse = Callable[[UserError], None]
"""What a reader calls for a file or record that cannot be used. If it returns, the reader goes on with the next one: an
exception would end the reader, and what comes after would be lost. A reader takes it as the option `refuse`."""


def raised(error: UserError) -> None:
    """Raise it: the default of the option `refuse`."""
    raise error


_Read = TypeVar("_Read", bound=Callable[..., Any])


def with_columns(columns: Callable[[Path], Sequence[str]]) -> Callable[[_Read], _Read]:
    """Say of a reader which columns an input has whose values it gives as `Record.fields`; none of what is no table. By
    them `predict` and `generate` find conditions without being told."""

    def told(read: _Read) -> _Read:
        read.columns = columns  # type: ignore[attr-defined]
        return read

    return told


def columns_of(read: Callable[..., Any], path: Path) -> Sequence[str]:
    """The columns of an input of a reader, none where it does not say them."""
    columns: Callable[[Path], Sequence[str]] | None = getattr(read, "columns", None)
    return () if columns is None else columns(path)


def rest_left_out(error: UserError, path: object) -> UserError:
    """The error of a file that cannot be read to its end, which says so."""
    return DataError(f"{error} What comes after it in {path} was not read.")


@dataclasses.dataclass(frozen=True)
class Record:
    """One named sequence: token ids `(length,)`, or a continuous signal `(length, channels)` float32.

    spooled: in place of ids those in a temporary file, of what is long, from a reader whose option `spool` asks for it,
        as `generate` does.
    description: what the file says about it besides the name (the rest of a FASTA header).
    source: its file, if the reader was given a folder or a table of files. alone: its number among the records that the
        reader finds in that file by itself; None if it finds another, since a table names a part of the file.
    place: the table and the line that name it.
    scored: `(length,)` bool, which tokens count in a likelihood; None for all. A reader leaves out tokens that are
        never a target in training (N in a genome), about which a model has learned nothing.
    fields: values of other columns of its row, by name. A reader of tables takes an option `fields` with the wanted
        names, and returns these.
    start, total: for a part of a sequence: the place of its first token in the sequence of that name, counted from 0,
        and that sequence's length. Rows of `predict` count from there. totals: the lengths of all sequences of its
        file, by name, if parts alone are read.
    condition: the id or row of its condition, for conditional models (see `mambaseq.conditions`). `predict` and
        `generate` set it; readers do not.
    """

    name: str
    ids: np.ndarray | None = None
    signal: np.ndarray | None = None
    description: str = ""
    scored: np.ndarray | None = None
    source: str = ""
    alone: int | None = None
    place: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    condition: int | tuple[int, ...] | None = None
    start: int = 0
    total: int | None = None
    spooled: Spooled | None = None
    totals: Mapping[str, int] | None = None

    def __len__(self) -> int:
        if self.spooled is not None:
            return len(self.spooled)
        values = self.ids if self.ids is not None else self.signal
        return 0 if values is None else len(values)
