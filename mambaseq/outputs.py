"""Files that a user names for results: whole or not there, through links, and onto devices and pipes as they are."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mambaseq.atomic import atomic_file, write_failed
from mambaseq.errors import ConfigError, UserError, cut, shown

_DESCRIPTOR = re.compile(rf"/(?:dev/fd|proc/(?:self|thread-self|{os.getpid()})/fd)/(\d+)")
_LINKS = 40  # as many as Linux follows


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout stands for. Writing there must not replace the file
    that the shell has opened."""
    place = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow the link to the file behind
    for _ in range(_LINKS):
        if found := _DESCRIPTOR.fullmatch(str(place)):
            return int(found[1])
        if not place.is_symlink():
            return None
        place = Path(os.path.abspath(place.parent / place.readlink()))  # noqa: PTH100
    return None


def is_stream(path: str | Path) -> bool:
    """Whether what is written to `path` flows away (a pipe, a terminal, /dev/null), so that nothing stands there
    afterwards. Raises ConfigError as `output_target` does."""
    path = Path(path)
    return _descriptor(path) is not None or _kind(output_target(path)) in ("device", "pipe")


def _kind(path: Path) -> str:
    """ "file", "folder", "device", "pipe", "none" for what is not there, or the name of something else."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "none"
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISCHR, "device"), (stat.S_ISFIFO, "pipe"))
    return next((kind for test, kind in kinds if test(mode)), "disk" if stat.S_ISBLK(mode) else "socket")


def output_target(path: str | Path, option: str = "--out", *, folder: bool = False) -> Path:
    """The file that is written when a user names `path`: itself, or what a link at its end points to.

    Raises ConfigError, naming the option, for a name that no file can have, a folder (but where `folder` allows it),
    links in a circle, a disk and a socket; UserError where the file system does not let it be looked at.
    """
    text = os.fspath(path)
    named = f"{option} {cut(text)}"
    if not text or "\0" in text or (Path(text).name in ("", "..") and not folder):
        raise ConfigError(f"{option} {shown(text)} is no name of a file. Give one, such as results.csv.")
    try:
        target = Path(text)
        for _ in range(_LINKS):
            if not target.is_symlink() or _descriptor(target) is not None:
                break
            target = target.parent / target.readlink()
        else:
            raise ConfigError(f"{named} is a link that leads back to itself. Give another name.")
        kind = "device" if _descriptor(target) is not None else _kind(target)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{named} is a link that leads back to itself. Give another name.") from error
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{option} {shown(text)} is too long for a file's name. Give a shorter one.") from error
        raise UserError(f"{named} cannot be used: {error.strerror}. Choose another place.") from error
    if kind in ("disk", "socket") or (kind == "folder" and not folder):
        raise ConfigError(f"{named} is a {kind}, and a file is to be written. Give the name of a file.")
    return target


@contextlib.contextmanager
def output_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open what a user named: a file as `mambaseq.atomic.atomic_file` does, but that a link stays and the file behind
    it is replaced; a device or pipe is written to as it is.

    mode: `"wb"` or `"w"`; options go to `open` (encoding, newline).
    Raises ConfigError as `output_target` does, UserError as `atomic_file` does.
    """
    path = Path(path)
    target = output_target(path)
    if not is_stream(path):
        with atomic_file(target, mode, **options) as file:
            yield file
        return
    with output_stream(path, mode, **options) as file:
        yield file


@contextlib.contextmanager
def output_stream(path: Path, mode: str, **options: Any) -> Iterator[IO[Any]]:
    """Open a device, a pipe or an open file of this process for writing. Raises UserError where that is refused, or
    goes wrong; not where the reader of a pipe has left, which is BrokenPipeError."""
    number = _descriptor(path)
    try:
        opened = os.dup(number) if number is not None else os.open(path, os.O_WRONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another place.") from error
    try:
        with open(opened, mode, **options) as file:  # noqa: PTH123 - a descriptor
            yield file
    except OSError as error:
        if (told := write_failed(path, error)) is not None:
            raise told from error
        raise


def numbered(path: Path, count: int, suffix: str = "") -> list[Path]:
    """Files for `count` results when a user named `path`: itself for one, else `NAME-000`, `NAME-001`, ... beside it.

    suffix: of the numbered ones, where `path` has none. Raises ConfigError for several results and a device or pipe.
    """
    if count == 1:
        return [path]
    if is_stream(path):
        raise ConfigError(f"--out {path} takes one result, and there are {count:,}. Give the name of a file.")
    digits = max(3, len(str(count - 1)))
    return [path.with_name(f"{path.stem}-{number:0{digits}d}{path.suffix or suffix}") for number in range(count)]


_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def safe_cell(text: str) -> str:
    """Text that a spreadsheet shows and does not run: an apostrophe stands before what begins like a formula (=, +, -,
    @, tab, carriage return; OWASP, "CSV Injection"). Numbers stay numbers.

    >>> safe_cell("=1+1"), safe_cell("-1.5e-3"), safe_cell("chr1")
    ("'=1+1", '-1.5e-3', 'chr1')
    """
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text) else text
