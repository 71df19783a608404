"""Manifests of others: no name leads out of the cache, nothing that is said is taken unseen."""

from __future__ import annotations

import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from mambaseq.cli.main import main
from mambaseq.data.download import ResumingDownloader
from mambaseq.data.fetch import fetch
from mambaseq.data.manifest import MANIFESTS, manifest, read_manifest
from mambaseq.errors import ConfigError, UserError

SHA = "sha256:" + "0" * 64


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "summary": "s",
        "licence": "CC0",
        "homepage": "https://example.org",
        "files": [{"name": "a.bin", "url": "https://example.org/a.bin"}],
        **changes,
    }


def with_file(**changes: Any) -> dict[str, Any]:
    return plain(files=[{"name": "a.bin", "url": "https://example.org/a.bin", **changes}])


def write(folder: Path, content: Any) -> Path:
    path = folder / "m.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        read_manifest(path)
    text = str(told.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 1000


NAMES = ["../x", "/tmp/x", "..", ".", "", ".hidden", "-rf", "a\\b", "C:x", "a\0b", "é", "a b", "x" * 101, "a\nb", 7,
         None, ["a"], "a/../../b", "a//b", "a/.git/b", "a/", "~", "$HOME", "*"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_are_not_plain(tmp_path: Path, name: Any) -> None:
    refused(write(tmp_path, plain(name=name)), "name .* is not a plain name")
    refused(write(tmp_path, with_file(name=name)), r"files\[0\]\.name .* is not a plain name")


def test_a_data_set_has_no_folders_in_its_name_and_a_file_may(tmp_path: Path) -> None:
    refused(write(tmp_path, plain(name="a/b")), "not a plain name")
    assert read_manifest(write(tmp_path, with_file(name="a/b.bin"))).files[0].name == "a/b.bin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "file:///etc/passwd"}, r"files\[0\]\.url of a\.bin must be an address"),
        ({"url": "ftp://example.org/a"}, "must be an address"),
        ({"url": "https:///a"}, "must be an address"),
        ({"url": "https://example.org:x/a"}, "must be an address"),
        ({"url": "https://example.org/a\nHost: b"}, "must be an address"),
        ({"url": "javascript:alert(1)"}, "must be an address"),
        ({"url": 5}, "must be an address"),
        ({"url": "https://u:geheim@example.org/a"}, "user name or a password"),
        ({"checksum": "sha256:" + "0" * 63}, r"files\[0\]\.checksum of a\.bin must start"),
        ({"checksum": "md5:" + "0" * 64}, "checksum"),
        ({"checksum": "sha256:" + "z" * 64}, "checksum"),
        ({"checksum": "sha1:" + "0" * 40}, "checksum"),
        ({"checksum": 5}, "checksum"),
        ({"size": -1}, r"files\[0\]\.size"),
        ({"size": True}, "size"),
        ({"size": "many"}, "size"),
        ({"size": 1.5}, "size"),
        ({"unpack": "yes"}, r"files\[0\]\.unpack"),
        ({"unpack": True}, "not an archive"),
        ({"checksum_note": "a\x1b[2J"}, r"files\[0\]\.checksum_note"),
        ({"link": "x"}, r"files\[0\] has an unknown key 'link'"),
        ({"name": "checksums.json"}, "is reserved for"),
        ({"name": "Checksums.JSON"}, "is reserved for"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, with_file(**changes))
    refused(path, message)
    with pytest.raises(ConfigError) as told:
        read_manifest(path)
    assert "geheim" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (plain(summary=5), "summary"),
        (plain(summary="a\x1b[2Jb"), "summary"),
        (plain(licence="x" * 501), "licence"),
        (plain(homepage="file:///x"), "homepage"),
        (plain(files=[]), "files must be a list"),
        (plain(files={"a": 1}), "files must be a list"),
        (plain(files=["a"]), r"files\[0\] must have names"),
        (plain(extra=1), "unknown key 'extra'"),
        ({k: v for k, v in plain().items() if k != "licence"}, "has no 'licence'"),
        ("name: [", "not valid YAML"),
        ("- 1\n", "instead of names and values"),
        ("name: !!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
        ("a: &a [1,2,3,4,5,6,7,8,9]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefg")), "MAX_YAML_NODES"),
        (plain(files=[*plain()["files"], {"name": "A.bin", "url": "https://example.org"}]), "twice"),
        (plain(files=[*plain()["files"], {"name": "a.bin/b", "url": "https://example.org"}]), "inside a.bin"),
        (plain(files=[{"name": "x.zip", "url": "https://example.org", "unpack": True},
                      {"name": "x", "url": "https://example.org"}]), "twice"),
        (plain(files=[{"name": "x.zip", "url": "https://example.org", "unpack": True},
                      {"name": "x/y", "url": "https://example.org"}]), "inside x"),
    ],
    ids=range(17),
)  # fmt: skip
def test_manifests_that_cannot_be_used(tmp_path: Path, content: Any, message: str) -> None:
    refused(write(tmp_path, content), message)
    assert not Path("pwned").exists()


