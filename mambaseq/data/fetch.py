"""Data sets that users fetch themselves: manifests, resumable verified downloads, unpacking."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambaseq.atomic import atomic_file, atomic_folder
from mambaseq.data.download import ResumingDownloader, Unreachable
from mambaseq.errors import ConfigError, DataError, UserError, did_you_mean
from mambaseq.resources import cache_dir

MANIFESTS = Path(__file__).parent / "manifests"
_RECORDED = "checksums.json"
_ARCHIVES = (".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".tar", ".zip")


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a data set.

    checksum: `md5:...` or `sha256:...`; None when none is published, for the reason in `checksum_note`: then
        the sha256 of the first download is recorded, and later ones must agree with it.
    size: bytes, None when not known. unpack: whether it is an archive to be unpacked, into a folder of its
        name.
    """

    name: str
    url: str
    checksum: str | None = None
    checksum_note: str = ""
    size: int | None = None
    unpack: bool = False

    @property
    def unpacked_name(self) -> str:
        suffix = next((suffix for suffix in _ARCHIVES if self.name.endswith(suffix)), "")
        return self.name.removesuffix(suffix)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A data set that can be fetched: name, one-line summary, licence, page, files."""

    name: str
    summary: str
    licence: str
    homepage: str
    files: tuple[File, ...]

    def folder(self, cache: str | Path | None = None) -> Path:
        """Where it is fetched to."""
        return cache_dir(cache) / "fetched" / self.name

    def is_fetched(self, cache: str | Path | None = None) -> bool:
        """Whether all files are there (their checksums are compared by `fetch` only)."""
        folder = self.folder(cache)
        return all(
            (folder / file.name).is_file() and (not file.unpack or (folder / file.unpacked_name).is_dir())
            for file in self.files
        )


def read_manifest(path: Path) -> Manifest:
    """The manifest in a YAML file. Raises ConfigError naming file and key."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = tuple(File(**file) for file in raw.pop("files"))
        manifest = Manifest(files=files, **raw)
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"The manifest {path} cannot be used: {error}.") from error
    for file in manifest.files:
        if file.checksum is not None and file.checksum.partition(":")[0] not in ("md5", "sha256"):
            raise ConfigError(f"The manifest {path}: the checksum of {file.name} must start with md5: or sha256:.")
        if file.unpack and file.unpacked_name == file.name:
            raise ConfigError(f"The manifest {path}: {file.name} is no archive ({', '.join(_ARCHIVES)}).")
    return manifest


def manifests() -> dict[str, Manifest]:
    """All manifests that come with mambaseq, by name."""
    found = [read_manifest(path) for path in sorted(MANIFESTS.glob("*.yaml"))]
    return {manifest.name: manifest for manifest in found}


def manifest(name: str) -> Manifest:
    """The manifest of this name, or in this YAML file. Raises ConfigError with the nearest name."""
    if name.endswith((".yaml", ".yml")):
        return read_manifest(Path(name))
    known = manifests()
    if name not in known:
        raise ConfigError(
            f"No data set to fetch is named {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}. "
            f"The path of a manifest (.yaml) works too."
        )
    return known[name]


def fetch(
    name: str,
    cache: str | Path | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = print,
    downloader: ResumingDownloader | None = None,
) -> Path:
    """Bring a data set's files into the cache folder, verify and unpack them; returns their folder.

    What is there and has the right checksum is not downloaded again; what was interrupted goes on.
    say: gets the lines that the user should see.
    Raises UserError when a server cannot be reached (saying which file to put where), when the disk is full,
    or when a checksum is wrong.
    """
    import pooch

    wanted = manifest(name)
    folder = wanted.folder(cache)
    recorded = _recorded(folder)
    pooch.get_logger().setLevel("WARNING")
    for file in wanted.files:
        known = file.checksum or recorded.get(file.name)
        source = pooch.create(
            path=folder,
            base_url="",
            registry={file.name: known},
            urls={file.name: file.url},
            retry_if_failed=0,
        )
        before = _stamp(folder / file.name)
        try:
            source.fetch(file.name, downloader=downloader or ResumingDownloader(progress=progress))
        except Unreachable as error:
            raise _by_hand(error, wanted, file, folder, known) from error
        except ValueError as error:
            raise DataError(
                f"{file.name}, downloaded from {file.url}, does not have the checksum {known}. The file at "
                "the source was changed or the download was tampered with; it was deleted. Try again; if it "
                f"stays so, compare with {wanted.homepage}."
            ) from error
        except PermissionError as error:
            raise UserError(f"{folder} cannot be written. Choose another cache folder with --cache.") from error
        if known is None:
            recorded[file.name] = f"sha256:{pooch.file_hash(str(folder / file.name), alg='sha256')}"
            with atomic_file(folder / _RECORDED, "w", encoding="utf-8") as out:
                json.dump(recorded, out, indent=1)
            say(
                f"{file.name}: no checksum is published ({file.checksum_note}). Recorded "
                f"{recorded[file.name]}; later downloads must agree with it."
            )
        if file.unpack:
            _unpack(folder / file.name, folder / file.unpacked_name, _stamp(folder / file.name) != before)
    say(f"{wanted.name} is in {folder} ({wanted.licence}).")
    return folder


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / _RECORDED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _stamp(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def _by_hand(error: UserError, wanted: Manifest, file: File, folder: Path, known: str | None) -> UserError:
    size = f"{file.size:,} bytes, " if file.size else ""
    wrong = " The file that is there has another checksum." if (folder / file.name).exists() else ""
    return UserError(
        f"{error}. Run the command again to go on from where it stopped; or, without a network, get "
        f"{file.url} in another way, put it at {folder / file.name} "
        f"({size}{known or 'checksum not published'}), and run `mambaseq data fetch {wanted.name}` again, "
        f"which verifies it.{wrong}"
    )


def _unpack(archive: Path, target: Path, is_new: bool) -> None:
    if target.is_dir() and not is_new:
        return
    try:
        with atomic_folder(target) as folder:
            if zipfile.is_zipfile(archive):
                shutil.unpack_archive(archive, folder, "zip")
            else:
                shutil.unpack_archive(archive, folder, "tar", filter="data")  # nothing outside of the folder
    except (tarfile.TarError, zipfile.BadZipFile, shutil.ReadError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}. Delete it and fetch it again.") from error
