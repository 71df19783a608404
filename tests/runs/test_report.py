"""The page of a run: what the domain of its data set has to say, which takes nothing from the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mambaseq.domain import catalog
from mambaseq.registry import Registry
from mambaseq.reporting import Section
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.report import write_report

HERE = "runs.test_report"


def good(run: Path) -> Section:
    return Section("Mine", f"loss {RunFolder(run).read_results()['val/loss']}", "<p>It went well.</p>")


def bad(run: Path) -> Section:
    raise KeyError("test/accuracy")


def none(run: Path) -> None:
    return None


@pytest.fixture
def reports() -> Iterator[Registry]:
    registry = catalog()["reports"]
    names = {f"odd/{one.__name__}": (f"{HERE}:{one.__name__}", "") for one in (good, bad, none)}
    registry.add_all(names, "tests")
    yield registry
    for name in names:
        del registry._entries[name]


def test_a_report_is_named_as_the_data_set(reports: Registry, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.update_results(steps=12, **{"val/loss": 0.5})
    assert write_report(folder, "odd/other") == ""
    assert not folder.report.exists()
    assert write_report(folder, "odd/good") == ""
    page = folder.report.read_text()
    for text in ("run: odd/good", "loss 0.5", "<p>It went well.</p>", "12 steps"):
        assert text in page


@pytest.mark.parametrize(("name", "told"), [("bad", "KeyError"), ("none", "a NoneType, not a mambaseq.reporting")])
def test_a_report_that_fails_takes_nothing_from_the_run(
    reports: Registry, tmp_path: Path, name: str, told: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.update_results(steps=12)
    message = write_report(folder, f"odd/{name}")
    assert told in message
    assert "the run is complete" in message
    assert not folder.report.exists()