def test_a_manifest_that_is_not_utf8_or_no_file(tmp_path: Path) -> None:
    (path := tmp_path / "m.yaml").write_bytes(b"name: \xff\xfe\n")
    refused(path, "not text in UTF-8")
    (folder := tmp_path / "n.yaml").mkdir()
    refused(folder, "is not a file")
    os.mkfifo(pipe := tmp_path / "p.yaml")
    refused(pipe, "is not a file")
    with pytest.raises(ConfigError):
        manifest("a\0b.yaml")


def test_a_manifest_does_not_take_the_place_of_one_that_ships(tmp_path: Path) -> None:
    shipped = yaml.safe_load((MANIFESTS / "text8.yaml").read_text())
    mirror = {**shipped, "files": [{**shipped["files"][0], "url": "https://mirror.example/text8.zip"}]}
    assert manifest(str(write(tmp_path, mirror))).files[0].url.startswith("https://mirror")
    other = {**shipped, "files": [{**shipped["files"][0], "checksum": SHA}]}
    with pytest.raises(ConfigError, match=r"comes with mambaseq.*name of its own"):
        manifest(str(write(tmp_path, other)))


class Canned(ResumingDownloader):
    """Brings these bytes, whatever is asked for."""

    def __init__(self, content: bytes = b"hello") -> None:
        super().__init__(progress=False)
        self.content, self.paths = content, []

    def __call__(self, url: str, path: Path, size: int | None = None) -> Path:
        self.paths.append(path)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(self.content)
        return part


def get(path: Path, cache: Path) -> Path:
    return fetch(str(path), cache, say=lambda line: None, downloader=Canned())


def test_links_in_the_cache_lead_nowhere_else(tmp_path: Path) -> None:
    path = write(tmp_path, with_file(name="d/a.bin"))
    outside = tmp_path / "outside"
    folder = tmp_path / "cache" / "fetched" / "mine"
    outside.mkdir()
    folder.mkdir(parents=True)
    (folder / "d").symlink_to(outside)
    with pytest.raises(UserError, match="d is a link out of"):
        get(path, tmp_path / "cache")
    assert not list(outside.iterdir())
    (folder / "d").unlink()
    (folder / "d").mkdir()
    (folder / "d" / "a.bin").symlink_to(outside / "mine")  # to nothing: the file takes the link's place
    assert (get(path, tmp_path / "cache") / "d" / "a.bin").read_bytes() == b"hello"
    assert not list(outside.iterdir())


def test_a_part_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Also by the one that does the work."""
    from mambaseq.data.download import _opened

    (mine := tmp_path / "mine").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"):
        _opened(tmp_path / "link", "wb")
    assert mine.read_bytes() == b"kept"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff", b'{"a.bin": 5}', b'{"a.bin": "sha256:0"}', b"[" * 100_000, None],
    ids=range(9),
)  # fmt: skip
def test_damaged_checksums_are_told(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path, plain())
    recorded = get(path, tmp_path) / "checksums.json"
    assert json.loads(recorded.read_text())["a.bin"].startswith("sha256:")
    recorded.unlink()
    if content is None:
        recorded.mkdir()
    else:
        recorded.write_bytes(content)
    with pytest.raises(UserError, match=r"checksums\.json.*Delete it") as told:
        get(path, tmp_path)
    assert len(str(told.value)) < 1000
    assert content is None or recorded.read_bytes() == content


@pytest.mark.parametrize("what", ["folder for a file", "file for a folder", "file for the cache", "file on the way"])
def test_the_wrong_thing_in_its_place(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, with_file(name="x.zip", unpack=True))
    cache = tmp_path / "cache"
    folder = cache / "fetched" / "mine"
    if what == "file for the cache":
        cache.write_text("")
    elif what == "file on the way":
        cache.mkdir()
        (cache / "fetched").write_text("")
    else:
        folder.mkdir(parents=True)
        (folder / "x.zip").mkdir() if what == "folder for a file" else (folder / "x").write_text("")
    assert main(["data", "fetch", str(path), "--cache", str(cache)]) == 2
    said = capsys.readouterr().err
    assert str(cache) in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, plain())

    def read_only(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot be written: Read-only.*--cache"):
        get(path, tmp_path / "cache")


def test_the_cache_is_this_users_alone(tmp_path: Path) -> None:
    folder = get(write(tmp_path, with_file(name="d/a.bin")), tmp_path / "new" / "cache")
    for place in (folder / "d", folder, folder.parent, tmp_path / "new" / "cache", tmp_path / "new"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "checksums.json", "d"]
    assert [path.name for path in (folder / "d").iterdir()] == ["a.bin"]


def test_what_is_left_of_a_download_goes_when_the_file_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "fetched" / "mine"
    folder.mkdir(parents=True)
    for name in (".a.bin.part", ".a.bin.part.version", "a.bin"):
        (folder / name).write_bytes(b"hello")
    get(write(tmp_path, plain()), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "a.bin", "checksums.json"]
