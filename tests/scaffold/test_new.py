"""`mambaseq new domain`: what it writes installs, trains, passes its tests and keeps the laws."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseq.cli.main import main
from mambaseq.domain import catalog


def test_what_is_written_installs_and_passes_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "domain", "tides"]) == 0
    folder, site = tmp_path / "mambaseq-tides", tmp_path / "site"
    written = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv"]
    assert sum(len(path.read_text().splitlines()) for path in written) <= 150
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(folder)], check=True, timeout=200)
    monkeypatch.syspath_prepend(str(site))
    catalog.cache_clear()
    try:
        assert "tides" in catalog().domains
        spec = importlib.util.spec_from_file_location("of_tides", folder / "tests" / "test_tides.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.test_it_learns_and_predicts(tmp_path)
        page = (tmp_path / "run" / "report.html").read_text()
        assert "Waves" in page
        assert page.count("<svg") >= 1  # its curves
        module.test_it_keeps_the_laws()
        assert main(["new", "domain", "tides", "--out", "again"]) == 2
        assert not Path("again").exists()
    finally:
        catalog.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "mambaseq_tides"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dna", "'dna' already"),
        ("class", "Python name"),
        ("2d", "Python name"),
        ("my-domain", "Python name"),
        ("Protein", "Python name"),
        ("../up", "Python name"),
        ("x" * 100, "Python name"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, capsys, name: str, told: str) -> None:
    assert main(["new", "domain", name, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error) < 1000
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["folder", "empty", "file", "link"])
def test_nothing_is_overwritten(tmp_path: Path, capsys, what: str) -> None:
    out = tmp_path / "there"
    if what in ("folder", "empty"):
        out.mkdir()
    if what == "folder":
        (out / "mine.txt").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert main(["new", "domain", "tides", "--out", str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
