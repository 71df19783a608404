from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mambaseq.data.files import expand, relative_names, walk
from mambaseq.errors import DataError


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Files at three depths, links to folders (one in a circle), hidden files, and a link that leads nowhere."""
    for name in ("a.txt", "one/b.txt", "one/two/c.txt", "one/._b.txt", ".git/d.txt", ".hidden.txt", "one/notes.md"):
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/e.txt").write_text("e")
    (tmp_path / "books/a_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "books/z_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "books/again").symlink_to(tmp_path / "books/one")
    (tmp_path / "books/one/up").symlink_to(tmp_path / "books")
    (tmp_path / "books/gone.txt").symlink_to(tmp_path / "nothing.txt")
    (tmp_path / "books/itself").symlink_to(tmp_path / "books/itself")
    return tmp_path / "books"


def names(paths: list[Path], base: Path) -> list[str]:
    return [path.relative_to(base).as_posix() for path in paths]


ALL = ["a.txt", "a_link/deep/e.txt", "one/b.txt", "one/two/c.txt"]


def test_two_stars_reach_any_depth_and_every_real_folder_once(books: Path) -> None:
    assert names(expand(books / "**/*.txt"), books) == ALL
    assert names(expand(books / "**/two/*.txt"), books) == ["one/two/c.txt"]
    assert names(expand(books / "**"), books) == [*ALL[:3], "one/notes.md", ALL[3]]
    assert names(expand(books / "**/on*/**/c.txt"), books) == ["one/two/c.txt"]
    assert expand(books / "**/*.wav") == []


def test_other_patterns(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(expand(books / "*/*.txt"), books) == ["again/b.txt", "one/b.txt"]
    assert names(expand(books / "?ne/[a-c].txt"), books) == ["one/b.txt"]
    assert names(expand(books / "one/._*.txt"), books) == ["one/._b.txt"]
    assert names(expand(books / ".*/*"), books) == [".git/d.txt"]
    assert expand(books / "gone/*.txt") == []
    monkeypatch.chdir(books)
    assert expand("**/c.txt") == [Path("one/two/c.txt")]
    assert expand("on*/b.txt") == [Path("one/b.txt")]


def test_a_folder_is_walked_by_the_same_rules(books: Path) -> None:
    assert names(walk(books, {".txt"}), books) == ALL
    assert names(walk(books, {".md"}), books) == ["one/notes.md"]


def test_what_is_left_out_is_said_in_one_line(books: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        walk(books, {".txt"})
    (line,) = caplog.messages
    assert line.startswith(f"Left out of {books}: ")
    assert f"hidden files: 2 (such as {books}/.hidden.txt)" in line
    assert f"hidden folders: 1 (such as {books}/.git)" in line
    assert f"links that lead nowhere: 1 (such as {books}/gone.txt)" in line
    assert f"files of other kinds [.md]: 1 (such as {books}/one/notes.md)" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        expand(books / "one/*.txt")
    assert caplog.messages == [f"Left out of {books}/one/*.txt: hidden files: 1 (such as {books}/one/._b.txt)."]
    caplog.clear()
    expand(books / "one/two/*.txt")
    assert not caplog.messages


def test_records_of_one_stem_have_names_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/x.wav", "b/x.wav", "b/y.flac", "b/y.wav")]
    wanted = ["a/x", "b/x", "b/y.flac", "b/y.wav"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert relative_names(paths, tmp_path) == wanted
    assert relative_names(paths, tmp_path / "*/*") == wanted
    assert relative_names(paths[:1], tmp_path / "a/x.wav") == ["x"]
    assert relative_names(paths, "package:somewhere/*/*") == wanted


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a\0/*", "x" * 300 + "/*.txt", "*/" + "x" * 300):
        with pytest.raises(DataError, match=r"is not a file name|cannot be read"):
            expand(tmp_path / name)
