"""Errors that the user has to mend. The command line prints them as one paragraph and exits with 2."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping

_COMPARED = 200  # characters of a name that are compared with others
_DIGITS = 80


class UserError(Exception):
    """Something outside the program is wrong: a file, a name, a setting.

    The message is one paragraph that names what was read (file, record, key), what is wrong with it and the
    remedy.
    place: the file, or the file and line, that it is about; "" where it is about no single one, or nobody said it.
    reason: what is wrong there, in a few words; "" where the message alone says it.
    """

    place = reason = ""

    def about(self, place: object, reason: str = "") -> UserError:
        """The error, about this place."""
        self.place, self.reason = str(place), reason
        return self


class DataError(UserError):
    """A data file or one of its records cannot be used."""


class ConfigError(UserError):
    """A run's configuration cannot be used: an unknown name or key, or values that exclude each other."""


class BackendError(ConfigError, ValueError):
    """The backend that was asked for cannot run here, as one for GPUs in a model that is read where there is none."""


@contextlib.contextmanager
def under_key(
    key: str, settings: Mapping[str, object], file: str = "", kind: type[UserError] = UserError
) -> Iterator[None]:
    """Put the setting that a UserError is about in front of its message, if the message does not name it: `KEY.NAME`
    for the setting whose name or value is in the message; `KEY` if there is none.

    file: where the settings are written; put in front too, if the message does not name it. kind: the class of errors.
    """
    try:
        yield
    except kind as error:
        message = str(error)
        if f"{key}." not in message:
            message = f"{_meant(key, settings, message)}: {message}"
        if file not in message:
            message = f"{file}: {message}"
        error.args = (message,)
        raise


def _meant(key: str, settings: Mapping[str, object], message: str) -> str:
    quoted = [name for name, value in settings.items() if any(text in message for text in _texts(value))]
    named = [name for name in settings if re.search(rf"\b{re.escape(name)}\b", message)]
    if not quoted and not named:
        return key
    meant = (quoted + named)[0]
    options = settings[meant]
    if quoted and meant.endswith("_options") and isinstance(options, Mapping):  # the option, not all of them
        return _meant(f"{key}.{meant}", options, message)
    return f"{key}.{meant}"


