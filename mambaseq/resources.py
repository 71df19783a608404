"""Files that ship with a package, in a checkout or an installed wheel; the folder of a model; the cache folder; and the
cores."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mambaseq.atomic import settle
from mambaseq.errors import ConfigError, UserError, did_you_mean, shown

_PACKAGE = Path(__file__).parent
_LINKS = 40


def share() -> Path:
    """The folder that holds `configs/` and `data/`: the checkout's root, or `_share` inside the wheel."""
    installed = _PACKAGE / "_share"
    return installed if installed.is_dir() else _PACKAGE.parent


def is_resource(name: str | Path) -> bool:
    """Whether a name that a user gives for a file is `package:relative/path`, and no file has it."""
    package, separator, _ = str(name).partition(":")
    return bool(separator) and package.replace(".", "_").isidentifier() and not os.path.lexists(name)


def located(name: str | Path) -> Path:
    """The path that a user gives for a file or folder, as such or as a resource. Raises ConfigError as `find` does."""
    return find(str(name)) if is_resource(name) else Path(name)


def model_folder(path: str | Path) -> Path:
    """The folder that holds a model's description (model.json): a run's folder `model`, or the folder itself. Nothing
    slow is imported, so that commands ask for it first.

    path: of a run, of an exported model, or of one that ships with a package (`mambaseq:data/models/NAME`).
    Raises UserError if there is no model.
    """
    folder = settle(located(path))  # a run may be replacing it just now
    for place in (folder, settle(folder / "model")):
        if _is_file(place / "model.json"):
            return place
    near = near_folder(folder, lambda one: _is_file(one / "model.json") or _is_file(one / "model" / "model.json"))
    if _is_file(folder / "config.json"):
        raise UserError(
            f"There is no model.json in {str(path)[:300]}, but a config.json, as published models have. `mambaseq "
            "import --checkpoint FOLDER --out RUN` makes such a folder a run; give that."
        )
    raise UserError(
        f"There is no model at {str(path)[:300]}: no model.json and no model/model.json.{near} Give the folder of a "
        "run."
    )


NGRAM: Literal["ngram"] = "ngram"
"""In place of a draft's folder: guesses are what followed the same tokens before."""


def check_draft(name: str | Path) -> None:
    """Raise ConfigError unless a draft (see `mambaseq.generation.speculation`) is NGRAM or a folder with a model.
    Nothing slow is imported."""
    if str(name) == NGRAM:
        return
    try:
        model_folder(name)
    except UserError as error:
        raise ConfigError(
            f"--draft {shown(str(name), 300)} is no model: there is no model.json and no model/model.json."
            f"{did_you_mean(str(name), [NGRAM])} Give {NGRAM}, or the folder of a run."
        ) from error


def near_folder(path: Path, holds: Callable[[Path], bool]) -> str:
    """`did_you_mean` for a path that is not what is wanted: a folder around it (of a file in a run), or one beside it.

    holds: whether a folder is what is wanted.
    """
    for around in (path.parent, path.parent.parent) if os.path.exists(path) else ():  # noqa: PTH110 - False for any name
        if holds(around):
            return f" Did you mean {shown(around, 200)}?"
    try:
        beside = [one.name for one in path.parent.iterdir() if one.is_dir() and holds(one)]
    except (OSError, ValueError):
        beside = []
    near = did_you_mean(path.name, beside, least=0.7)
    meant = [one for one in beside if near == f" Did you mean {shown(one)}?"]
    return f" Did you mean {shown(path.parent / meant[0], 200)}?" if meant else ""


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - False too for what cannot be a file's name


def find(resource: str) -> Path:
    """The path of `"package:relative/path"`; `mambaseq:` looks in the shared folder (configs, data).

    Raises ConfigError when the package or the file does not exist.
    """
    package, separator, relative = resource.partition(":")
    if not separator:
        raise ConfigError(f"{shown(resource)} is not a resource; write package:relative/path.")
    if package == "mambaseq":
        root = share()
    else:
        outer = package.rpartition(".")[0]
        try:  # finding a subpackage imports the outer package, unless that is done already: a plugin's
            spec = importlib.util.find_spec(package) if not outer or outer in sys.modules else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"The resource {shown(resource, 200)} is in a package that is not installed: {shown(package)}."
            )
        root = Path(spec.origin).parent
    path = root / relative
    if not path.exists():
        raise ConfigError(f"The resource {shown(resource)} does not exist; its place would be {path}.")
    return path


def cores() -> int:
    """How many cores this process may use: on shared machines fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir(override: str | Path | None = None) -> Path:
    """The cache folder: `override`, otherwise the variable MAMBASEQ_CACHE, otherwise the platform's
    (`~/.cache/mambaseq`). Raises ConfigError if the home folder is unknown."""
    try:
        if override is not None:
            if "\0" in str(override):
                raise ConfigError(f"The cache folder {shown(override)} is not a folder name.")
            return Path(override).expanduser()
        if variable := os.environ.get("MAMBASEQ_CACHE"):
            return Path(variable).expanduser()
        import pooch

        return Path(pooch.os_cache("mambaseq"))
    except RuntimeError as error:
        raise ConfigError(
            f"The cache folder is unknown: {error} Set the variable MAMBASEQ_CACHE to a folder of your own."
        ) from error


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, for this user alone: cached files are run and trained on. Existing folders
    stay as they are. Raises OSError."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)


def why_unsafe(folder: Path) -> str | None:
    """Why others may have put something into a folder, or may replace it; None if only this user and root can.

    Parent folders and links on the way count too. A folder that does not exist yet is judged by its parents. On systems
    without file owners, no folder is unsafe.
    """
    if not hasattr(os, "geteuid"):
        return None
    done, parts = Path(folder.absolute().anchor), list(reversed(folder.absolute().parts[1:]))
    trusted, links = {0, os.geteuid()}, 0
    try:
        while True:
            status = done.lstat()
            shared = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
            if status.st_uid not in trusted:
                return f"{done} belongs to another user"
            if shared and not (
                parts and status.st_mode & stat.S_ISVTX
            ):  # in /tmp nobody can rename what belongs to another user
                return f"{done} may be written to by others"
            if stat.S_ISLNK(status.st_mode):
                target, links = done.readlink(), links + 1
                if links > _LINKS:
                    return f"{folder} is behind too many links"
                done = done.parent
                if target.is_absolute():
                    done, target = Path(target.anchor), target.relative_to(target.anchor)
                parts += reversed(target.parts)
            if not parts:
                return None
            part = parts.pop()
            done = done.parent if part == ".." else done / part
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{done} cannot be checked ({error.strerror})"
