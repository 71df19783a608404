"""Names to objects: lazy, typed, discovered through entry points.

A registry holds entries `(target, summary, origin)`. The target is `"module:Attr"` and is imported only when the
name is used, so listing what exists costs no import of torch. Nothing registers by being imported: the core
passes its own table, and domains are found by the entry-point group `mambaseq.domains`.

Names come from files that others wrote (a run's config.yaml, a model's model.json). They are looked up here and nowhere
else; an import path, `"module:Attr"`, counts only below what `allow_imports` was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from mambaseq.errors import ConfigError, cut_list, did_you_mean, shown

T = TypeVar("T")

FUNCTION = "function"
"""Instead of a class: a function is wanted."""

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_allowed: tuple[str, ...] = ()


class _Allowed(contextlib.AbstractContextManager):
    def __init__(self, former: tuple[str, ...]) -> None:
        self.former = former

    def __exit__(self, *exception: object) -> None:
        global _allowed
        _allowed = self.former


def allow_imports(*prefixes: str) -> contextlib.AbstractContextManager:
    """Let names in configurations and models be import paths below these modules or packages: `"mypkg"` allows
    `mypkg:A` and `mypkg.sub:A`, never `mypkg2:A`.

    It applies from the call on, in all threads of this process; as a context manager, until the block ends. Imported
    code runs: allow only packages that you trust. On the command line this is `--allow-import PREFIX`. Raises
    ConfigError for what is not a module name.
    """
    global _allowed
    for prefix in prefixes:
        if not _MODULE.fullmatch(prefix):
            raise ConfigError(f"--allow-import takes the name of a module or package, not {shown(prefix)}.")
    undo = _Allowed(_allowed)
    _allowed = (*_allowed, *prefixes)
    return undo


def is_allowed(module: str) -> bool:
    """Whether `allow_imports` was given this module, or a package that contains it."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in _allowed)


def import_allowed(path: str, kind: str, wanted: str | None, where: str = "") -> Any:
    """The object of an import path, which must be of the wanted kind, and defined below what `allow_imports` was given.

    kind, where: for messages: what it is, and where the path is written. wanted: see `Registry`. Nothing is imported
        unless its module is allowed. Raises ConfigError otherwise.
    """
    module, _, attribute = path.partition(":")
    subject = f"{f'{where}: the' if where else 'The'} {kind} {shown(path, 200)}"
    if wanted is None:
        raise ConfigError(f"{subject} is an import path; a {kind} must be a registered name.")
    if not _MODULE.fullmatch(module) or not attribute.isidentifier():
        raise ConfigError(f"{subject} is not an import path, package.module:Attribute.")
    if not is_allowed(module):
        raise ConfigError(
            f"{subject} is an import path, and nothing is imported because a file names it. If you trust the package, "
            f"allow it on the command line: --allow-import {module.partition('.')[0]}"
        )
    found = import_target(path)
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not is_allowed(home):
        raise ConfigError(
            f"{subject} is defined in {shown(home)}, which --allow-import does not allow. Name it where it is defined."
        )
    check_kind(found, wanted, subject, defined=True)
    return found


def check_kind(found: Any, wanted: str | None, subject: str, *, defined: bool = False) -> None:
    """Raise ConfigError unless an imported object is of the wanted kind (see `Registry`).

    defined: a function must be defined in Python.
    """
    if wanted is None:
        return
    if wanted == FUNCTION:
        if not isinstance(found, types.FunctionType) if defined else not callable(found):
            raise ConfigError(f"{subject} is a {type(found).__name__}; a function is needed.")
        return
    base = import_target(wanted)
    name = wanted.replace(":", ".")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{subject} is not a {name}: a subclass of it is needed here.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(f"{subject} cannot be made: it leaves out {missing}, which a {name} needs.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered name: its target (`"module:Attr"`), a one-line summary, and the package that brought it."""

    name: str
    target: str
    summary: str
    origin: str

    def load(self) -> Any:
        """Import the target. Raises ConfigError that names the entry and its origin if that fails."""
        try:
            return import_target(self.target)
        except ConfigError as error:
            raise ConfigError(f"{shown(self.name)} (from {self.origin}) cannot be loaded: {error}") from error


def import_target(target: str) -> Any:
    """Import `"package.module:Attr"` or `"package.module.Attr"`.

    Raises ConfigError when the module or the attribute does not exist, or when the import itself fails.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator:
        module_name, _, attribute = target.rpartition(".")
    if not module_name or not attribute:
        raise ConfigError(f"{shown(target)} is not an import path; write package.module:Attribute.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise ConfigError(f"Module {shown(module_name)} has no {shown(attribute)}.") from error
    except Exception as error:  # a plugin's import may fail in any way; the name must reach the user
        raise ConfigError(f"Importing {shown(module_name)} failed: {type(error).__name__}: {error}.") from error


class Registry(Generic[T]):
    """Names of one kind of thing (mixers, datasets, ...). Reading it is lazy; adding a taken name is an error.

    wanted: what entries must be, checked when one is used: `"module:Class"` for its subclasses, FUNCTION for functions,
        None for anything; import paths are then refused.

    >>> mixers = Registry("mixer", {"mamba": ("mambaseq.mixers.mamba:Mamba", "S6")})
    >>> mixers.entry("mamba").summary
    'S6'
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, tuple[str, str]] | None = None,
        origin: str = "mambaseq",
        wanted: str | None = None,
    ) -> None:
        self.kind, self.wanted = kind, wanted
        self._entries: dict[str, Entry] = {}
        self.add_all(entries or {}, origin)

    def add(self, name: str, target: str, summary: str, origin: str) -> None:
        """Register a name. Raises ConfigError that names both origins if it is taken."""
        if (taken := self._entries.get(name)) is not None:
            raise ConfigError(
                f"Two {self.kind}s are named {shown(name)}: {taken.target} (from {taken.origin}) and {target} "
                f"(from {origin}). Rename one, or uninstall one of the two packages."
            )
        self._entries[name] = Entry(name, target, summary, origin)

    def add_all(self, entries: Mapping[str, tuple[str, str]], origin: str) -> None:
        """Register names, each with its target and summary. Raises ConfigError if one is taken."""
        for name, (target, summary) in entries.items():
            self.add(name, target, summary, origin)

    def entry(self, name: str, where: str = "") -> Entry:
        """The entry of a short name. where: the key or file that names it, for the message.

        Raises ConfigError with the nearest name if there is none.
        """
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            pass
        begin = f"{where}: no" if where else "No"
        if not isinstance(name, str):
            raise ConfigError(f"{begin} {self.kind} is named {shown(name)}: a name is text.")
        raise ConfigError(
            f"{begin} {self.kind} is named {shown(name)}.{did_you_mean(name[:80], self._entries)} Known: "
            f"{cut_list(sorted(self._entries))}. A full import path (package.module:Attribute) works too, if "
            f"--allow-import allows it."
        )

    def get(self, name: str, where: str = "") -> T:
        """The object of a short name, or of an import path that `allow_imports` allows.

        where: the key or file that names it, for the messages. Raises ConfigError if there is none, it cannot be
            imported, or it is not of this registry's kind.
        """
        if isinstance(name, str) and ":" in name and name not in self._entries:
            return import_allowed(name, self.kind, self.wanted, where)
        entry = self.entry(name, where)
        loaded = entry.load()
        check_kind(loaded, self.wanted, f"The {self.kind} {shown(name)} (from {entry.origin}, {entry.target})")
        return loaded

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries  # a configuration may hold anything

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __len__(self) -> int:
        return len(self._entries)
