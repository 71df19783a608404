"""What a configuration's `files` stand for: whole sound files, or what a manifest says about files and parts of
them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseq.conditions import composed
from mambaseq.data.cache import locate
from mambaseq.data.files import relative_names, walk
from mambaseq.data.tables import ENDINGS, named_rows
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"))


@dataclasses.dataclass(frozen=True)
class Recording:
    """A sound file, or a part of one.

    name: what it is called in every output: its path from where files begin to differ, and its part.
    start, end: of the part, in seconds; None is the file's end. channel: the one that is read, counted from 0; None for
        what the setting `channels` makes of all. fields: what the manifest's other columns say. place: the manifest and
        the line that name it.
    """

    path: Path
    name: str
    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    place: str = dataclasses.field(default="", compare=False)

    @property
    def is_part(self) -> bool:
        return self.start > 0 or self.end is not None

    def __str__(self) -> str:
        return f"{self.path}{_part(self.start, self.end)}{f' ({self.place})' if self.place else ''}"

    def overlaps(self, other: Recording) -> bool:
        """Whether both hold the same time of one file, which is not looked at here."""
        return self.start < (other.end or math.inf) and other.start < (self.end or math.inf)


def _part(start: float, end: float | None) -> str:
    return "" if start == 0 and end is None else f"@{start:g}-{'' if end is None else f'{end:g}'}"


def audio_files(
    name: str | Path,
    suffixes: Collection[str] = SUFFIXES,
    kind: str = "sound file",
    endings: str = ".wav, .flac or .ogg",
) -> list[Path]:
    """The sound files that a name stands for, sorted: a file, a pattern, a resource (see
    `mambaseq.data.cache.locate`), or a folder, searched with its subfolders (see `mambaseq.data.files.walk`).
    suffixes: endings of the files of a folder. kind, endings: what they are, for messages.
    Raises DataError when there is none."""
    try:
        folder = Path(name).expanduser()
        is_folder = bool(str(name)) and folder.is_dir()
    except (OSError, RuntimeError):  # too long; the home of a user that does not exist
        is_folder = False
    if not is_folder:
        return locate(name)
    found = walk(folder, suffixes)
    if not found:
        raise DataError(f"The folder {folder} holds no {kind}. Put files that end in {endings} there, or name another.")
    return found


def recordings(name: str | Path, *of: Any) -> list[Recording]:
    """What a name stands for: the files of `audio_files`, or, where it ends in .csv, .tsv or .jsonl, the rows of that
    manifest in their order.

    A manifest's column `file` is a path, relative to the manifest or to the current folder, whichever way accents are
    written in it. `start` and `end` are seconds; without them, the whole file. Other columns become `fields`.
    of: what else `audio_files` takes. Raises DataError that names the manifest's line; a file that is not there is not
    noticed here.
    """
    if is_manifest(name):
        found = [one for manifest in locate(name) for one in _rows(manifest)]
        if not found:
            raise DataError(f"The manifest {name} has no row. Write one for each recording.")
        return found
    paths = audio_files(name, *of)
    return [Recording(path, called) for path, called in zip(paths, relative_names(paths, name), strict=True)]


def names_of(files: str | Sequence[str]) -> list[str]:
    """What a dataset's `files` name, one by one. Raises ConfigError for an empty list."""
    found = [files] if isinstance(files, str) else list(files)
    if not found:
        raise ConfigError("data.files names nothing. Give a folder, a pattern, or a list of them.")
    return found


def all_recordings(names: Sequence[str | Path], *of: Any) -> list[Recording]:
    """What several names stand for, in their order, each recording once. Of several names, files are called by their
    paths from where all of them begin to differ. of: what else `audio_files` takes. Raises what `recordings` raises."""
    found: dict[tuple[str, float, float | None], Recording] = {}
    for name in names:
        for one in recordings(name, *of):
            found.setdefault((os.path.abspath(one.path), one.start, one.end), one)  # noqa: PTH100 - links stay
    if len(names) > 1:
        files = [key for key, one in found.items() if not one.place]
        called = relative_names([Path(path) for path, _, _ in files], os.path.abspath(names[0]))  # noqa: PTH100
        found |= {key: dataclasses.replace(found[key], name=name) for key, name in zip(files, called, strict=True)}
    return list(found.values())


