"""Files that a user names for results: written completely or not at all, through links, and directly to devices and
pipes."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ParamSpec

from mambaseq.atomic import atomic_file, write_failed
from mambaseq.errors import ConfigError, UserError, cut, cut_list, shown

_P = ParamSpec("_P")

_DESCRIPTOR = re.compile(rf"/(?:dev/fd|proc/(?:self|thread-self|{os.getpid()})/fd)/(\d+)")
_LINKS = 40  # the number that Linux follows


def _descriptor(path: Path) -> int | None:
    """The open file of this process behind a path such as /dev/stdout. Writing there must not replace the file that the
    shell opened."""
    place = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow the link to the file behind
    for _ in range(_LINKS):
        if found := _DESCRIPTOR.fullmatch(str(place)):
            return int(found[1])
        if not place.is_symlink():
            return None
        place = Path(os.path.abspath(place.parent / place.readlink()))  # noqa: PTH100
    return None


def is_stream(path: str | Path) -> bool:
    """Whether `path` is a stream (a pipe, a terminal, /dev/null), which keeps nothing. Raises ConfigError as
    `output_target` does."""
    path = Path(path)
    return _descriptor(path) is not None or _kind(output_target(path)) in ("device", "pipe")


def _kind(path: Path) -> str:
    """ "file", "folder", "device", "pipe", "none" if nothing is there, or the name of something else."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "none"
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISCHR, "device"), (stat.S_ISFIFO, "pipe"))
    return next((kind for test, kind in kinds if test(mode)), "disk" if stat.S_ISBLK(mode) else "socket")


def output_target(path: str | Path, option: str = "--out", *, folder: bool = False) -> Path:
    """The file to write when a user names `path`: itself, or what a link at its end points to.

    Raises ConfigError that names the option, for a name that no file can have, a folder (unless `folder`), links in a
    circle, a disk or a socket; UserError if the file system denies access.
    """
    text = os.fspath(path)
    named = f"{option} {cut(text)}"
    if not text or "\0" in text or (Path(text).name in ("", "..") and not folder):
        raise ConfigError(f"{option} {shown(text)} is not a file name. Give one, such as results.csv.")
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
        raise ConfigError(f"{named} is a {kind}, but the result is a file. Give the name of a file.")
    return target


@contextlib.contextmanager
def output_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that a user named, as `mambaseq.atomic.atomic_file` does; a link stays, and the file that it points
    to is replaced. A device or pipe is written to directly.

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
    """Open a device, a pipe or an open file of this process for writing. Raises UserError if that is refused or fails;
    BrokenPipeError if the reader of a pipe has left."""
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
    """Files for `count` results when a user named `path`: itself for one, otherwise `NAME-000`, `NAME-001`, ... next to
    it.

    suffix: of the numbered files, if `path` has none. Raises ConfigError for several results and a device or pipe.
    """
    if count == 1:
        return [path]
    if is_stream(path):
        raise ConfigError(f"--out {path} takes one result, but there are {count:,}. Give the name of a file.")
    digits = max(3, len(str(count - 1)))
    return [path.with_name(f"{path.stem}-{number:0{digits}d}{path.suffix or suffix}") for number in range(count)]


def writes(
    what: str, *endings: str, folder: bool = False, takes: Callable[..., None] | None = None
) -> Callable[[Callable[_P, list[Path]]], Callable[_P, list[Path]]]:
    """Of a writer, whose first argument is the file: it refuses a name with an ending that is none of these. Whoever
    makes what is written asks earlier, by `check_written` and `check_taken`. what: how the message begins, such as
    `Text is`. folder: whether it may be one. takes: see `check_taken`."""

    def checked(write: Callable[_P, list[Path]]) -> Callable[_P, list[Path]]:
        @functools.wraps(write)
        def written(*args: _P.args, **kwargs: _P.kwargs) -> list[Path]:
            check_written(written, args[0] if args else kwargs["path"])
            return write(*args, **kwargs)

        written.written_as = (what, endings, folder)  # type: ignore[attr-defined]
        written.takes = takes  # type: ignore[attr-defined]
        return written

    return checked


def check_written(writer: Any, path: Any, option: str = "--out") -> None:
    """Raise ConfigError for a folder, and for a name whose ending is none of those of a writer (see `writes`). One
    without an ending, and a stream, may have any content."""
    what, endings, folder = getattr(writer, "written_as", ("", (), True))
    path = Path(path)
    if not folder:
        output_target(path, option)
    if not endings or not path.suffix or path.name.lower().endswith(endings) or (not path.is_dir() and is_stream(path)):
        return
    raise ConfigError(
        f"{what} written as {cut_list(endings)}, not as {cut(path.name)}. Give another name with {option}."
    )


def check_taken(writer: Any, begun: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Raise what a writer's `takes(begun, tokenizer, **options)` raises: ConfigError where it cannot write what goes on
    as `begun` does, so that nobody makes it in vain. A writer without `takes` is not asked.

    begun: `(length,)` ids, `(length, books)`, or a signal `(length, channels)`; a position or none is enough.
        tokenizer: of the ids; None of a signal. options: the writer's.
    """
    if (takes := getattr(writer, "takes", None)) is not None:
        takes(begun, tokenizer, **options)


def check_json(path: str | Path | None, option: str = "--out") -> None:
    """Raise ConfigError for a name of numbers that are written as JSON whose ending is another one; None is no file."""
    if path is not None and Path(path).suffix.lower() not in ("", ".json") and not is_stream(path):
        raise ConfigError(
            f"Numbers are written as .json, not as {cut(Path(path).name)}. Give another name with {option}."
        )


def check_picture(path: str | Path | None, option: str = "--picture") -> None:
    """The same for a picture, which is written as PNG."""
    if path is not None and Path(path).suffix.lower() not in ("", ".png") and not is_stream(path):
        raise ConfigError(
            f"A picture is written as .png, not as {cut(Path(path).name)}. Give another name with {option}."
        )


class Lines:
    """What the writers of `csv` write to, so that the lines of a file end with "\\n". Their `lineterminator` is left as
    it is, CRLF: of its signs a writer knows which cells need quotes, and a lone carriage return is a line's end to
    readers.

    >>> import csv, io
    >>> out = io.StringIO(newline="")
    >>> _ = csv.writer(Lines(out)).writerow(["a", "b\\rc"])
    >>> out.getvalue()
    'a,"b\\rc"\\n'
    """

    def __init__(self, file: IO[str]) -> None:
        self._write = file.write

    def write(self, row: str) -> int:
        return self._write(f"{row.removesuffix(_CRLF)}\n")


_CRLF = "\r\n"
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def safe_cell(text: str) -> str:
    """Text that a spreadsheet shows instead of running it: an apostrophe goes before what begins like a formula (=, +,
    -, @, tab, carriage return; OWASP, "CSV Injection"). Numbers stay numbers.

    >>> safe_cell("=1+1"), safe_cell("-1.5e-3"), safe_cell("chr1")
    ("'=1+1", '-1.5e-3', 'chr1')
    """
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text) else text
