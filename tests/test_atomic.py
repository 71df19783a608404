"""A half-written file or folder never takes a good one's place."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambaseq import atomic
from mambaseq.atomic import atomic_file, atomic_folder, atomic_path, json_text, remove_leftovers, settle
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


def die_in(code: str, folder: Path) -> None:
    """A process that writes in the folder and is killed when it says so."""
    header = "import os, signal\nfrom pathlib import Path\nfrom mambaseq import atomic\n"
    text = f"{header}folder = Path({str(folder)!r})\n{code}"
    died = "\nos.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", text.replace("DIE", died.strip())], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    die_in(
        "with atomic.atomic_file(folder / 'a') as file, atomic.atomic_folder(folder / 'b') as inner, "
        "atomic.atomic_path(folder / 'c.wav') as path:\n"
        "    path.write_bytes(b'x'); (inner / 'x').write_bytes(b'x'); DIE",
        tmp_path,
    )
    assert len(names(tmp_path)) == 3
    assert all(name.startswith(".") for name in names(tmp_path))
    with atomic_file(tmp_path / "other") as file:
        file.write(b"x")
    assert names(tmp_path) == ["other"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as file, atomic_folder(tmp_path / "b"):
        before = names(tmp_path)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == before
        file.write(b"x")
    assert names(tmp_path) == ["a", "b"]


def test_a_process_id_that_came_round_again_keeps_nothing_alive(tmp_path: Path) -> None:
    own = atomic._temporary(tmp_path / "a")
    found = atomic._LEFTOVER.fullmatch(own.name)
    assert found is not None
    former = own.with_name(own.name.replace(found["process"], "00000000"))
    own.write_bytes(b"x")
    former.write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [own.name]


def test_another_machines_leftovers_go_after_a_week(tmp_path: Path) -> None:
    own = atomic._temporary(tmp_path / "a")
    elsewhere = own.with_name(own.name.replace(atomic._host(), "00000000").replace(f".{os.getpid()}-", ".999999999-"))
    elsewhere.mkdir()
    (elsewhere / "x").write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [elsewhere.name]
    for path in (elsewhere / "x", elsewhere):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_folders_below_are_removed_and_links_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints").mkdir(parents=True)
    elsewhere.mkdir()
    for folder in (run / "checkpoints", elsewhere):
        die_in("with atomic.atomic_file(folder / 'a'):\n    DIE", folder)
    (run / "link").symlink_to(elsewhere)
    remove_leftovers(run, deep=True)
    assert names(run / "checkpoints") == []
    assert len(names(elsewhere)) == 1


@pytest.mark.parametrize("reader", [True, False], ids=["reader", "writer"])
def test_a_folder_whose_successor_did_not_arrive_is_put_back(tmp_path: Path, reader: bool) -> None:
    die_in(
        "with atomic.atomic_folder(folder / 'a') as inner:\n    (inner / 'x').write_bytes(b'old')\n"
        "rename = Path.rename\n"
        "def die(self, target):\n"
        "    if self.name.startswith('.a.') and not (folder / 'a').exists(): DIE\n"
        "    return rename(self, target)\n"
        "Path.rename = die\n"
        "with atomic.atomic_folder(folder / 'a') as inner:\n    (inner / 'x').write_bytes(b'new')\n",
        tmp_path,
    )
    assert len(names(tmp_path)) == 2
    if reader:
        assert (settle(tmp_path / "a") / "x").read_bytes() == b"old"
    else:
        with atomic_file(tmp_path / "other"):
            assert (tmp_path / "a" / "x").read_bytes() == b"old"
    assert "a" in names(tmp_path)
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_a_reader_waits_for_a_living_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_WAIT", 0.05)
    aside = atomic._temporary(tmp_path / "a", "old")
    aside.mkdir()
    assert not settle(tmp_path / "a").exists()
    assert names(tmp_path) == [aside.name]
    threading.Timer(0.1, lambda: aside.rename(tmp_path / "a")).start()
    monkeypatch.setattr(atomic, "_WAIT", 5.0)
    assert settle(tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "."])
def test_names_that_cannot_be_written_are_refused(tmp_path: Path, name: str) -> None:
    for writer in (atomic_file, atomic_path, atomic_folder):
        with (
            pytest.raises(UserError, match="cannot be written"),
            writer(Path(name) if name == "." else tmp_path / name),
        ):
            pass


def test_long_names_are_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / ("x" * 250)) as file:
        file.write(b"x")
    assert names(tmp_path) == ["x" * 250]


def test_json_has_no_numbers_that_other_readers_refuse() -> None:
    text = json_text({"a": [float("nan"), 1.5], "b": {"c": -math.inf}, "d": True})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": {"c": None}, "d": True}
