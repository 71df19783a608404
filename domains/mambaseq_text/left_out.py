"""Rows that cannot be used: left out and listed, or all told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambaseq.atomic import json_text
from mambaseq.errors import DataError, UserError, cut, cut_causes, cut_path
from mambaseq_text.rows import BadRow

_MOST_TOLD, _FURTHER = 1000, 1 << 30
LISTED = 10_000


class LeftOut:
    """What a reader calls for rows that it cannot use.

    skip: they are left out; otherwise `check` refuses them, after further ones have been looked for in the next GiB.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self._new: list[dict[str, Any]] = []
        self._refused: dict[tuple[str, int], BadRow] = {}
        self._looked = 0  # characters since the first one

    def __call__(self, error: UserError, listed: bool = True) -> None:
        """listed: False for a file that is read once more."""
        if not isinstance(error, BadRow):
            raise error
        if not self.skip:
            self._refused.setdefault((error.file, error.line), error)
        elif listed:
            self.count += 1
            if self.count <= LISTED:
                self._new.append({"file": error.file, "line": error.line, "reason": error.reason})

    @property
    def refused(self) -> bool:
        """Whether there is a row for which the data are refused, so that no others need be kept."""
        return bool(self._refused)

    def look(self, text: str) -> bool:
        """Whether to look further for rows that are refused, behind this text."""
        self._looked += len(text)
        return self._looked < _FURTHER and len(self._refused) < _MOST_TOLD

    def take(self) -> list[dict[str, Any]]:
        """What has been left out since the last call: file, line and reason of each."""
        new, self._new = self._new, []
        return new

    def check(self) -> None:
        """Raise DataError for all rows that are refused."""
        if not self._refused:
            return
        first, *others = self._refused.values()
        if others:
            found = ((f"{cut_path(one.file)}, line {one.line:,}", one.reason) for one in others)
            told = cut_causes(found, first=first.reason)
            more = f" {len(others):,} more cannot be used: {told}."
        else:
            more = ""
        raise DataError(
            f"{cut(first, 330)}{more} With data.skip_bad: true such rows are left out, and listed in the run's folder."
        ) from first


class ListedRows:
    """The same for a stream: rows that are left out are added to a file as they are met, each once.

    file: None for none. active: whether this process is the one that lists them.
    """

    def __init__(self, skip: bool, file: Path | None = None) -> None:
        self.skip, self.file, self.active = skip, file, True
        self._listed: set[tuple[str, int]] | None = None

    def __call__(self, error: UserError) -> None:
        if not isinstance(error, BadRow) or not self.skip:
            raise error
        if self.file is None or not self.active:
            return
        if self._listed is None:
            before = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
            self._listed = {(one["file"], one["line"]) for one in map(json.loads, before)}
        if (error.file, error.line) not in self._listed and len(self._listed) < LISTED:
            self._listed.add((error.file, error.line))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json_text({"file": error.file, "line": error.line, "reason": error.reason}) + "\n")
