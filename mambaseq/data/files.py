"""Which files a folder or a pattern stands for."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mambaseq.errors import DataError, cut_list, shown

logger = logging.getLogger(__name__)

_MAGIC = re.compile(r"[*?[]")


class LeftOut:
    """Files of a folder or pattern that are not read: counted, and reported in one line."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, path: str) -> None:
        """kind: what it is, in the plural."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, path)

    def tell(self, name: str) -> None:
        """name: the folder or pattern, as it was given."""
        if self.counts:
            parts = (f"{kind}: {count:,} (such as {self.examples[kind]})" for kind, count in self.counts.items())
            logger.warning("Left out of %s: %s.", name, "; ".join(parts))


def expand(pattern: str | Path) -> list[Path]:
    """The files that match a pattern, sorted; empty if there are none.

    `*`, `?` and `[...]` match parts of a name, `**` any number of nested folders, also none. Links to folders are
    followed, and `**` visits each real folder once. Names that begin with a dot are left out (including macOS's
    `._NAME`), and so are broken links; one line says how many. A part of the pattern that begins with a dot matches
    such names.
    Raises DataError for a folder that cannot be read, and for an impossible file name.
    """
    path = Path(pattern)
    left_out = LeftOut()
    parts = path.parts[1:] if path.anchor else path.parts
    try:
        found = dict.fromkeys(_matches(Path(path.anchor), parts, left_out))
    except (ValueError, OSError) as error:  # a NUL, or too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{shown(pattern, 300)} is not a file name: {reason}. Check the path.") from error
    left_out.tell(str(pattern))
    return sorted(found)


def walk(folder: str | Path, suffixes: Collection[str]) -> list[Path]:
    """The files in a folder, at any depth, whose names end in one of `suffixes` (lower case, with the dot), sorted;
    empty if there are none.

    Links are followed, and each real folder is visited once. What is left out (see `expand`, and files with other
    endings) is reported in one line. Raises DataError for a folder that cannot be read.
    """
    left_out = LeftOut()
    found, others = [], []
    for inside in _folders(Path(folder), left_out):
        for path in _files(inside, "*", left_out, suffixes):
            if path.suffix.lower() in suffixes:
                found.append(path)
            else:
                others.append(path)
    if others:
        endings = sorted({path.suffix.lower() or "no ending" for path in others})
        for path in others:
            left_out.add(f"files of other kinds [{cut_list(endings, 5)}]", str(path))
    left_out.tell(str(folder))
    return sorted(found)


def relative_names(paths: Sequence[Path], given: str | Path) -> list[str]:
    """Names of records from files: their paths without suffix, from where a folder or pattern begins to vary
    (`"b/two"` of `x/b/two.wav`, given `x` or `x/*/*.wav`). Files that would share a name keep their suffixes."""
    base = Path(given).expanduser()
    if not base.is_dir():
        fixed = next((number for number, part in enumerate(base.parts) if _MAGIC.search(part)), len(base.parts) - 1)
        base = Path(*base.parts[:fixed])
    if not all(path.is_relative_to(base) for path in paths):  # a resource, say
        base = Path(os.path.commonpath([path.parent for path in paths]))
    whole = [path.relative_to(base) for path in paths]
    bare = [name.with_suffix("").as_posix() for name in whole]
    counts = Counter(bare)
    return [short if counts[short] == 1 else name.as_posix() for short, name in zip(bare, whole, strict=True)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read: {error.strerror}. Change its permissions, or leave it out."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_hidden(name: str, pattern: str = "*") -> bool:
    return name.startswith(".") and not pattern.startswith(".")


def _folders(top: Path, left_out: LeftOut) -> Iterator[Path]:
    """A folder and all folders in it, each real one once: first those that are really there, then those that links lead
    to."""
    seen: set[tuple[int, int]] = set()
    links = [top]
    while links:
        pending = [links.pop(0)]
        while pending:
            folder = pending.pop()
            status = folder.stat()
            if (key := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(key)
            yield folder
            inside = []
            for entry in _entries(folder):
                if not _is_folder(entry):
                    continue
                path = folder / entry.name
                if _is_hidden(entry.name):
                    left_out.add("hidden folders", str(path))
                elif entry.is_symlink():
                    links.append(path)
                else:
                    inside.append(path)
            pending += reversed(inside)


def _files(folder: Path, pattern: str, left_out: LeftOut, suffixes: Collection[str] | None = None) -> Iterator[Path]:
    for entry in _entries(folder):
        if not fnmatch.fnmatch(entry.name, pattern):
            continue
        path = folder / entry.name
        wanted = suffixes is None or path.suffix.lower() in suffixes
        if _is_hidden(entry.name, pattern):
            if wanted and not _is_folder(entry):
                left_out.add("hidden files", str(path))
        elif path.is_file():
            yield path
        elif wanted and entry.is_symlink() and not path.exists():
            left_out.add("links that lead nowhere", str(path))


def _matches(base: Path, parts: Sequence[str], left_out: LeftOut) -> Iterator[Path]:
    """The files below `base` that match the rest of a pattern."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for folder in _folders(base, left_out) if base.is_dir() else ():
            yield from _matches(folder, rest or ("*",), left_out)
    elif not rest:
        if _MAGIC.search(part):
            yield from _files(base, part, left_out)
        elif (base / part).is_file():
            yield base / part
    elif _MAGIC.search(part):
        for entry in _entries(base):
            if fnmatch.fnmatch(entry.name, part) and not _is_hidden(entry.name, part) and _is_folder(entry):
                yield from _matches(base / entry.name, rest, left_out)
    else:
        yield from _matches(base / part, rest, left_out)
