"""Manifests: the files of a data set, their addresses and checksums.

A manifest may come from anybody, so its names must be plain, and nothing in it may lead out of the cache.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mambaseq.errors import ConfigError, UserError, did_you_mean, shown
from mambaseq.plain import read_yaml
from mambaseq.resources import cache_dir

MANIFESTS = Path(__file__).parent / "manifests"
RECORDED = "checksums.json"
"""The file in a data set's folder that keeps checksums which the manifest does not have."""

ARCHIVES = (".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".tar", ".zip")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NAME_LENGTH = 100
_TEXT_LENGTH = 500
_URL_LENGTH = 2_000
_FILES = 10_000
_DIGITS = {"md5": 32, "sha256": 64}


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a data set.

    name: its path, relative to the data set's folder. url: http or https.
    checksum: `md5:...` or `sha256:...`; None if none is published, for the reason in `checksum_note`; the sha256 of the
        first download is then recorded, and later ones must match it.
    size: in bytes, None if unknown. unpack: whether it is an archive to unpack into a folder of its name.
    """

    name: str
    url: str
    checksum: str | None = None
    checksum_note: str = ""
    size: int | None = None
    unpack: bool = False

    @property
    def unpacked_name(self) -> str:
        suffix = next((suffix for suffix in ARCHIVES if self.name.endswith(suffix)), "")
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
        """The folder that it is fetched to."""
        return cache_dir(cache) / "fetched" / self.name

    def is_fetched(self, cache: str | Path | None = None) -> bool:
        """Whether all files are there (their checksums are compared by `fetch` only)."""
        folder = self.folder(cache)
        try:
            return all(
                (folder / file.name).is_file() and (not file.unpack or (folder / file.unpacked_name).is_dir())
                for file in self.files
            )
        except OSError:  # a folder without permission
            return False


def is_checksum(value: Any) -> bool:
    """Whether a text is `md5:` or `sha256:` and the right number of hexadecimal digits."""
    kind, _, digits = value.partition(":") if isinstance(value, str) else ("", "", "")
    return re.fullmatch(rf"[0-9a-f]{{{_DIGITS.get(kind, 1)}}}", digits) is not None and kind in _DIGITS


class _Refused(ValueError):
    pass


def _name(value: Any, key: str, parts: bool) -> str:
    found = value.split("/") if parts and isinstance(value, str) else [value]
    plain = isinstance(value, str) and len(value) <= _NAME_LENGTH and all(_PART.fullmatch(part) for part in found)
    if not plain:
        allowed = "letters, digits, . _ - " + ("and / between them" if parts else "alone")
        raise _Refused(
            f"{key} {shown(value)} is not a plain name. Use {allowed}, no . or - at the beginning, at most "
            f"{_NAME_LENGTH} characters"
        )
    return str(value)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_LENGTH or not value.isprintable():
        raise _Refused(f"{key} must be one line of text, at most {_TEXT_LENGTH} characters")
    return value


def _url(value: Any, key: str) -> str:
    written = f"{key} must be an address that begins with https:// or http://"
    if not isinstance(value, str) or len(value) > _URL_LENGTH or not re.fullmatch(r"[!-~]+", value):
        raise _Refused(f"{written}, in ASCII and without spaces")
    try:
        parts = urlsplit(value)
        secret, reachable = "@" in parts.netloc, bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise _Refused(f"{written} ({error})") from error
    if secret:  # not shown, because messages are copied into reports
        raise _Refused(f"{key} contains a user name or a password. Put those into ~/.netrc, which is read")
    if parts.scheme not in ("https", "http") or not reachable:
        raise _Refused(f"{written}, not {shown(value)}")
    return value


def _known_keys(raw: Any, kind: type, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise _Refused(f"{where}must have names and values, not {type(raw).__name__}")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            near = did_you_mean(key, fields)
            raise _Refused(f"{where}has an unknown key {shown(key)}.{near} Known: {', '.join(fields)}")
    for key, needed in fields.items():
        if needed and key not in raw:
            raise _Refused(f"{where}has no {shown(key)}")
    return raw


def _file(raw: Any, place: str) -> File:
    raw = _known_keys(raw, File, f"{place} ")
    name, checksum, size = _name(raw["name"], f"{place}.name", True), raw.get("checksum"), raw.get("size")
    if name.casefold() == RECORDED:
        raise _Refused(f"{place}.name is {RECORDED}, which is reserved for mambaseq")
    if checksum is not None and not is_checksum(checksum):
        raise _Refused(
            f"{place}.checksum of {name} must start with md5: or sha256: and have 32 or 64 digits of 0-9 and a-f after "
            f"it, not {shown(checksum)}"
        )
    if size is not None and (type(size) is not int or size < 0):
        raise _Refused(f"{place}.size of {name} must be a number of bytes, not {shown(size)}")
    if type(raw.get("unpack", False)) is not bool:
        raise _Refused(f"{place}.unpack of {name} must be true or false, not {shown(raw['unpack'])}")
    file = File(
        name=name,
        url=_url(raw["url"], f"{place}.url of {name}"),
        checksum=checksum,
        checksum_note=_text(raw.get("checksum_note", ""), f"{place}.checksum_note of {name}"),
        size=size,
        unpack=raw.get("unpack", False),
    )
    if file.unpack and file.unpacked_name == name:
        raise _Refused(f"{place}.unpack: {name} is not an archive ({', '.join(ARCHIVES)})")
    return file


def _check_places(files: tuple[File, ...]) -> None:
    """Refuse two files at one place, also if case is ignored."""
    places: set[str] = set()
    for file in files:
        for name in (file.name, file.unpacked_name) if file.unpack else (file.name,):
            if name.casefold() in places:
                raise _Refused(f"files has {name} twice, or in upper and lower case")
            places.add(name.casefold())
    for place in sorted(places):
        above = place.split("/")[:-1]
        for end in range(1, len(above) + 1):
            if (other := "/".join(above[:end])) in places:
                raise _Refused(f"files has {place} inside {other}, which is a file or the folder of an archive")


def read_manifest(path: Path) -> Manifest:
    """The manifest in a YAML file. Raises ConfigError naming file and key."""
    try:
        raw = _known_keys(read_yaml(path), Manifest, "")
        listed = raw["files"]
        if not isinstance(listed, list) or not 0 < len(listed) <= _FILES:
            raise _Refused(f"files must be a list of 1 to {_FILES:,} files")
        files = tuple(_file(file, f"files[{number}]") for number, file in enumerate(listed))
        _check_places(files)
        return Manifest(
            name=_name(raw["name"], "name", False),
            summary=_text(raw["summary"], "summary"),
            licence=_text(raw["licence"], "licence"),
            homepage=_url(raw["homepage"], "homepage"),
            files=files,
        )
    except _Refused as error:
        raise ConfigError(f"The manifest {path} cannot be used: {error}.") from error
    except UserError as error:
        raise ConfigError(f"The manifest cannot be used: {error}") from error


def manifests() -> dict[str, Manifest]:
    """All manifests that come with mambaseq, by name."""
    found = [read_manifest(path) for path in sorted(MANIFESTS.glob("*.yaml"))]
    return {manifest.name: manifest for manifest in found}


def manifest(name: str) -> Manifest:
    """The manifest of this name, or in this YAML file.

    Raises ConfigError with the nearest name, and for a file that uses the name of a data set that comes with mambaseq
    for other files: a configuration would read these unnoticed.
    """
    known = manifests()
    if name.endswith((".yaml", ".yml")):
        found = read_manifest(Path(name))
        shipped = known.get(found.name)
        if shipped is not None and [(f.name, f.checksum) for f in shipped.files] != [
            (f.name, f.checksum) for f in found.files
        ]:
            raise ConfigError(
                f"The manifest {name} has the name {shown(found.name)} of a data set that comes with mambaseq, but "
                "other files or checksums. Give it a name of its own."
            )
        return found
    if name not in known:
        raise ConfigError(
            f"There is no data set {shown(name)} to fetch.{did_you_mean(name, known)} Known: {', '.join(known)}. The "
            "path of a manifest (.yaml) works too."
        )
    return known[name]
