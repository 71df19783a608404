"""The conditions of records: the same for all of them, or those of each from columns."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseq.checkpoints import LoadedModel
from mambaseq.conditions import composed, listed, parts_of, values_of
from mambaseq.data.records import Record
from mambaseq.data.tables import named_rows
from mambaseq.errors import ConfigError, DataError, cut, cut_list, did_you_mean, shown
from mambaseq.runs.known import Asked, Known, condition_ids, not_conditional

logger = logging.getLogger(__name__)

_TABLE = "--condition-table needs the name of the column with the conditions: --condition-column."


class Conditions:
    """The condition of each record.

    condition: for all records, see `condition_ids`. column: instead, the name of a column with a value for each record:
        in the files themselves, if the reader reads tables, or in `table`, a CSV, TSV or jsonl file with a row for each
        record. Its columns `record` and `file` (one or both) say which record a row is for: the record's name, and its
        file, relative to the table's folder or to the current one. For several conditions: their names, with commas,
        each a column, or `digit=COLUMN speaker=COLUMN`; with a table all of them if left out.
    there: the columns of each input that is a table itself. If nothing else is said, those with the names of conditions
        are taken: rows of one input without such columns have no condition, which the model must have learned.

    each: ids or rows for all records, [] with a column or if none are needed. by_record: whether each record has its
        own.
        Raises ConfigError for options that do not fit each other or the model, DataError for a table that cannot be
        used, and for an input that lacks the column of a condition that is needed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        condition: Asked | None = None,
        column: str | None = None,
        table: str | Path | None = None,
        there: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.table = None if table is None else Path(table)
        self.by_record = column is not None or table is not None
        self.each: list[int] | list[tuple[int, ...]] = []
        self._fields: list[str] = []
        self._own: dict[str, dict[int, str | None]] = {}
        if not self.by_record and condition is None and there:
            self._known = Known(loaded)
            self._own = _own_columns(self._known, there)
            self.by_record = bool(self._own)
            if self.by_record:
                return
        if not self.by_record:
            self.each = condition_ids(loaded, condition, by_columns=True)
            return
        if condition is not None:
            raise ConfigError("--condition is for all records, --condition-column for each record. Give one of them.")
        self._known = known = Known(loaded)
        if not known.all:
            raise ConfigError(not_conditional("--condition-column"))
        # by the place of a condition
        self._columns = dict(enumerate(_columns(known, column)))
        columns = [one for one in self._columns.values() if one is not None]
        if self.table is None:
            self._fields = columns
        else:
            self._by, self._rows = _read_table(self.table, columns)

    @classmethod
    def exactly(cls, each: Sequence[Any]) -> Conditions:
        """Those ids or rows, for all records; [None] for none."""
        made = cls.__new__(cls)
        made.table, made.by_record, made._fields, made._own = None, False, [], {}
        made.each = [one for one in each if one is not None]
        return made

    def fields(self, given: str | Path) -> list[str]:
        """The columns that the reader is asked for in an input."""
        own = self._own.get(str(given), {})
        return self._fields or [column for column in own.values() if column is not None]

    def of(self, record: Record, file: str, given: str | Path) -> int | tuple[int, ...] | None:
        """The id or row of a record's condition; None if none is needed. file: the record's file, given: the input that
        it was found by.

        Raises DataError for a record without one, and for a value that is not a condition of the model.
        """
        if not self.by_record:
            return self.each[0] if self.each else None
        here = cut(record.name, 300) if record.name.startswith(file) else f"{file}, record {shown(record.name, 300)}"
        here = record.place or here
        columns = self._own.get(str(given), dict.fromkeys(range(len(self._known.all)))) if self._own else self._columns
        if self.table is None:
            values, place = record.fields, ""
        else:
            key = _key(self._by, record.name, os.path.realpath(file))
            if key not in self._rows:
                raise DataError(
                    f"{here}: {self.table} has no row for it (by {' and '.join(self._by)}). Add one, or leave the "
                    f"record out."
                )
            line, values = self._rows[key]
            place = f" in line {line} of {self.table}"
        found = [
            None
            if column is None
            else self._value(which, values.get(column), f"{here}: the column {shown(column)}{place}")
            for which, column in columns.items()
        ]
        return self._known.row(found)

    def _value(self, which: int, value: Any, where: str) -> int | float | None:
        """A value of a condition: its name's id, or the number. None where there is none, and need not be."""
        known, condition = self._known, self._known.all[which]
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and known.may_lack(condition):
            return None
        if condition.is_number:
            try:
                return known.number(condition, value.strip() if isinstance(value, str) else value)
            except ConfigError as error:
                raise DataError(f"{where}: {error}") from error
        text = _text(value)
        if text is None:
            raise DataError(f"{where} is {shown(value)}, which names no condition. Give a name or a whole number.")
        if text not in known.names[which]:
            said = known.unknown(which, text)
            raise DataError(f"{where}: {said[0].lower()}{said[1:]}")
        return known.names[which].index(text)


