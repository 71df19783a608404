"""The demo's page is drawn from the runs that are there, without training any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambaseq.errors import UserError
from mambaseq.reporting import Section
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.demo import demo


class Names(dict[str, Any]):
    domains = ("one", "two")


def report(run: Path) -> Section:
    return Section(f"Of {run.name}", "as good as it gets", "<p>body</p>", "<p>picture</p>")


def test_the_page_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, reports = {"one/demo": "", "two/demo": ""}, {"one/demo": report, "two/demo": report}
    monkeypatch.setattr("mambaseq.runs.demo.catalog", lambda: Names(configs=configs, reports=reports))
    monkeypatch.setattr("mambaseq.runs.demo.fit", SimpleNamespace())  # nothing is trained
    with pytest.raises(UserError, match="no run"):
        demo(tmp_path, redraw=True)
    folder = RunFolder(tmp_path / "two")
    folder.path.mkdir()
    folder.config.touch()
    with pytest.raises(UserError, match="not finished"):
        demo(tmp_path, redraw=True)
    folder.update_results(
        steps=3, parameters=7, train_tokens=1234, tokens_per_second=9, train_seconds=1.0, demo_seconds=95
    )
    assert "as good as it gets" in demo(tmp_path, redraw=True).message
    page = (tmp_path / "report.html").read_text()
    for text in ("one kind of data", "1 min 35 s", "Of two", "<p>picture</p>", "1,234", 'href="two/report.html"'):
        assert text in page, text
    assert folder.read_results()["demo_seconds"] == 95
