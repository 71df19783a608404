"""Files and folders that are either complete or absent: a half-written one never replaces a good one.

While it is written, a file or folder is next to its target as `.NAME.PID-TAG.tmp`; a folder that is being replaced is
there as `.NAME.PID-TAG.old`. The tag identifies the process. A killed process leaves them behind; the next writer
removes them, or puts an old folder back if the new one never came.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mambaseq.errors import UserError, shown

_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<host>[0-9a-f]{8})(?P<process>[0-9a-f]{8})[0-9a-f]{8}\.(?P<kind>tmp|old)(\.[^.]*)?"
)
_FOREIGN_AFTER = 7 * 24 * 3600  # seconds: whether another machine's process lives cannot be checked
_WAIT = 1.0  # seconds that a reader waits for a living process to put a folder in place

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.lru_cache(maxsize=1)
def _host() -> str:
    """Identifies the machine and, in a container, its process table: a process id has a meaning only there."""
    table = ""
    with contextlib.suppress(OSError):
        table = str(Path("/proc/self/ns/pid").readlink())
    return _tag(f"{os.uname().nodename} {table}")


def _process(pid: int) -> str:
    """Identifies the process that has this id now, since ids are reused ("" if there is none)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:
        pass  # somebody else's
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields and fields[0] in "ZX":
        return ""  # it has ended, and its parent has not collected it yet
    return _tag(f"{_read('/proc/sys/kernel/random/boot_id')} {fields[19:20]}")  # when it began


def _temporary(path: Path, kind: str = "tmp", suffix: str = "") -> Path:
    # the same folder, because a rename is atomic within a file system only
    pid, name = os.getpid(), path.name
    if kind == "tmp" and len(os.fsencode(name)) > 180:  # file systems end names at 255 bytes
        name = _tag(name)
    return path.parent / f".{name}.{pid}-{_host()}{_process(pid)}{secrets.token_hex(4)}.{kind}{suffix}"


def _is_dead(leftover: Path, found: re.Match[str]) -> bool:
    """Whether the process that wrote a temporary file or folder has ended. A process of another machine counts as ended
    when nothing was written for a week."""
    if found["host"] == _host():
        return _process(int(found["pid"])) != found["process"]
    try:
        newest = max(entry.lstat().st_mtime for entry in [leftover, *leftover.rglob("*")])
    except OSError:
        return False
    return time.time() - newest > _FOREIGN_AFTER


def _leftovers(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("."))
    except (OSError, ValueError):  # a name with a NUL
        return
    for name in names:
        if (found := _LEFTOVER.fullmatch(name)) is not None:
            yield folder / name, found


def remove_leftovers(folder: str | Path, *, deep: bool = False) -> None:
    """Remove what killed processes left half-written in a folder, and put back a folder that was moved aside for one
    that never came. What a living process writes stays, and so does what cannot be removed.

    deep: also in the folders below (links are not followed).
    """
    folder = Path(folder)
    for leftover, found in list(_leftovers(folder)):
        if not _is_dead(leftover, found):
            continue
        target = folder / found["name"]
        with contextlib.suppress(OSError):
            if found["kind"] == "old" and not os.path.lexists(target):
                leftover.rename(target)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
    if deep:
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False) and _LEFTOVER.fullmatch(entry.name) is None:
                    remove_leftovers(entry.path, deep=True)


def settle(path: str | Path) -> Path:
    """The path, for a reader. If nothing is there because a process is replacing the folder, waits for the new one (a
    second at most); if that process was killed, puts the old folder back."""
    path = Path(path)
    deadline = time.monotonic() + _WAIT
    while not os.path.lexists(path):
        wanted = (path.name, "old")
        aside = [place for place in _leftovers(path.parent) if place[1].group("name", "kind") == wanted]
        if not aside:
            break
        if any(_is_dead(*place) for place in aside):
            remove_leftovers(path.parent)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return path


def _is_or_becomes(file: Path, path: Path) -> bool:
    """Whether a file is the one at `path`, or an unfinished copy of it."""
    return file.parent == path.parent and (file.name == path.name or file.name.startswith(f".{path.name}."))


