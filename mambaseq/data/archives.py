"""Unpacks zip and tar archives from others: inside one folder, as plain files, with limits on size and number.

Headers may lie, so written bytes are counted. Permissions and owners in an archive are not applied.
"""

from __future__ import annotations

import bz2
import dataclasses
import errno
import gzip
import io
import lzma
import os
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mambaseq.atomic import atomic_folder
from mambaseq.data.unpacking import XzFile
from mambaseq.errors import DataError, shown
from mambaseq.limits import ARCHIVE_MEMBERS, UNPACKED_BYTES, check_unpacked

_AT_ONCE = 2**16  # bytes that are read at once: no header of a tar needs more
_PACKED_AT_ONCE = 2**12
_DIRECTORY_ENTRY = 64  # bytes of a zip's directory for each allowed member
_NEVER_IN_NAMES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and direction characters, halves of characters, line ends
_PARTS, _NAME_LENGTH, _PART_LENGTH = 50, 1_000, 255
_LINK_LENGTH = 1_000
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,  # a zip with a password; recursion
    NotImplementedError,  # a compression method that Python does not know
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,  # a dictionary that xz should have
)
# numbers of OSErrors that are not about the disk; those of the unpackers have none
_OF_NAMES = {None, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EMLINK}


class _Refused(ValueError):
    pass


class _Bounded(io.RawIOBase):
    """A stream that gives at most `most` bytes at a time, since Python's archive readers ask for whatever a header
    says.

    spend: called with the number of bytes read; the stream can then only go forward. last: what was read last.
    """

    def __init__(self, file: IO[bytes], most: int, spend: Callable[[int], None] | None = None) -> None:
        self._file, self._most, self._spend, self._at, self.last = file, most, spend, 0, b""

    def read(self, size: int | None = -1) -> bytes:
        most = self._most + 1
        self.last = self._file.read(most if size is None or size < 0 else min(size, most))
        if len(self.last) > self._most:
            raise _Refused("a header in it asks for more memory than any archive needs")
        self._at += len(self.last)
        if self._spend is not None:
            self._spend(len(self.last))
        return self.last

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._spend is None:
            self._at = self._file.seek(offset, whence)
            return self._at
        if whence != os.SEEK_SET or offset < self._at:
            raise _Refused("its members are not in order")
        while self._at < offset and self.read(min(_AT_ONCE, offset - self._at)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


@dataclasses.dataclass
class _Target:
    """The folder that is filled, and what has been put there so far.

    places: each path (also of folders), with case folded, to its name and whether it is a folder.
    """

    archive: Path
    folder: Path
    packed: int
    members: int = 0
    size: int = 0
    places: dict[str, tuple[str, bool]] = dataclasses.field(default_factory=dict)
    links: dict[str, str] = dataclasses.field(default_factory=dict)

    def _count(self) -> None:
        self.members += 1
        ARCHIVE_MEMBERS.check(self.members, str(self.archive))

    def spend(self, size: int) -> None:
        """Count bytes that were unpacked."""
        self.size += size
        UNPACKED_BYTES.check(self.size, str(self.archive))
        check_unpacked(self.size, self.packed, str(self.archive))

    def _claim(self, name: str, is_folder: bool) -> str:
        """The path of a member in the folder; its parents are made. Raises _Refused for a path that is not allowed."""
        told = shown(name)
        parts = [part for part in name.split("/") if part != "."]
        if is_folder and parts and not parts[-1]:
            parts.pop()
        if not parts:
            return ""  # the folder itself
        if name.startswith("/") or ".." in parts or "\\" in name or (len(parts[0]) > 1 and parts[0][1] == ":"):
            raise _Refused(f"its member {told} is not a relative path with / inside the folder")
        if "" in parts or any(unicodedata.category(character) in _NEVER_IN_NAMES for character in name):
            raise _Refused(f"its member {told} has an unsafe name")
        if len(parts) > _PARTS or len(name) > _NAME_LENGTH or any(len(p.encode()) > _PART_LENGTH for p in parts):
            raise _Refused(f"the name of its member {told} is too long")
        for end in range(1, len(parts) + 1):
            path, folder = "/".join(parts[:end]), end < len(parts) or is_folder
            key = unicodedata.normalize("NFC", path).casefold()
            if key not in self.places:
                self._count()
                self.places[key] = (path, folder)
                if folder:
                    (self.folder / path).mkdir()
            elif self.places[key] != (path, True) or not folder:
                raise _Refused(f"its member {told} would take the place of {shown(self.places[key][0])}")
        return "/".join(parts)

    def add_folder(self, name: str) -> None:
        self._count()
        self._claim(name, True)

    def add_file(self, name: str, source: IO[bytes], at_once: int, spend: Callable[[int], None] | None = None) -> None:
        path = self._file_path(name)
        with (self.folder / path).open("xb") as file:
            while piece := source.read(at_once):
                if spend is not None:
                    spend(len(piece))
                file.write(piece)

    def add_link(self, name: str, leads_to: str) -> None:
        """A symbolic link. It is made after all files, so that nothing is written through it."""
        path = self._file_path(name)
        if (
            len(leads_to) > _LINK_LENGTH
            or any(unicodedata.category(c) in _NEVER_IN_NAMES for c in leads_to)
            or not leads_to
            or "\\" in leads_to
        ):
            raise _Refused(f"its link {shown(name)} leads to an invalid file name")
        self.links[path] = leads_to

    def add_copy(self, name: str, earlier: str) -> None:
        """A second name of an earlier file (a hard link)."""
        path = self._file_path(name)
        place = self.places.get(unicodedata.normalize("NFC", earlier.removeprefix("./")).casefold())
        if place is None or place[1] or place[0] in self.links or place[0] == path:
            raise _Refused(f"its link {shown(name)} leads to no earlier file")
        (self.folder / path).hardlink_to(self.folder / place[0])

    def _file_path(self, name: str) -> str:
        if not (path := self._claim(name, False)):
            raise _Refused(f"its member {shown(name)} has an unsafe name")
        return path

    def finish(self) -> None:
        """Make the links. Raises _Refused for a link that leads out of the folder, directly or through others."""
        root = self.folder.resolve()
        for path, leads_to in self.links.items():
            (self.folder / path).symlink_to(leads_to)
        for path, leads_to in self.links.items():
            end = Path(os.path.realpath(self.folder / path))  # Path.resolve raises for links that lead to themselves
            inside = not leads_to.startswith("/") and end.is_relative_to(root)
            if not inside or not end.exists():
                raise _Refused(f"its link {shown(path)} leads {'to nothing' if inside else 'out of the folder'}")


def unpack(archive: Path, target: Path) -> None:
    """Unpack an archive (.zip, or a tar, possibly compressed by gzip, xz or bzip2) into a folder that replaces `target`
    when it is complete.

    Symbolic and hard links are kept where they stay inside.
    Raises DataError for an archive that is damaged, or has a member that would be outside the folder, is a device or a
    pipe, or has the same path as another (ignoring case); UserError if it exceeds `limits.ARCHIVE_MEMBERS`,
    `UNPACKED_BYTES` or `UNPACKED_RATIO`, or the disk is full. Nothing is left behind in these cases.
    """
    if target.is_symlink():
        raise DataError(f"{target} is a link; {archive} is not unpacked through it. Remove the link.")
    with atomic_folder(target) as folder:
        found = _Target(archive, folder, archive.stat().st_size)
        try:
            (_unzip if archive.suffix == ".zip" else _untar)(archive, found)
            found.finish()
        except _Refused as error:
            raise DataError(
                f"{archive} cannot be unpacked: {error}. Nothing was kept. Get it from elsewhere, or unpack by hand "
                "what you need."
            ) from error
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno not in _OF_NAMES:
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"{archive} cannot be unpacked: {said}. Delete it and fetch it again.") from error


