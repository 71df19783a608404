"""The conditions of records: one name for all of them, or one for each from a column."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.data.tables import named_rows
from mambaseq.errors import ConfigError, DataError, cut, cut_list, did_you_mean, folded, shown

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LISTED = 12


def condition_ids(loaded: LoadedModel, condition: str | Sequence[str] | None) -> list[int]:
    """Ids of condition names (numbers where the model's conditions have no names).

    condition: one name, several with commas, or a sequence of these. A name that itself holds commas is found first.

    Raises ConfigError for unknown names, and where a condition is needed.
    """
    names = _names(loaded)
    if condition is None:
        if names:
            raise ConfigError(f"This model needs a condition. Give one with --condition: {_listed(names)}.")
        return []
    given = [_composed(one) for one in ([condition] if isinstance(condition, str) else condition)]
    return [names.index(name) for one in given for name in _split(one, names)]


def _composed(text: str) -> str:
    """Accents may be typed or stored as separate characters."""
    return unicodedata.normalize("NFC", text)


def _names(loaded: LoadedModel) -> list[str]:
    """Names of a model's conditions, none where it has none. Raises ConfigError for a description that is not whole."""
    count = loaded.card.spec["encoder"].get("n_conditions", 0)
    names = (loaded.card.condition_names or [str(number) for number in range(count)]) if count else []
    if len(names) != count:
        raise ConfigError(
            f"The model at {loaded.source} has {count} conditions, but its description names {len(names)}. Export it "
            "again."
        )
    return [_composed(name) for name in names]


def _split(given: str, names: list[str]) -> list[str]:
    """The names in a text with commas; longer names are tried first."""
    if given in names:
        return [given]
    parts, found = given.split(","), []
    while parts:
        for end in range(len(parts), 0, -1):
            if (name := ",".join(parts[:end]).strip()) in names:
                found.append(name)
                parts = parts[end:]
                break
        else:
            raise ConfigError(f"No condition is named {shown(parts[0].strip())}.{_near(parts[0].strip(), names)}")
    return found


def _near(given: str, names: list[str]) -> str:
    """A hint at what could be meant: names that hold all the given words (digits may be written as words), or a similar
    name."""
    if not names:
        return " The model is not conditional; leave --condition out."
    wanted = set(_words(given))
    fitting = [name for name in names if wanted and wanted <= set(_words(name))]
    fitting = fitting or [name for name in names if given and given.lower() in name.lower()]
    if fitting:
        if len(fitting) == 1:
            return f" Did you mean {shown(fitting[0])}?"
        return f" Did you mean one of these: {_listed(fitting)}?"
    return f"{did_you_mean(given, names)} The model knows: {_listed(names)}."


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", folded(text))
    return [str(_DIGITS.index(word)) if word in _DIGITS else word.lstrip("0") or "0" for word in words]


def _listed(names: list[str]) -> str:
    """A few of the names, for a message; in quotes where they hold commas."""
    return cut_list((shown(name) if "," in name else name for name in names), _LISTED)


class Conditions:
    """The condition of each record.

    condition: names for all records. column: instead, the name of a column with a value for each record: in the files
        themselves, if the reader reads tables, or in `table`, a CSV, TSV or jsonl file with a row for each record. Its
        columns `record` and `file` (one or both) say which record a row is for: the record's name, and its file,
        relative to the table's folder or to the current one.

    each: ids for all records, [] with a column or if none are needed. fields: columns that the reader is asked for.
        Raises ConfigError for options that do not fit each other or the model, DataError for a table that cannot be
        used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        condition: str | Sequence[str] | None = None,
        column: str | None = None,
        table: str | Path | None = None,
    ) -> None:
        self.column, self.table = column, None if table is None else Path(table)
        self.each: list[int] = []
        self.fields: list[str] = []
        if column is None:
            if table is not None:
                raise ConfigError(
                    "--condition-table needs the name of the column with the conditions: --condition-column."
                )
            self.each = condition_ids(loaded, condition)
            return
        if condition is not None:
            raise ConfigError("--condition is for all records, --condition-column for each record. Give one of them.")
        self._known = _names(loaded)
        if not self._known:
            raise ConfigError("The model is not conditional; leave --condition-column out.")
        if self.table is None:
            self.fields = [column]
        else:
            self._by, self._rows = _read_table(self.table, column)

    def of(self, record: Record, file: str) -> int | None:
        """The id of a record's condition; None if none is needed. file: the record's file.

        Raises DataError for a record without one, and for a value that is not a condition of the model.
        """
        if self.column is None:
            return self.each[0] if self.each else None
        here = cut(record.name, 300) if record.name.startswith(file) else f"{file}, record {shown(record.name, 300)}"
        if self.table is None:
            value, where = record.fields.get(self.column), f"{here}: the column {shown(self.column)}"
        else:
            key = _key(self._by, record.name, os.path.realpath(file))
            if key not in self._rows:
                raise DataError(
                    f"{here}: {self.table} has no row for it (by {' and '.join(self._by)}). Add one, or leave the "
                    f"record out."
                )
            line, value = self._rows[key]
            where = f"{here}: the column {shown(self.column)} in line {line} of {self.table}"
        text = _text(value)
        if text is None:
            raise DataError(f"{where} is {shown(value)}, which names no condition. Give a name or a whole number.")
        if text not in self._known:
            raise DataError(f"{where}: no condition is named {shown(text)}.{_near(text, self._known)}")
        return self._known.index(text)


def _text(value: Any) -> str | None:
    """A name, or a whole number as text; None for anything else."""
    if isinstance(value, str):
        return _composed(value.strip()) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _key(by: Sequence[str], record: Any, file: Any) -> tuple[str, ...]:
    return tuple({"record": _composed(str(record)), "file": str(file)}[one] for one in by)


def _read_table(path: Path, column: str) -> tuple[list[str], dict[tuple[str, ...], tuple[int, Any]]]:
    """The columns that identify rows, and the line and value of each row by them.

    Raises DataError that names the file, and the line where there is one; UserError for one over `limits.TABLE_BYTES`.
    """
    by: list[str] = []
    found: dict[tuple[str, ...], tuple[int, Any]] = {}
    for line, row in named_rows(path, "--condition-table"):
        if not by:
            by = [name for name in ("record", "file") if name in row]
        for name in (column, *by):
            if name not in row or row[name] is None:
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
        found[key] = line, row[column]
    if not found:
        raise DataError(f"{path} has no row. Write one for each record.")
    return by, found


def _place(folder: Path, name: str) -> str:
    """The file that a table names: relative to the table, or to the current folder."""
    beside = folder / name
    return os.path.realpath(beside if os.path.lexists(beside) else name)
