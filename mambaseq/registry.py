"""Names to objects: lazy, typed, discovered through entry points.

A registry holds entries `(target, summary, origin)`. The target is `"module:Attr"` and is imported only when the
name is used, so listing what exists costs no import of torch. Nothing registers by being imported: the core
passes its own table, and domains are found by the entry-point group `mambaseq.domains`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from mambaseq.errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered name: where it is (`"module:Attr"`), what it is in a line, and who brought it."""

    name: str
    target: str
    summary: str
    origin: str

    def load(self) -> Any:
        """Import the target. Raises ConfigError that names the entry and its origin when that fails."""
        try:
            return import_target(self.target)
        except ConfigError as error:
            raise ConfigError(f"{self.name!r} (from {self.origin}) cannot be loaded: {error}") from error


def import_target(target: str) -> Any:
    """Import `"package.module:Attr"` or `"package.module.Attr"`.

    Raises ConfigError when the module or the attribute does not exist, or when the import itself fails.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator:
        module_name, _, attribute = target.rpartition(".")
    if not module_name or not attribute:
        raise ConfigError(f"{target!r} is not an import path; write package.module:Attribute.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise ConfigError(f"Module {module_name!r} has no {attribute!r}.") from error
    except Exception as error:  # a plugin's import may fail in any way; the name must reach the user
        raise ConfigError(f"Importing {module_name!r} failed: {type(error).__name__}: {error}.") from error


class Registry(Generic[T]):
    """Names of one kind of thing (mixers, datasets, ...). Reading it is lazy; adding a taken name is an error.

    >>> mixers = Registry("mixer", {"mamba": ("mambaseq.mixers.mamba:Mamba", "S6")})
    >>> mixers.entry("mamba").summary
    'S6'
    """

    def __init__(
        self, kind: str, entries: Mapping[str, tuple[str, str]] | None = None, origin: str = "mambaseq"
    ) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self.add_all(entries or {}, origin)

    def add(self, name: str, target: str, summary: str, origin: str) -> None:
        """Register a name. Raises ConfigError naming both origins when the name is taken."""
        if (taken := self._entries.get(name)) is not None:
            raise ConfigError(
                f"Two {self.kind}s are named {name!r}: {taken.target} (from {taken.origin}) and {target} "
                f"(from {origin}). Rename one, or uninstall one of the two packages."
            )
        self._entries[name] = Entry(name, target, summary, origin)

    def add_all(self, entries: Mapping[str, tuple[str, str]], origin: str) -> None:
        """Register names, each with its target and summary. Raises ConfigError when one is taken."""
        for name, (target, summary) in entries.items():
            self.add(name, target, summary, origin)

    def entry(self, name: str) -> Entry:
        """The entry of a short name. Raises ConfigError with the nearest name when there is none."""
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ConfigError(
                f"No {self.kind} is named {name!r}.{did_you_mean(name, self._entries)} Known: {known}. "
                f"A full import path (package.module:Attribute) works too."
            ) from None

    def get(self, name: str) -> T:
        """The object behind a short name, or behind a full import path (any name with a dot and a colon)."""
        if name not in self._entries and ":" in name:
            return import_target(name)
        return self.entry(name).load()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __len__(self) -> int:
        return len(self._entries)