def _unzip(archive: Path, target: _Target) -> None:
    with archive.open("rb") as raw:
        most = max(ARCHIVE_MEMBERS.value * _DIRECTORY_ENTRY, _AT_ONCE)
        bounded: Any = _Bounded(raw, min(most, target.packed))
        with zipfile.ZipFile(bounded) as file:
            for member in file.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == 3 else 0
                name = member.orig_filename
                if member.is_dir():
                    target.add_folder(name)
                elif kind == stat.S_IFLNK:
                    with file.open(member) as source:
                        target.add_link(name, source.read(_LINK_LENGTH + 1).decode())
                elif kind in (0, stat.S_IFREG):
                    known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    with file.open(member) as source:  # other streams are unpacked as far as their input goes
                        target.add_file(name, source, _AT_ONCE if known else _PACKED_AT_ONCE, target.spend)
                else:
                    raise _Refused(f"its member {shown(name)} is a device or a pipe")


def _untar(archive: Path, target: _Target) -> None:
    with _decompressed(archive) as stream:
        bounded: Any = _Bounded(stream, _AT_ONCE, target.spend)
        with tarfile.open(fileobj=bounded, mode="r:") as file:
            for member in file:
                file.members = []  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
                name = member.name
                if member.isdir():
                    target.add_folder(name)
                elif member.issym():
                    target.add_link(name, member.linkname)
                elif member.islnk():
                    target.add_copy(name, member.linkname)
                elif member.isreg() and not member.issparse():
                    source = file.extractfile(member)
                    assert source is not None
                    with source:
                        target.add_file(name, source, _AT_ONCE)
                else:
                    raise _Refused(f"its member {shown(name)} is a device, a pipe or a file with holes")
        if bounded.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged or missing header for the end
            raise tarfile.ReadError("it is damaged, or was cut short: its end mark is missing")
        while bounded.read(_AT_ONCE):  # the decompressor compares a checksum at the end
            pass


def _decompressed(archive: Path) -> IO[bytes]:
    with archive.open("rb") as file:
        begin = file.read(6)
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", XzFile), (b"BZh", bz2.open)):
        if begin.startswith(magic):
            return opened(archive, "rb")  # type: ignore[return-value]
    return archive.open("rb")
