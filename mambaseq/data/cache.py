"""Finding the data files that a configuration names, and noticing changes in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mambaseq import resources
from mambaseq.atomic import atomic_file, json_text
from mambaseq.data.addresses import is_address, redacted
from mambaseq.data.files import expand
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.resources import cache_dir, make_private

REMEMBERED_FROM = 8 * 2**20
_PART = 1 << 22
_SETTLED = 2.0  # seconds: the resolution of file systems' clocks


class NotFetched(DataError):
    """Files of a data set that users fetch are not here."""


def locate(name: str | Path) -> list[Path]:
    """The files that a name in a configuration stands for, sorted.

    name: a path, which may hold `*`, `?` and, for folders at any depth, `**`; `mambaseq:data/...` for a file that ships
        with the project (or `package:...` for any package's); `fetched:NAME/...` for a file from `mambaseq data fetch
        NAME`, in the folder of the variable MAMBASEQ_CACHE or the platform's cache folder. See
        `mambaseq.data.files.expand` for patterns and what they leave out.
    Raises DataError if there is no such file (NotFetched, if it is to be fetched), and for a folder.
    """
    text = str(name)
    if is_address(text):
        raise DataError(
            f"{redacted(text)} is an address, which cannot be read here. Download the file, and give its path."
        )
    scheme, separator, relative = text.partition(":")
    remedy = "Check the path; it is relative to the folder that the command runs in."
    if separator and scheme == "fetched":
        pattern = cache_dir() / "fetched" / relative
        remedy = (
            f"Run `mambaseq data fetch {relative.partition('/')[0]}` first; if that was done with --cache FOLDER, set "
            f"the variable MAMBASEQ_CACHE to that folder."
        )
    elif separator and scheme.isidentifier() and not Path(text).exists():
        folder, _, last = relative.rpartition("/")
        try:
            pattern = resources.find(f"{scheme}:{folder}") / last
        except ConfigError as error:
            raise DataError(redacted(error)) from error
        remedy = "Check the name of the resource."
    else:
        try:
            pattern = Path(text).expanduser()
        except RuntimeError as error:  # a user that does not exist
            raise DataError(f"There is no data file {shown(text, 300)}: {error} {remedy}") from error
    try:
        if pattern.is_file():
            return [pattern]
        if pattern.is_dir():
            raise DataError(
                f"{shown(text, 300)} is a folder. Name the files in it, with a pattern: {shown(pattern / '*', 300)}."
            )
        found = expand(pattern)
    except (OSError, ValueError) as error:  # an impossible file name: too long, or with a NUL
        raise DataError(f"{shown(text)} is not a file name: {getattr(error, 'strerror', error)}. {remedy}") from error
    if not found:
        kind = NotFetched if separator and scheme == "fetched" else DataError
        raise kind(f"There is no data file {shown(text, 300)} (looked for at {pattern.absolute()}). {remedy}")
    return found


def check_there(name: str | Path) -> None:
    """Raise what `locate` raises for a path that is no pattern and where nothing is; what else there may be wrong is
    for those who read it."""
    if not re.search(r"[*?[:]", str(name)) and not os.path.lexists(os.path.expanduser(name)):  # noqa: PTH111 - Path's raises
        locate(name)


class Stopped(Exception):
    """Nobody waits for the result any more."""


class Unchanged:
    """Files as they are now, to tell later whether what was read since is of one state.

    Make it before a file's checksum is begun and before its first record is read: a file that is replaced between the
    two would otherwise be stored for good under another file's checksum.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._states = {path: _state_now(path) for path in paths}

    def state(self, path: Path) -> list[int] | None:
        """That of a file, for `fingerprint`; None for one that could not be read."""
        return self._states[path]

    def seen(self) -> list[list[int] | None]:
        """Size and time of change (in nanoseconds) of each file, in order, to tell in another process whether they are
        the same still; None for one that could not be read."""
        return [state and state[2:4] for state in self._states.values()]

    def check(self) -> None:
        """Raise DataError if one of the files has changed since."""
        for path, state in self._states.items():
            if _state_now(path) != state:
                raise _changes(path)


def fingerprint(
    path: Path,
    cache: str | Path | None = None,
    *,
    state: list[int] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The identity of a source file: its name, its size and the sha256 of its contents.

    A large file is read once: its checksum is kept in the cache folder together with its device, inode, size and times
    of change, and the file is read again if one of these differs. The time of the last status change is among them, and
    no program can set that back.

    cache: the cache folder; see `cache_dir`. state: of the file that is read beside this (see `Unchanged`); a file in
        another one is refused. Without it a file that was written meanwhile is read again.
    stopped: asked now and then; once it is true, Stopped is raised.
    Raises DataError when the file cannot be read, or changes.
    """
    try:
        for _ in range(3 if state is None else 1):
            status = path.stat()
            if state is not None and _state(status) != state:
                break
            memory = _Memory(path, status, cache)
            digest = memory.recall()
            if digest is None:
                digest = _sha256(path, stopped)
                if _state(path.stat()) != _state(status):
                    continue  # it was written while it was read
                memory.keep(digest)
            return {"name": path.name, "size": status.st_size, "sha256": digest}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path and permissions.") from error
    raise _changes(path)


def _changes(path: Path) -> DataError:
    return DataError(f"{path} changes while it is read. Wait until it is complete.")


def _sha256(path: Path, stopped: Callable[[], bool] | None = None) -> str:
    """As `hashlib.file_digest`, in larger parts: a thread beside others waits between two of them."""
    found, part = hashlib.sha256(), memoryview(bytearray(_PART))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(part):
            if stopped is not None and stopped():
                raise Stopped
            found.update(part[:size])
    return found.hexdigest()


def _state(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _state_now(path: Path) -> list[int] | None:
    try:
        return _state(path.stat())
    except OSError:
        return None


class _Memory:
    """The checksum of a large file, remembered while the file system reports no change."""

    def __init__(self, path: Path, status: os.stat_result, cache: str | Path | None) -> None:
        self.state = [str(path.absolute()), *_state(status)]
        self.worth = status.st_size >= REMEMBERED_FROM
        self.settled = time.time() - status.st_ctime > _SETTLED
        name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:20]
        self.file = cache_dir(cache) / "fingerprints" / f"{name}.json"

    def _seal(self, digest: str) -> str:
        return hashlib.sha256(json_text([self.state, digest]).encode()).hexdigest()[:16]

    def recall(self) -> str | None:
        """The checksum; None if it is unknown, or the file may have changed since."""
        if not self.worth:
            return None
        try:
            state, digest, seal = json.loads(self.file.read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return str(digest) if state == self.state and seal == self._seal(digest) else None

    def keep(self, digest: str) -> None:
        """Remember it. A cache that cannot be written only costs time."""
        if not (self.worth and self.settled):
            return
        with contextlib.suppress(UserError, OSError):
            make_private(self.file.parent)
            with atomic_file(self.file, "w", encoding="ascii") as file:
                file.write(json_text([self.state, digest, self._seal(digest)]))
