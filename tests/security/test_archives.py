"""Archives of others: nothing gets out of the folder or fills disk or memory, nothing is left of what is refused."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambaseq.data.archives import unpack
from mambaseq.data.unpacking import read_pieces
from mambaseq.errors import DataError, UserError

Member = tuple[str, bytes, dict[str, Any]]


def tar(*members: Member) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content, fields in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in fields.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zipped(*members: Member) -> bytes:
    """A zip; `mode` becomes the Unix mode of a member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, fields in members:
            entry = zipfile.ZipInfo(name)
            entry.create_system = 3
            entry.external_attr = fields.get("mode", 0o644) << 16
            archive.writestr(entry, content)
    return file.getvalue()


def symlink(name: str, leads_to: str, kind: str) -> Member:
    if kind == ".zip":
        return name, leads_to.encode(), {"mode": stat.S_IFLNK | 0o777}
    return name, b"", {"type": tarfile.SYMTYPE, "linkname": leads_to}


def hardlink(name: str, earlier: str) -> Member:
    return name, b"", {"type": tarfile.LNKTYPE, "linkname": earlier}


def packed(kind: str, *members: Member) -> bytes:
    return (zipped if kind == ".zip" else tar)(*members)


def refused(folder: Path, content: bytes, kind: str, message: str, error: type[UserError] = DataError) -> str:
    """Unpacking raises, says which archive, and leaves nothing, inside of the folder or out."""
    inner = folder / "cache"
    inner.mkdir()
    archive = inner / f"x{kind}"
    archive.write_bytes(content)
    with pytest.raises(error, match=message) as told:
        unpack(archive, inner / "x")
    assert [path.name for path in inner.iterdir()] == [archive.name]
    assert [path.name for path in folder.iterdir()] == ["cache"]
    assert str(archive) in str(told.value)
    assert len(str(told.value)) < 1000
    assert "\n" not in str(told.value)
    return str(told.value)


FILE: Member = ("a", b"hello", {})


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside", "not a relative path"),
        ("a/../../outside", "not a relative path"),
        ("/tmp/outside", "not a relative path"),
        ("..\\outside", "not a relative path"),
        ("C:/outside", "not a relative path"),
        ("C:outside", "not a relative path"),
        ("a//b", "has an unsafe name"),
        ("a\nb", "has an unsafe name"),
        ("a\x1b[2Jb", "has an unsafe name"),
        (".", "has an unsafe name"),
        ("x" * 256, "is too long"),
        ("x/" * 60 + "y", "is too long"),
        ("é" * 200, "is too long"),
    ],
)
def test_names_that_lead_elsewhere_or_are_none(tmp_path: Path, kind: str, name: str, message: str) -> None:
    refused(tmp_path, packed(kind, (name, b"hello", {})), kind, message)