def _own_columns(known: Known, there: Mapping[str, Sequence[str]]) -> dict[str, dict[int, str | None]]:
    """The columns of inputs that are named as the conditions, by the places of these; none for an input that has no
    such column. Raises DataError for an input that lacks one which the model needs."""
    found: dict[str, dict[int, str | None]] = {}
    needed = [one for one in known.all if not known.may_lack(one)]
    if not known.all or any(not one.name for one in known.all):
        return found
    for given, columns in there.items():
        has = {composed(str(column)) for column in columns}
        lacking = [one for one in known.all if one.name not in has]
        if columns and (wanted := [one for one in lacking if one in needed]):
            raise DataError(
                f"{given} has no column {shown(wanted[0].name)}.{did_you_mean(wanted[0].name, has)} This model needs "
                f"{values_of(wanted[0])}. Add the column, name another with --condition-column, or give one for all "
                "records with --condition."
            )
        if len(lacking) == len(known.all):
            continue
        for one in lacking:
            logger.warning(
                "%s has no column %s, so that its records are taken without.%s",
                given, shown(one.name), did_you_mean(one.name, has - {other.name for other in known.all}),
            )  # fmt: skip
        found[given] = {place: one.name if one.name in has else None for place, one in enumerate(known.all)}
    if found and needed and (without := [given for given in there if given not in found]):
        raise DataError(
            f"{without[0]} is no table, so that nothing says the condition of its records, and this model needs "
            f"{listed(needed)}. Predict it by itself with --condition, or write a table that names it."
        )
    return found


def _columns(known: Known, column: str | None) -> list[str | None]:
    """The column of each condition; None for those that are not given. Raises ConfigError."""
    names = [one.name for one in known.all]
    if column is None:
        if "" in names:
            raise ConfigError(_TABLE)
        return [*names]
    text = composed(column)
    before, given = parts_of(text, names)
    if not given and len(names) == 1:
        return [column]
    if not given:
        given = {name.strip(): name.strip() for name in text.split(",")}
    elif before:
        raise ConfigError(f"--condition-column {shown(column)} begins with {shown(before)}. Write {names[0]}=COLUMN.")
    for name in given:
        if name not in names:
            raise ConfigError(
                f"--condition-column: no condition is called {shown(name)}.{did_you_mean(name, names)} They are: "
                f"{cut_list(names)}. Write {names[0]}={cut(name)} if that is the column's name."
            )
    for one in known.all:
        if one.name not in given and not known.may_lack(one):
            raise ConfigError(f"This model needs {one.name} as well. Name its column with --condition-column.")
    return [given.get(name) for name in names]


def _text(value: Any) -> str | None:
    """A name, or a whole number as text; None for anything else."""
    if isinstance(value, str):
        return composed(value.strip()) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _key(by: Sequence[str], record: Any, file: Any) -> tuple[str, ...]:
    return tuple({"record": composed(str(record)), "file": str(file)}[one] for one in by)


def _read_table(
    path: Path, columns: Sequence[str]
) -> tuple[list[str], dict[tuple[str, ...], tuple[int, Mapping[str, Any]]]]:
    """The columns that identify rows, and the line and values of each row by them. columns: what the rows must have.

    Raises DataError that names the file, and the line where there is one; UserError for one over `limits.TABLE_BYTES`.
    """
    by: list[str] = []
    found: dict[tuple[str, ...], tuple[int, Mapping[str, Any]]] = {}
    for line, given in named_rows(path, "--condition-table"):
        row = {composed(name): value for name, value in given.items()}
        if not by:
            by = [name for name in ("record", "file") if name in row]
        for name in (*columns, *by):
            if name not in row or (row[name] is None and name in by):
                near = did_you_mean(name, [str(one)[:80] for one in row])
                raise DataError(f"{path}, line {line}: there is no {shown(name)}.{near} Correct the line.")
        if not by:
            raise DataError(
                f"{path} has neither a column record nor one called file, so it is unclear which records its rows "
                "are for. Add one."
            )
        try:
            file = _place(path.parent, str(row["file"])) if "file" in by else None
        except ValueError as error:  # a name with a NUL
            raise DataError(
                f"{path}, line {line}: {shown(row['file'])} is no file name: {error}. Correct it."
            ) from error
        key = _key(by, row.get("record"), file)
        if key in found:
            raise DataError(f"{path}, line {line}: {cut_list(key)} has a row already, line {found[key][0]}.")
        found[key] = line, {name: row[name] for name in columns}
    if not found:
        raise DataError(f"{path} has no row. Write one for each record.")
    return by, found


def _place(folder: Path, name: str) -> str:
    """The file that a table names: relative to the table, or to the current folder."""
    beside = folder / name
    return os.path.realpath(beside if os.path.lexists(beside) else name)
