"""Fetching from a server of our own: resumed, verified, by hand without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import itertools
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest

from mambaseq.data.download import ResumingDownloader
from mambaseq.data.fetch import fetch
from mambaseq.data.manifest import manifest, manifests, read_manifest
from mambaseq.errors import ConfigError, DataError, UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
QUICK = ResumingDownloader(progress=False, attempts=2, wait=0.01, timeout=5)


@dataclasses.dataclass
class Site:
    """A server on this machine. cut: bytes after which it breaks a connection off; ranges: whether it knows
    them."""

    files: dict[str, bytes]
    cut: int | None = None
    ranges: bool = True
    length: bool = True
    url: str = ""
    requests: list[str | None] = dataclasses.field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        asked = self.headers.get("Range")
        site.requests.append(asked)
        if self.path[1:] not in site.files:
            self.send_error(404)
            return
        content = site.files[self.path[1:]]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if asked and site.ranges and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content[start:] if site.cut is None else content[start : start + site.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    here = Site({"a.bin": CONTENT})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": here}))
    here.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_manifest(folder: Path, url: str, checksum: str | None, name: str = "a.bin", unpack: bool = False) -> str:
    path = folder / "mine.yaml"
    path.write_text(
        f"name: mine\nsummary: s\nlicence: CC0\nhomepage: https://example.org\nfiles:\n  - name: {name}\n"
        f"    url: {url}/{name}\n    checksum: {checksum or 'null'}\n    checksum_note: none known\n"
        f"    unpack: {str(unpack).lower()}\n"
    )
    return str(path)


def get(name: str, cache: Path, said: list[str] | None = None) -> Path:
    return fetch(name, cache, say=[].append if said is None else said.append, downloader=QUICK)


def test_fetched_once(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    assert not manifest(name).is_fetched(tmp_path)
    folder = get(name, tmp_path)
    assert folder == tmp_path / "fetched" / "mine"
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert manifest(name).is_fetched(tmp_path)
    get(name, tmp_path)
    assert site.requests == [None]


def test_an_interrupted_download_goes_on(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    site.cut = 0
    with pytest.raises(UserError, match="cannot be reached, or broke the connection"):
        get(name, tmp_path)
    site.cut = 130_000  # three connections are needed, the program stays the same
    site.requests.clear()
    folder = get(name, tmp_path)
    asked = [int((range_ or "bytes=0-")[len("bytes=") : -1]) for range_ in site.requests]
    assert asked[0] == 0
    assert all(100_000 < later - earlier <= 130_000 for earlier, later in itertools.pairwise(asked))
    assert len(asked) == 3
    assert (folder / "a.bin").read_bytes() == CONTENT


def test_a_killed_download_goes_on_in_the_next_run(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    folder = tmp_path / "fetched" / "mine"
    folder.mkdir(parents=True)
    (folder / ".a.bin.part").write_bytes(CONTENT[:100_000])
    (folder / ".a.bin.part.version").write_text(f'"{hashlib.md5(CONTENT).hexdigest()}"')
    get(name, tmp_path)
    assert site.requests == ["bytes=100000-"]
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert not list(folder.glob(".a.bin.part"))


@pytest.mark.parametrize("what", ["complete part", "too long a part", "no ranges", "changed file", "no version"])
def test_parts_that_cannot_simply_go_on(site: Site, tmp_path: Path, what: str) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    folder = tmp_path / "fetched" / "mine"
    folder.mkdir(parents=True)
    have = {"complete part": CONTENT, "too long a part": CONTENT + b"x"}.get(what, CONTENT[:1000])
    (folder / ".a.bin.part").write_bytes(b"old" + have[3:] if what == "changed file" else have)
    if what != "no version":
        version = "0" * 32 if what == "changed file" else hashlib.md5(CONTENT).hexdigest()
        (folder / ".a.bin.part.version").write_text(f'"{version}"')
    site.ranges = what != "no ranges"
    get(name, tmp_path)
    assert (folder / "a.bin").read_bytes() == CONTENT


def test_wrong_checksum(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, sha256(b"something else"))
    with pytest.raises(DataError, match=r"a\.bin, downloaded from .* does not have the checksum sha256:.*deleted"):
        get(name, tmp_path)
    assert not (tmp_path / "fetched" / "mine" / "a.bin").exists()


def test_md5_checksums(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    assert (get(name, tmp_path) / "a.bin").read_bytes() == CONTENT


def test_without_a_published_checksum_the_first_download_is_trusted(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, None)
    said: list[str] = []
    folder = get(name, tmp_path, said)
    assert sha256(CONTENT) in said[0]
    assert "none known" in said[0]
    get(name, tmp_path, said)
    (folder / "a.bin").unlink()
    site.files["a.bin"] = CONTENT[::-1]
    with pytest.raises(DataError, match=sha256(CONTENT)):
        get(name, tmp_path)


def test_offline_by_hand(tmp_path: Path) -> None:
    name = write_manifest(tmp_path, "http://127.0.0.1:1", sha256(CONTENT))
    place = tmp_path / "fetched" / "mine" / "a.bin"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        get(name, tmp_path)
    for part in (str(place), sha256(CONTENT), "http://127.0.0.1:1/a.bin", "mambaseq data fetch mine"):
        assert part in str(caught.value)
    place.write_bytes(b"the wrong file")
    with pytest.raises(UserError, match="The existing file has another checksum"):
        get(name, tmp_path)
    assert place.read_bytes() == b"the wrong file"
    place.write_bytes(CONTENT)
    get(name, tmp_path)


def test_a_file_that_is_gone(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, None, name="b.bin")
    with pytest.raises(UserError, match=r"b\.bin cannot be downloaded: the server answers 404"):
        get(name, tmp_path)


def test_no_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_manifest(tmp_path, site.url, None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"no room for a\.bin .*300,000 bytes are needed, but only 1,000 are free.*--cache"
    ):
        get(name, tmp_path)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inner/text", "hello")
    return file.getvalue()


def tarred(member: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo(member)
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    return file.getvalue()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_archives_are_unpacked_once(site: Site, tmp_path: Path, name: str) -> None:
    content = zipped() if name == "x.zip" else tarred("inner/text")
    site.files[name] = content
    source = write_manifest(tmp_path, site.url, sha256(content), name, unpack=True)
    inner = get(source, tmp_path) / "x" / "inner" / "text"
    assert inner.read_text() == "hello"
    inner.write_text("kept")
    get(source, tmp_path)
    assert inner.read_text() == "kept"
    shutil.rmtree(inner.parent.parent)
    get(source, tmp_path)
    assert inner.read_text() == "hello"


@pytest.mark.parametrize(
    "content",
    [tarred("../../outside"), b"no archive at all", tarred("a")[:-20]],
    ids=["outside", "none", "cut"],  # not their bytes, which have the time in them and differ between workers
)
def test_archives_that_cannot_be_unpacked(site: Site, tmp_path: Path, content: bytes) -> None:
    site.files["x.tar.gz"] = content
    source = write_manifest(tmp_path, site.url, sha256(content), "x.tar.gz", unpack=True)
    with pytest.raises(DataError, match=r"x\.tar\.gz cannot be unpacked"):
        get(source, tmp_path)
    assert not (tmp_path / "fetched" / "mine" / "x").exists()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("name", manifests())
def test_shipped_manifests(name: str) -> None:
    found = manifest(name)
    assert found.name == name
    assert found.licence
    assert found.homepage.startswith("https://")
    for file in found.files:
        assert file.url.startswith(("https://", "http://"))
        if file.checksum is None:
            assert file.checksum_note, "say why there is no checksum"
        else:
            assert len(file.checksum) in (len("md5:") + 32, len("sha256:") + 64)


def test_names_and_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'enwik8'"):
        manifest("enwik")
    with pytest.raises(ConfigError, match=r"manifest cannot be used: .*none\.yaml does not exist"):
        manifest(str(tmp_path / "none.yaml"))
    path = Path(write_manifest(tmp_path, "http://x", "crc:1"))
    with pytest.raises(ConfigError, match="must start with md5: or sha256:"):
        read_manifest(path)
    path.write_text(path.read_text().replace("url:", "link:"))
    with pytest.raises(ConfigError, match="unknown key 'link'"):
        read_manifest(path)


@pytest.mark.parametrize("what", ["said", "sent", "limit"])
def test_no_more_than_the_manifest_says(site: Site, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the length that the server says before anything is sent, or by what it sends."""
    name = write_manifest(tmp_path, site.url, None)
    if what == "limit":
        monkeypatch.setenv("MAMBASEQ_MAX_DOWNLOADED_BYTES", "1000")
    else:
        Path(name).write_text(Path(name).read_text() + "    size: 1000\n")
    site.length = what == "said"
    with pytest.raises(UserError, match=r"1,000 bytes in the manifest|MAMBASEQ_MAX_DOWNLOADED_BYTES") as told:
        get(name, tmp_path)
    assert f"{site.url}/a.bin" in str(told.value)
    left = list((tmp_path / "fetched" / "mine").glob(".a.bin.part"))
    assert what == "limit" or not left
    assert not left or left[0].stat().st_size <= 1000


@pytest.mark.parametrize("version", [b"", b"a\nHost: b", b"\xff" * 5, b"x" * 5000])
def test_a_damaged_note_of_the_version_begins_again(site: Site, tmp_path: Path, version: bytes) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    folder = tmp_path / "fetched" / "mine"
    folder.mkdir(parents=True)
    (folder / ".a.bin.part").write_bytes(CONTENT[:1000])
    (folder / ".a.bin.part.version").write_bytes(version)
    assert (get(name, tmp_path) / "a.bin").read_bytes() == CONTENT
    assert site.requests == [None]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "a.bin"]


def test_a_second_process_waits_and_downloads_nothing(site: Site, tmp_path: Path) -> None:
    name = write_manifest(tmp_path, site.url, sha256(CONTENT))
    said: list[str] = []
    path, held = get(name, tmp_path) / ".lock", threading.Event()

    def hold() -> None:
        with filelock.FileLock(path):
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    get(name, tmp_path, said)
    thread.join()
    assert "Waiting" in said[0]
    assert site.requests == [None]
