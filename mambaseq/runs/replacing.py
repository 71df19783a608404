"""What results may replace: earlier results, not a prompt, and nothing that is somebody else's beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mambaseq.errors import ConfigError, UserError
from mambaseq.outputs import is_stream
from mambaseq.plain import read_json

_KEYS = {"format", "writer", "checkpoint"}  # of the settings beside a result


def check_not_prompts(out: Path, files: Iterable[Path], sources: Iterable[str | Path]) -> None:
    """Raise ConfigError if one of the files to be written is one of those that are continued.

    out: as it was given. sources: files of prompts; those that are none, or are gone, do not count.
    """
    there = {_identity(Path(source)): source for source in sources}
    there.pop(None, None)
    for file in files if there else ():
        if (source := there.get(_identity(file), "")) != "":
            raise ConfigError(
                f"--out {out} writes {file}, which is the prompt's file ({source}) and would be overwritten. Give "
                "another name."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a text with a NUL
        return None
    return (found.st_dev, found.st_ino) if path.is_file() else None


def check_beside(files: Sequence[Path]) -> None:
    """Raise ConfigError if something that no result left stands where a file's settings or picture go (NAME.json,
    NAME.png), or what belongs to a result of another ending (NAME.flac beside NAME.wav)."""
    for file in files:
        if file.stem == "-" or is_stream(file):
            continue
        settings, picture = file.with_suffix(".json"), file.with_suffix(".png")
        found = None
        if os.path.lexists(settings):
            ours = _settings(settings)
            found = settings if ours is None else None
            if ours is not None and (other := _of_another(file, ours)) is not None:
                raise ConfigError(
                    f"{settings} says how {other} was made, and would be replaced by the settings of {file}. Give "
                    "another name with --out, or move that result away with its settings."
                )
        elif os.path.lexists(picture):
            found = picture
        if found is not None:
            raise ConfigError(
                f"{found} is in the way: a file of that name is written beside {file}, and this one is no earlier "
                "result's. Move it away, or give another name with --out."
            )


def remove_beside(file: Path) -> None:
    """Remove an earlier result's settings and picture: they would stand beside another sound. `check_beside` comes
    first."""
    for suffix in (".png", ".json"):
        file.with_suffix(suffix).unlink(missing_ok=True)


def _settings(path: Path) -> dict[str, Any] | None:
    """Those of an earlier result; None for any other file."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (UserError, OSError):
        return None
    return found if found.keys() >= _KEYS else None


def _of_another(file: Path, settings: dict[str, Any]) -> Path | None:
    """The result that stands beside a file and has these settings, if it is not that file. The name may have changed
    since, but for its ending."""
    name = settings.get("result")
    if not isinstance(name, str) or not (ending := Path(name).suffix) or ending == file.suffix:
        return None
    other = file.with_suffix(ending)
    return other if other.is_file() else None
