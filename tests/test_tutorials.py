"""The Python of each tutorial runs, cell by cell, in an empty folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pages import blocks, run_cell

from mambaseq.registry import allow_imports

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as of a notebook's folder
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = [(text, line) for language, text, line in blocks(page) if language == "python"]
    assert len(cells) >= 5
    names: dict[str, Any] = {"__name__": "__main__"}
    with allow_imports():  # what a page allows ends with it
        for text, line in cells:
            run_cell(text, page, line, names)
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
