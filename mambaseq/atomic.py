"""Files and folders that are either whole or not there: a half-written one never takes a good one's place."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mambaseq.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def _temporary(path: Path) -> Path:
    # the same folder, because a rename is atomic within a file system only
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def write_failed(path: Path, error: BaseException) -> UserError | None:
    """What to tell the user when writing `path` failed; None when the error is not about the place written
    to.

    Libraries written in other languages report a full disk in a string of their own (safetensors, torch), so
    the text of the error counts too.
    """
    named = getattr(error, "filename", None)
    if isinstance(named, str) and path.parent not in Path(named).parents and Path(named) not in path.parents:
        return None  # some other file: one that is being read
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in _FULL or "No space left on device" in text or "os error 28" in text:
        return UserError(
            f"The disk is full (or a quota reached): {path} could not be written. What stood there before is "
            f"untouched and the unfinished copy was removed. Free some space, or choose another place."
        )
    if number in _DENIED:
        return UserError(
            f"{path} cannot be written: {os.strerror(number)}. Choose another place, or change the "
            f"permissions of {path.parent}."
        )
    if number == errno.EIO:
        return UserError(f"Writing {path} failed with an input/output error. Check the disk, or choose another place.")
    return None


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Make the parent folder, and turn what goes wrong with the place into a UserError."""
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path.parent)) from error
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # torch.save ends with another error on top of the one that matters
            if (told := write_failed(path, cause)) is not None:
                raise told from error
            cause = cause.__cause__ or cause.__context__
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; when the block ends well it is flushed to the disk and takes its
    place.

    mode: `"wb"` or `"w"`; options go to `open` (encoding, newline). Parent folders are made.
    Raises UserError when the disk is full or the place is not writable; on any error the temporary file is
    removed and what stood at `path` is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _reported(path):
        try:
            with temporary.open(mode.replace("w", "x"), **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """The same for libraries that want a file's name: yields the temporary name, which keeps the suffix."""
    path = Path(path)
    temporary = _temporary(path).with_suffix(path.suffix)
    with _reported(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; when the block ends well it takes its place.

    replace: an existing folder is moved aside, and removed once the new one is in place. No portable call exchanges
        two folders, so for an instant nothing stands at `path`; a process killed in that instant leaves both beside
        it, as `.NAME.*.tmp`, and a reader that finds nothing should look again. With False an
        existing one stays and FileExistsError is raised, which is how the loser of a race learns that another
        was first.
    Raises UserError as `atomic_file` does; on any error the temporary folder is removed and what stood at
    `path` is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _reported(path):
        try:
            temporary.mkdir()
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                _sync(entry)
            _sync(temporary)
            _install(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


def _install(temporary: Path, path: Path, replace: bool) -> None:
    try:
        temporary.rename(path)  # fails when `path` is a folder with something in it
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not replace:
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
    aside = _temporary(path)
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
