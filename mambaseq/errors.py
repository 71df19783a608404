"""Errors that are the user's to mend. The command line prints them as one paragraph and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside of the program is wrong: a file, a name, a setting.

    The message is one paragraph that names what was read (file, record, key), what is wrong with it and the
    remedy.
    """


class DataError(UserError):
    """A data file or one of its records cannot be used."""


class ConfigError(UserError):
    """A run's configuration cannot be used: an unknown name or key, or values that exclude each other."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of the known names, else ``""``.

    >>> did_you_mean("mambda", ["mamba", "s4d"])
    " Did you mean 'mamba'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