def _texts(value: object) -> list[str]:
    """The texts in a setting that are long enough to be found again."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) and len(value) > 3 else []


def folded(text: str) -> str:
    """A text without case and accents, which are easily mistyped.

    >>> folded("Théo")
    'theo'
    """
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


def did_you_mean(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """``" Did you mean 'x'?"`` for the nearest of the known names, else ``""``. Case and accents do not count. Of
    several names with commas, the first with a near match counts. least: from 0 to 1, how alike they must be.

    >>> did_you_mean("mambda", ["mamba", "s4d"])
    " Did you mean 'mamba'?"
    """
    names = {folded(one): one for one in known}
    given = folded(name[:_COMPARED])
    for part in (given, *(given.split(",") if "," in given else ())):
        if near := difflib.get_close_matches(part.strip(), list(names), n=1, cutoff=least):
            return f" Did you mean {shown(names[near[0]])}?"
    return ""


def shown(value: object, most: int = 80) -> str:
    """A value for a message, as Python writes it (null for None, a path as its text), cut to `most` characters. No more
    than that is made of a large value.

    >>> shown("s4d"), shown(None), shown([1, 2]), shown("x" * 100, most=8)
    ("'s4d'", 'null', '[1, 2]', "'xxxxxx…")
    """
    if value is None:
        return "null"
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, str | bytes | list | tuple):
        value = value[:most]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), most))
    elif isinstance(value, int) and abs(value) >= 10**_DIGITS:
        return f"a number of more than {_DIGITS} digits"
    try:
        return cut(repr(value), most)
    except (ValueError, RecursionError):  # such a number inside of it; too deep
        return f"a {type(value).__name__}"


def typed(pattern: str | None) -> str:
    """A regular expression for a message, as it is typed: its backslashes are not doubled.

    >>> print(typed(r"^(?P<digit>\\d)_"))
    '^(?P<digit>\\d)_'
    """
    return shown(pattern, 200).replace("\\\\", "\\")


def cut(text: object, most: int = 80) -> str:
    """A text for a message, without quotes, cut to `most` characters.

    >>> cut("abcdef", most=4)
    'abc…'
    """
    text = str(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def cut_path(path: object, most: int = 50) -> str:
    """A path for a message, without quotes, cut to its last `most` characters.

    >>> cut_path("/a/long/way/to/x.fa", most=8)
    '…to/x.fa'
    """
    text = str(path)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def cut_list(items: Iterable[object], most: int = 20, characters: int = 300, separator: str = ", ") -> str:
    """Items with commas (or `separator`) between them, for a message: at most `most`, with a count of the others.

    >>> cut_list(["a", "b", "c"], most=2)
    'a, b and 1 more'
    >>> cut_list([])
    'none'
    """
    texts = [str(item) for item in items]
    told: list[str] = []
    for text in texts[:most]:
        if told and sum(map(len, told)) + len(text) > characters:
            break
        told.append(cut(text))
    more = f" and {len(texts) - len(told):,} more" if len(told) < len(texts) else ""
    return f"{separator.join(told)}{more}" if told else "none"


def cut_causes(
    found: Iterable[tuple[str, str]],
    most: int = 10,
    characters: int = 450,
    longest: int = 40,
    first: str | None = None,
    count: int | None = None,
) -> str:
    """Places with what is wrong at them, for a message: each cause once, behind the places where it is.

    found: places such as `line 7` or `a.csv, line 7`, and causes. most: causes, and places of each, that are named; the
    others are counted. characters: of all, about. longest: characters of a cause. first: a cause that the
    message has told. count: of all places, where `found` has not all.

    >>> cut_causes([("line 2", "no base"), ("line 3", "empty"), ("line 5", "no base")])
    'line 2, 5 (no base); line 3 (empty)'
    >>> cut_causes([("a.csv", "empty"), ("b.csv", "empty"), ("c.csv", "cut short")], most=1, first="empty")
    'a.csv and 1 more (the same); and 1 more'
    """
    causes: dict[str, list[str]] = {}
    for place, cause in found:
        causes.setdefault(cause, []).append(place)
    left = sum(map(len, causes.values())) if count is None else count
    told: list[str] = []
    for cause, places in list(causes.items())[:most]:
        named, before = "", ""
        for number, place in enumerate(places[:most]):
            if number and len(named) > characters // 3:
                break
            word, space, last = place.rpartition(" ")
            numbered = f"{word}{space}" if last.replace(",", "").isdecimal() else ""
            again = numbered and numbered == before  # `line 2, 5`
            named += f"{', ' if number else ''}{last if again else place}"
            before, told_of = numbered, number + 1
        more = f" and {len(places) - told_of:,} more" if told_of < len(places) else ""
        text = f"{named}{more} ({'the same' if cause == first else cut(cause, longest)})"
        if told and sum(map(len, told)) + len(text) > characters:
            break
        told.append(text)
        left -= len(places)
    return "; ".join([*told, *([f"and {left:,} more"] if left else [])])


def check_positive(owner: str, **values: float) -> None:
    """Raise ConfigError unless all values are finite numbers above 0. owner: what has them, for the message."""
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{owner}: {key} must be positive and finite, not {value}.")


def check_sizes(owner: str, **sizes: int | None) -> None:
    """Raise ConfigError unless all sizes that are given are at least 1. owner: what has them, for the message."""
    for key, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{owner}: {key} must be positive, not {size}.")


def check_not_negative(owner: str, **values: float) -> None:
    """Raise ConfigError unless all values are finite numbers of at least 0. owner: what has them, for the message."""
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{owner}: {key} must be finite and not negative, not {value}.")


def paragraph(text: object, longest: int = 980) -> str:
    """A text as one line for a terminal. Characters that would move the cursor or reverse the text are escaped. If it
    has more than `longest` characters, the middle is left out, where what was read is quoted.

    >>> paragraph("a file\\n\x1b[31m is wrong")
    'a file \\\\x1b[31m is wrong'
    >>> paragraph("x" * 100, longest=20)
    'xxxxxxxxxx […] xxxxx'
    """
    line = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in " ".join(str(text).split())
    )
    if len(line) <= longest:
        return line
    gap = " […] "
    head = 2 * (longest - len(gap)) // 3
    return f"{line[:head]}{gap}{line[head + len(gap) - longest :]}"
