"""Data sets that users fetch themselves: resumable verified downloads, unpacking."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mambaseq.atomic import atomic_file, json_text, write_failed
from mambaseq.data.archives import unpack
from mambaseq.data.download import ResumingDownloader, Unreachable, forget
from mambaseq.data.manifest import RECORDED, File, Manifest, is_checksum, manifest
from mambaseq.errors import DataError, UserError, shown
from mambaseq.plain import read_json
from mambaseq.resources import cache_dir, make_private

_REMEDY = (
    "Delete it, and check the files next to it by other means: their checksums are recorded again at the next fetch."
)


def fetch(
    name: str,
    cache: str | Path | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = print,
    downloader: ResumingDownloader | None = None,
) -> Path:
    """Bring a data set's files into the cache folder, verify and unpack them; returns their folder.

    Files with the right checksum are not downloaded again; an interrupted download continues.
    say: called with each line for the user.
    Raises UserError if a server cannot be reached (the message says which file to put where), the disk is full, the
    cache is not writable, or a checksum is wrong.
    """
    wanted = manifest(name)
    folder = wanted.folder(cache)
    with _told(folder):
        make_private(cache_dir(cache))
        make_private(folder)
        with _alone(folder, say):
            recorded = _recorded(folder / RECORDED)
            for file in wanted.files:
                _check_place(folder, file)
                _bring(wanted, file, folder, recorded, downloader or ResumingDownloader(progress=progress), say)
    say(f"{wanted.name} is in {folder} ({wanted.licence}).")
    return folder


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (told := write_failed(folder / RECORDED, error)) is not None:
            raise UserError(f"{told} --cache names another cache folder.") from error
        named = f"{error.filename}: " if isinstance(error.filename, str) and error.filename != str(folder) else ""
        raise UserError(
            f"{folder} cannot be used: {named}{error.strerror or error}. Choose another cache folder with --cache."
        ) from error


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Runs the block while no other process fetches the same data set."""
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Another process is fetching into {folder}. Waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _recorded(path: Path) -> dict[str, str]:
    if not path.exists() and not path.is_symlink():
        return {}
    found = read_json(path, _REMEDY)
    for name, checksum in found.items():
        if not is_checksum(checksum):
            raise UserError(f"{path} is damaged: its entry for {shown(name)} is not a checksum. {_REMEDY}")
    return found


def _check_place(folder: Path, file: File) -> None:
    """Raise UserError if a file would be outside the data set's folder, or its place is taken."""
    path, root = folder / file.name, folder.resolve()
    for place in {path, folder / file.unpacked_name}:
        if not place.parent.resolve().is_relative_to(root):
            raise UserError(f"{place.parent} is a link out of {folder}. Remove it.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device, but a file should be there. Move it away.")
    if file.unpack and (target := folder / file.unpacked_name).exists() and not target.is_dir():
        raise UserError(f"{target} is a file, but {file.name} should be unpacked there. Move it away.")


def _bring(
    wanted: Manifest,
    file: File,
    folder: Path,
    recorded: dict[str, str],
    downloader: ResumingDownloader,
    say: Callable[[str], None],
) -> None:
    """Bring one file, verify, record and unpack it."""
    path, known = folder / file.name, file.checksum or recorded.get(file.name)
    is_new = not path.is_file() or (known is not None and _checksum(path, known) != known)
    if is_new:
        make_private(path.parent)
        try:
            part = downloader(file.url, path, file.size)
        except Unreachable as error:
            raise _by_hand(error, wanted, file, folder, known) from error
        if known is not None and _checksum(part, known) != known:
            forget(path)
            raise DataError(
                f"{file.name}, downloaded from {file.url}, does not have the checksum {known}. The file was changed at "
                "the source, or the download was tampered with; it was deleted. Try again; if the error stays, "
                f"compare with {wanted.homepage}."
            )
        part.replace(path)
    forget(path)
    if known is None:
        recorded[file.name] = _checksum(path, "sha256:")
        with atomic_file(folder / RECORDED, "w", encoding="utf-8") as out:
            out.write(json_text(recorded, indent=1))
        say(
            f"{file.name}: no checksum is published ({file.checksum_note}). Recorded {recorded[file.name]}; later "
            "downloads must match it."
        )
    target = folder / file.unpacked_name
    if file.unpack and (is_new or not target.is_dir()):
        unpack(path, target)


def _checksum(path: Path, like: str) -> str:
    """The checksum of a file, by the algorithm that the known checksum names."""
    kind = like.partition(":")[0]
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def _by_hand(error: UserError, wanted: Manifest, file: File, folder: Path, known: str | None) -> UserError:
    size = f"{file.size:,} bytes, " if file.size else ""
    wrong = " The existing file has another checksum." if (folder / file.name).exists() else ""
    return UserError(
        f"{error}. Run the command again to continue; or, without a network, get {file.url} in another way, put it at "
        f"{folder / file.name} ({size}{known or 'checksum not published'}), and run `mambaseq data fetch "
        f"{wanted.name}` again, which verifies it.{wrong}"
    )
