"""A run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambaseq.errors import UserError
from mambaseq.reporting.runs import RunFolder


def test_results_are_merged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_results() == {}
    folder.update_results(a=1, b=2)
    folder.update_results(b=3)
    assert folder.read_results() == {"a": 1, "b": 3}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_results_are_named(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.results.write_bytes(content)
    for touch in (folder.read_results, lambda: folder.update_results(a=1)):
        with pytest.raises(UserError, match=r"results\.json(, line 1,)? (is not|holds).*Delete it"):
            touch()
    assert folder.results.read_bytes() == content


def test_what_is_refused_leaves_no_lock_behind(tmp_path: Path) -> None:
    here, there, kept = tmp_path / "here", tmp_path / "new" / "there", tmp_path / "kept"
    here.mkdir()
    for path in (here, there):
        with pytest.raises(UserError), RunFolder(path).locked():
            raise UserError("The data cannot be read.")
    assert list(tmp_path.iterdir()) == [here]
    assert not list(here.iterdir())
    kept.mkdir()
    (kept / "config.yaml").touch()
    with pytest.raises(UserError), RunFolder(kept).locked():
        raise UserError("The data changed.")
    assert sorted(path.name for path in kept.iterdir()) == [".lock", "config.yaml"]