def write_failed(path: Path, error: BaseException) -> UserError | None:
    """The message for a failed write to `path`; None if the error is not about that place.

    Some libraries (safetensors, torch) report a full disk only in the text of an error, so the text counts too.
    """
    named = getattr(error, "filename", None)
    if isinstance(named, str) and path.parent not in Path(named).parents and Path(named) not in path.parents:
        return None  # an error about some other file, such as one that is read
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in FULL or "No space left on device" in text or "os error 28" in text:
        return UserError(
            f"The disk is full (or a quota reached): {path} could not be written. The earlier file, if any, is "
            "untouched, and the unfinished copy was removed. Free some space, or choose another place."
        )
    # where the folder is there, and no file can be made in it (/proc)
    unmade = number == errno.ENOENT and isinstance(named, str) and _is_or_becomes(Path(named), path)
    if number is not None and (number in _DENIED or unmade):
        return UserError(
            f"{path} cannot be written: {os.strerror(number)}. Choose another place, or change the "
            f"permissions of {path.parent}."
        )
    if number == errno.EIO:
        return UserError(f"Writing {path} failed with an input/output error. Check the disk, or choose another place.")
    return None


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Make the parent folder, and turn errors about the place into UserError."""
    if "\0" in str(path):
        raise UserError(
            f"{shown(path, 300)} cannot be written: its name contains a NUL character. Choose another name."
        )
    if not path.name:
        raise UserError(f"{shown(path, 300)} cannot be written: it is a folder that must stay. Give a name inside it.")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # the latter where no folder can be made (/proc)
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path.parent)) from error
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long is refused before the work, not after
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # torch.save raises another error on top of the relevant one
            if (told := write_failed(path, cause)) is not None:
                raise told from error
            cause = cause.__cause__ or cause.__context__
        raise


def sync(path: Path) -> None:
    """Wait until what is written to a file, or what is in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file next to `path`. When the block ends without an error, it is flushed to disk and moved to
    `path`.

    mode: `"wb"` or `"w"`; options go to `open` (encoding, newline). Parent folders are made.
    Raises UserError when the disk is full or the place is not writable; on any error the temporary file is removed and
    `path` is untouched.
    """
    path = Path(path)
    with _reported(path):
        temporary = _temporary(path)
        remove_leftovers(path.parent)
        try:
            with temporary.open(mode.replace("w", "x"), **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """`atomic_file` for libraries that need a file name: yields the temporary name, which keeps the suffix. Raises what
    `atomic_file` raises."""
    path = Path(path)
    with _reported(path):
        temporary = _temporary(path, suffix=path.suffix)
        remove_leftovers(path.parent)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = True, place: Callable[[], Path] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`. When the block ends without an error, it is moved to `path`.

    replace: move an existing folder aside, and remove it once the new one is in place. No portable call exchanges two
        folders, so for an instant nothing is at `path`. A process killed in that instant leaves both next to it, and
        the next reader (`settle`) or writer puts the old one back. With False an existing folder stays and
        FileExistsError is raised: another process was first.
    place: called when the block has ended: where the folder goes, beside `path`, if that is not known before.
    Raises UserError as `atomic_file` does; on any error the temporary folder is removed and what stood at `path` is
    untouched.
    """
    path = Path(path)
    with _reported(path):
        temporary = _temporary(path)
        remove_leftovers(path.parent)
        try:
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            install(temporary, place() if place else path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder is on disk, with all that is in it."""
    for entry in sorted(folder.rglob("*")):
        sync(entry)
    sync(folder)


def install(temporary: Path, path: Path, replace: bool) -> None:
    """Move a whole folder to `path`, beside it. replace: as of `atomic_folder`.

    Raises FileExistsError for a folder that is not empty, or a file, where nothing is to be replaced.
    """
    try:
        temporary.rename(path)  # fails if `path` is a folder that is not empty
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not replace:
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
    aside = _temporary(path, "old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


def plain_values(value: Any) -> Any:
    """A value as JSON would give it back: numbers that are not finite become None, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    return [plain_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, **options: Any) -> str:
    """JSON that every reader accepts: numbers that are not finite become null.

    >>> json_text({"loss": float("nan")})
    '{"loss": null}'
    """
    return json.dumps(plain_values(value), allow_nan=False, **options)