def test_a_name_with_nul(tmp_path: Path) -> None:
    refused(tmp_path, zipped(("a?b.txt", b"hello", {})).replace(b"a?b.txt", b"a\0b.txt"), ".zip", "has an unsafe name")


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
@pytest.mark.parametrize(
    "names", [("a", "a"), ("a", "A"), ("a", "a/b"), ("d/x", "D/y"), ("\u00e9", "e\u0301"), ("stra\u00dfe", "STRASSE")]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_at_one_place(tmp_path: Path, kind: str, names: tuple[str, str]) -> None:
    content = packed(kind, *((name, name.encode(), {}) for name in names))
    refused(tmp_path, content, kind, "would take the place of")


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
@pytest.mark.parametrize(
    ("leads_to", "message"),
    [
        ("../../../etc/passwd", "out of the folder"),
        ("/etc/passwd", "out of the folder"),
        ("..", "out of the folder"),
        ("nothing", "to nothing"),
        ("link", "to nothing"),
        ("a\nb", "to an invalid file name"),
    ],
)
def test_links_that_leave(tmp_path: Path, kind: str, leads_to: str, message: str) -> None:
    refused(tmp_path, packed(kind, FILE, symlink("link", leads_to, kind)), kind, message)


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_links_that_leave_by_way_of_another(tmp_path: Path, kind: str) -> None:
    """`deep/er/up` is the folder itself, so `deep/er/up/..` is outside, though its text is not."""
    content = packed(
        kind, ("deep/er/a", b"hello", {}), symlink("deep/er/up", "../..", kind), symlink("deep/er/out", "up/..", kind)
    )
    refused(tmp_path, content, kind, "out of the folder")


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_nothing_is_written_through_a_link(tmp_path: Path, kind: str) -> None:
    refused(
        tmp_path, packed(kind, symlink("d", "..", kind), ("d/outside", b"hello", {})), kind, "take the place of 'd'"
    )


@pytest.mark.parametrize(
    "members",
    [(hardlink("h", "../../outside"),), (hardlink("h", "/etc/passwd"),), (hardlink("h", "later"), ("later", b"", {})),
     (hardlink("h", "h"),), (("d/a", b"", {}), hardlink("h", "d")),
     (FILE, symlink("s", "a", ".tar.gz"), hardlink("h", "s"))],
)  # fmt: skip
def test_hard_links_to_what_is_no_file_of_the_archive(tmp_path: Path, members: tuple[Member, ...]) -> None:
    refused(tmp_path, tar(*members), ".tar.gz", "leads to no earlier file")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z"])
def test_devices_and_pipes_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    content = tar(("d", b"", {"type": kind}))
    if kind == tarfile.CONTTYPE:  # a plain file on everything but one system
        (archive := tmp_path / "x.tar.gz").write_bytes(content)
        unpack(archive, tmp_path / "x")
        assert (tmp_path / "x" / "d").is_file()
    else:
        refused(tmp_path, content, ".tar.gz", "device, a pipe")


@pytest.mark.parametrize("mode", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_devices_and_pipes_in_a_zip(tmp_path: Path, mode: int) -> None:
    refused(tmp_path, zipped(("d", b"", {"mode": mode | 0o644})), ".zip", "device or a pipe")


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_what_stays_inside_is_unpacked_and_no_permission_is_taken_over(tmp_path: Path, kind: str) -> None:
    members = [("d/tool", b"hello", {"mode": 0o6777}), symlink("link", "d/tool", kind), ("./b", b"", {})]
    members += [hardlink("d/again", "d/tool")] if kind != ".zip" else []
    (archive := tmp_path / f"x{kind}").write_bytes(packed(kind, *members))
    unpack(archive, tmp_path / "x")
    assert (tmp_path / "x" / "link").read_text() == "hello"
    assert (tmp_path / "x" / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "x" / "d" / "tool").stat().st_mode) & 0o7133 == 0
    assert (tmp_path / "x" / "b").read_bytes() == b""
    if kind != ".zip":
        assert (tmp_path / "x" / "d" / "again").read_text() == "hello"


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_a_link_at_the_target_is_not_followed(tmp_path: Path, kind: str) -> None:
    (archive := tmp_path / f"x{kind}").write_bytes(packed(kind, FILE))
    (mine := tmp_path / "mine").mkdir()
    (tmp_path / "x").symlink_to(mine)
    with pytest.raises(DataError, match="is a link"):
        unpack(archive, tmp_path / "x")
    assert not list(mine.iterdir())


def zeros_tar(size: int) -> bytes:
    entry = tarfile.TarInfo("zeros")
    entry.size = size
    return entry.tobuf() + bytes(-(-size // 512) * 512 + 1024)


def test_xz_takes_no_more_memory_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = zeros_tar(2**16)
    content = lzma.compress(tar[:1000]) + bytes(4) + lzma.compress(tar[1000:])  # two streams, and padding between
    (packed_file := tmp_path / "a.fa.xz").write_bytes(content)
    (archive := tmp_path / "x.tar.xz").write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("mambaseq.data.unpacking.XZ_MEMORY", 4 * 2**20)  # its header asks for 8 MiB
        for read in (lambda: list(read_pieces(packed_file)), lambda: unpack(archive, tmp_path / "x")):
            with pytest.raises(
                DataError, match=r"its header asks for more than 4 MiB of memory, more than xz -9 needs"
            ):
                read()
    unpack(archive, tmp_path / "x")
    assert (tmp_path / "x" / "zeros").read_bytes() == bytes(2**16)
    for cut in (50, 20, 1):
        archive.write_bytes(content[:-cut])
        with pytest.raises(DataError, match="packed data end too early"):
            unpack(archive, tmp_path / "y")


def zeros_zip(method: int) -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("zeros", bytes(size))
        return file.getvalue()

    return make


BOMBS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "gz": (".tar.gz", lambda size: gzip.compress(zeros_tar(size), 9)),
    "xz": (".tar.xz", lambda size: lzma.compress(zeros_tar(size))),
    "bz2": (".tar.bz2", lambda size: bz2.compress(zeros_tar(size))),
    "zip": (".zip", zeros_zip(zipfile.ZIP_DEFLATED)),
    "zip bz2": (".zip", zeros_zip(zipfile.ZIP_BZIP2)),
    "zip xz": (".zip", zeros_zip(zipfile.ZIP_LZMA)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_while_they_unpack(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, make = BOMBS[name]
    monkeypatch.setattr("mambaseq.limits.UNRATED", 2**20)
    content = make(24 * 2**20)
    tracemalloc.start()
    try:
        refused(tmp_path, content, kind, "MAMBASEQ_MAX_UNPACKED_RATIO", UserError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if name in ("gz", "xz", "bz2", "zip"):  # zipfile holds what 4 KiB of the others unpack to
        assert peak < 12 * 2**20


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_limits_of_size_and_number_can_be_raised(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = packed(kind, *((f"d/{i}", bytes(1000), {}) for i in range(20)))
    (archive := tmp_path / f"x{kind}").write_bytes(content)
    for variable, low, high in (("UNPACKED_BYTES", 19_000, 10**6), ("ARCHIVE_MEMBERS", 20, 22)):
        monkeypatch.setenv(f"MAMBASEQ_MAX_{variable}", str(low))
        with pytest.raises(UserError, match=f"MAMBASEQ_MAX_{variable}"):
            unpack(archive, tmp_path / "x")
        assert not (tmp_path / "x").exists()
        monkeypatch.setenv(f"MAMBASEQ_MAX_{variable}", str(high))
    unpack(archive, tmp_path / "x")
    assert len(list((tmp_path / "x" / "d").iterdir())) == 20


def test_headers_that_lie(tmp_path: Path) -> None:
    """A zip that says 5 bytes for many, a tar whose names take gigabytes, a sparse file of a terabyte."""
    content = bytearray(zeros_zip(zipfile.ZIP_DEFLATED)(10**6))
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 5)
    for number, (kind, lie, message) in enumerate(
        [
            (".zip", bytes(content), "cannot be unpacked"),
            (".tar.gz", gzip.compress(longname(2**33) + bytes(2**20)), "more memory"),
            (".tar.gz", gzip.compress(pax(b"GNU.sparse.size=1000000000000") + bytes(2048)), "holes"),
            (".tar.gz", gzip.compress(longname(10) * 5000 + bytes(2048)), "cannot be unpacked"),
        ]
    ):
        (folder := tmp_path / str(number)).mkdir()
        refused(folder, lie, kind, message)


def longname(size: int) -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, size
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(512)


def pax(record: bytes) -> bytes:
    line = b"%d %s\n" % (len(record) + 4, record)
    entry = tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, len(line)
    file = tarfile.TarInfo("holes")
    sparse = b"22 GNU.sparse.map=0,0\n"
    entry.size += len(sparse)
    return entry.tobuf() + (line + sparse).ljust(512, b"\0") + file.tobuf()


@pytest.mark.parametrize("cut", ["header", "end", "middle"])
def test_a_damaged_tar_is_not_taken_for_a_short_one(tmp_path: Path, cut: str) -> None:
    """tarfile ends without a word at a header that is damaged."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("a", "b"):
            entry = tarfile.TarInfo(name)
            entry.size = 5
            archive.addfile(entry, io.BytesIO(b"hello"))
    content = bytearray(file.getvalue())
    if cut == "header":
        content[1024 + 20] ^= 1
    content = content[: {"header": len(content), "end": 2048, "middle": 1536 + 3}[cut]]
    refused(tmp_path, bytes(content), ".tar", "cannot be unpacked")


def test_every_cut_and_flipped_byte_is_an_answer(tmp_path: Path) -> None:
    """Unpacked or refused, with nothing left, whatever is damaged."""
    members = (("d/a", b"hello" * 50, {}), ("b", b"x", {}))
    for kind in (".zip", ".tar.gz"):
        content = packed(kind, *members)
        for place in range(0, len(content), 3):
            for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]):
                (archive := tmp_path / f"x{kind}").write_bytes(damaged)
                with contextlib.suppress(UserError):
                    unpack(archive, tmp_path / "x")
                    shutil.rmtree(tmp_path / "x")
        assert {path.name for path in tmp_path.iterdir()} <= {"x.zip", "x.tar.gz"}


def test_a_zip_with_a_password(tmp_path: Path) -> None:
    content = bytearray(zipped(FILE))
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    assert "password" in refused(tmp_path, bytes(content), ".zip", "cannot be unpacked")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_a_full_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive := tmp_path / "x.zip").write_bytes(zipped(FILE))
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *rest, **options: opened(Path("/dev/full"), "wb", *rest, **options)
        if mode == "xb" else opened(self, mode, *rest, **options),
    )  # fmt: skip
    with pytest.raises(UserError, match="The disk is full"):
        unpack(archive, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