def are_manifests(names: Sequence[str]) -> bool:
    """Whether these names are those of manifests. Raises ConfigError where some are."""
    kinds = {is_manifest(name) for name in names}
    if len(kinds) > 1:
        one = next(name for name in names if is_manifest(name))
        raise ConfigError(
            f"data.files has a manifest, {shown(one)}, beside sound files, of which nothing says what a manifest does. "
            "Give manifests alone, or files alone."
        )
    return kinds == {True}


def is_manifest(name: str | Path) -> bool:
    """Whether a name is that of a manifest, by its ending."""
    return Path(name).suffix.lower() in ENDINGS


def manifest_columns(name: str | Path) -> list[str]:
    """The names of a manifest's `fields`, of all rows; none of what is no manifest. Raises DataError as `recordings`
    does."""
    return list(dict.fromkeys(field for one in recordings(name) for field in one.fields)) if is_manifest(name) else []


def _rows(manifest: Path) -> Iterator[Recording]:
    seen: dict[tuple[Path, float, float | None], str] = {}
    folders: dict[Path, dict[str, str]] = {}
    for line, row in named_rows(manifest, "The manifest"):
        where = f"{manifest}, line {line}"
        file = row.get("file")
        if not isinstance(file, str) or not file.strip():
            names = [str(one)[:80] for one in row]
            what = "file"
            if "file" not in row:
                what = f"column file; it has {cut_list(names, 8)}"
            near = "" if "file" in row else did_you_mean("file", names)
            raise DataError(f"{where}: there is no {what}.{near} The column file holds the path of a recording.")
        try:
            path = _place(manifest.parent, file.strip(), folders)
        except (OSError, ValueError) as error:  # a name with a NUL, or too long
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where}: {shown(file)} is no file name: {reason}. Correct it.") from error
        start, end = _seconds(row.get("start"), f"{where}: start") or 0.0, _seconds(row.get("end"), f"{where}: end")
        if end is not None and end <= start:
            raise DataError(f"{where}: end ({end:g} s) must come after start ({start:g} s). Correct it.")
        if (other := seen.setdefault((path, start, end), where)) != where:
            raise DataError(f"{where} is about the same recording as {other.rpartition(', ')[2]}. Remove one of them.")
        called = composed(Path(file.strip()).as_posix()) + _part(start, end)
        yield Recording(path, called, start, end, fields=_fields(row, where), place=where)


def _fields(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """The other columns as text. Numbers are written as whole numbers where they are whole, so that jsonl's 1.0 and 1
    are CSV's 1."""
    found = {}
    for name, value in row.items():
        if name in ("file", "start", "end"):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(f"{where}: {shown(name)} is {shown(value)}. Give a name or a number.")
        found[composed(name)] = "" if value is None else composed(str(value).strip())
    return found


def _seconds(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise DataError(f"{where} is {shown(value)}. Give seconds from the file's beginning, such as 1.5.")
    return seconds


def _place(folder: Path, name: str, folders: dict[Path, dict[str, str]]) -> Path:
    """The file that a manifest names. Where no file has that name exactly, accents may be written in another way."""
    for base in (folder / name, Path(name)):
        if os.path.lexists(base):
            return base
    for base in (folder, Path()):
        found = base
        for part in Path(name).parts:
            if not os.path.lexists(found / part):
                if found not in folders:
                    folders[found] = {composed(one.name): one.name for one in found.iterdir()} if found.is_dir() else {}
                part = folders[found].get(composed(part), part)
            found = found / part
        if os.path.lexists(found):
            return found
    return folder / name


def overlap(found: Sequence[Recording], splits: Mapping[int, str]) -> tuple[int, int] | None:
    """Two recordings in different splits that hold the same time of one file; None if there are none.

    splits: of the recordings by number. Whole files that are there twice overlap too.
    """
    by_file: dict[str, list[int]] = {}
    for number, one in enumerate(found):
        if number in splits and one.place:
            by_file.setdefault(os.path.realpath(one.path), []).append(number)
    for numbers in by_file.values():
        last: dict[str, int] = {}  # of each split, the recording that ends last, if it has not ended
        for number in sorted(numbers, key=lambda n: found[n].start):
            last = {split: other for split, other in last.items() if found[other].overlaps(found[number])}
            for split, other in last.items():
                if split != splits[number]:
                    return other, number
            before = last.get(splits[number])
            if before is None or (found[before].end or math.inf) < (found[number].end or math.inf):
                last[splits[number]] = number
    return None
