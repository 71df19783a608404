"""Files and records that cannot be used, told together: who mends them wants all of them, not one a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mambaseq.errors import ConfigError, DataError, UserError, cut, cut_causes, shown

_LOGGED = 1_000  # bad files that get a line each
_MOST = 10_000  # errors after which what is read is another kind of file
_TOLD = 800  # characters of a message for bad files

logger = logging.getLogger(__name__)


class Refused:
    """What a reader calls as its `refuse` (see `mambaseq.data.records.Refuse`): keeps the errors for `check`.

    what: how the message calls files and records, such as recordings.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.errors: list[UserError] = []

    def __call__(self, error: UserError) -> None:
        """Raises a ConfigError: a setting is wrong, not a file."""
        if isinstance(error, ConfigError):
            raise error
        self.errors.append(error)
        if len(self.errors) == _MOST:
            self.check(0)

    def check(self, used: int) -> None:
        """Raise what was refused: the only error itself, several in one DataError, after a line for each. used: how
        many files and records can be used."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if not self.errors:
            return
        count = used + len(self.errors)
        if not all(error.place for error in self.errors):
            bad = [(f"{number}", str(error)) for number, error in enumerate(self.errors, 1)]
            list_bad(bad, count, self.what)
            raise DataError(
                f"{cut(self.errors[0], 600)} {len(bad) - 1:,} more of {count:,} {self.what} cannot be used either; the "
                "lines above list them."
            )
        bad = [(error.place, error.reason or reason_at(error, error.place)) for error in self.errors]
        list_bad(bad, count, self.what)
        raise DataError(told_together(bad, count, self.what))


def reason_at(error: UserError, *places: str) -> str:
    """What is wrong, without the names of the file or record (the longest first) and the remedy."""
    text = str(error)
    for place in places:
        text = text.replace(place, "it")
    return text.partition(". ")[0].removeprefix("it").removeprefix(":").lstrip()


def list_bad(bad: Sequence[tuple[str, str]], count: int, what: str) -> None:
    """Log a line for each of what cannot be used, of `count`. bad: places, one of them perhaps several times, and
    reasons."""
    logger.warning("%s of %s %s cannot be used:", f"{len(bad):,}", f"{count:,}", what)
    for place, reason in bad[:_LOGGED]:
        logger.warning("%s: %s", place, reason)
    if len(bad) > _LOGGED:
        logger.warning("... and %s more", f"{len(bad) - _LOGGED:,}")


def told_together(bad: Sequence[tuple[str, str]], count: int, what: str, remedy: str = "") -> str:
    """The message of an error about them. remedy: another one than to mend them or leave them out."""
    told = cut_causes(((shown(place, 120), reason) for place, reason in bad), 10, _TOLD, 90)
    return (
        f"{len(bad):,} of {count:,} {what} cannot be used: {told}. The lines above list them. "
        f"Mend them or leave them out{remedy}."
    )
