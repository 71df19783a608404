"""A half-written file or folder never takes a good one's place."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambaseq.atomic import atomic_file, atomic_folder, atomic_path
from mambaseq.errors import UserError


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The kernel refuses files of more than 4 KiB (EFBIG), as it refuses them on a full disk.

    Held for as short as can be: the process that runs the tests may itself be writing its output to a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_appears_whole_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write("é")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "é"
    assert names(path.parent) == ["a.txt"]


def test_file_has_the_usual_permissions(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_error_keeps_the_old_file_and_leaves_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    told = pytest.raises(UserError, match=r"disk is full.*a could not be written.*Free some space")
    with told, full_disk(), atomic_file(path) as file:
        file.write(b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with atomic_folder(folder) as temporary:
        (temporary / "weights").write_bytes(b"old")
    told = pytest.raises(UserError, match="disk is full")
    with told, full_disk(), atomic_folder(folder) as temporary:
        (temporary / "weights").write_bytes(b"x" * 100_000)
    assert (folder / "weights").read_bytes() == b"old"
    assert names(tmp_path) == ["checkpoint"]


def test_full_disk_reported_in_words_by_a_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="disk is full"), atomic_path(path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_path_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.wav") as temporary:
        assert temporary.suffix == ".wav"
        temporary.write_bytes(b"x")
    assert names(tmp_path) == ["a.wav"]


def test_folder_is_replaced_or_kept(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for text in ("1", "2"):
        with atomic_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "file").write_text(text)
    with pytest.raises(FileExistsError), atomic_folder(folder, replace=False) as temporary:
        (temporary / "file").write_text("3")
    assert (folder / "inner" / "file").read_text() == "2"
    assert names(tmp_path) == ["store"]


def test_a_file_that_is_read_is_not_blamed_on_the_place_written_to(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/input")
    with pytest.raises(PermissionError), atomic_file(tmp_path / "out"):
        raise error


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    told = pytest.raises(UserError, match=r"runs.* cannot be written: Not a directory")
    with told, atomic_file(tmp_path / "runs" / "a"):
        pass
