"""The other processes of a run import beside the first one, and are then what Lightning would have started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies.launchers import subprocess_script

from mambaseq import __version__
from mambaseq.cli import ahead

# what Lightning starts without any of ours: it says so, and what it was given
OTHERWISE = [sys.executable, "-c", "import os; print('anew', os.environ['LOCAL_RANK'], os.environ.get('SEED'))"]


@pytest.mark.parametrize(
    ("raw", "overrides", "count"),
    [
        ({}, [], 0),
        ({"trainer": None}, [], 0),
        ({"trainer": {"devices": 4}}, [], 3),
        ({"trainer": {"devices": 4}}, ["--trainer.devices", "2"], 1),
        ({"trainer": {"devices": 4}}, ["--trainer.devices=1"], 0),
        ({}, ["--trainer.devices=8", "--seed", "3"], 7),
        ({}, ["--trainer.devices"], 0),
        ({"trainer": {"devices": "auto"}}, [], 0),
        ({"trainer": {"devices": -1}}, [], 0),
        ({"trainer": {"devices": [0, 1]}}, [], 0),
        ({"trainer": {"devices": 10**9}}, [], 0),
        ({"trainer": {"devices": 2, "num_nodes": 2}}, [], 0),
    ],
)
def test_settings_tell_how_many_there_will_be(
    raw: dict[str, Any], overrides: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert ahead.count_others(raw, overrides) == count


def test_no_more_import_at_once_than_there_are_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A number by mistake is refused, or is Lightning's to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(ahead, "Path", lambda _: tmp_path)
    many = {"devices": 200}
    assert ahead.count_others({"trainer": many}, []) == 2
    assert ahead.count_others({"trainer": many | {"accelerator": "gpu"}}, []) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert ahead.count_others({"trainer": many}, []) == 1
    assert ahead.count_others({"trainer": many | {"accelerator": "cpu"}}, []) == 2


def test_processes_that_something_else_starts_start_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ahead.count_others({"trainer": {"devices": 4}}, []) == 0


def test_each_is_what_lightning_would_have_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command and the environment are those of that moment; what there are too few of is started anew."""
    (tmp_path / "told.py").write_text("import os; print('imported', os.environ['LOCAL_RANK'], flush=True)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mambaseq", "--version"])
    with ahead.started(1, "told") as processes:
        ours = processes[1]
        with ahead.taken_by_lightning(processes):
            popen = subprocess_script.subprocess.Popen
            started = [popen(OTHERWISE, env=os.environ | {"LOCAL_RANK": rank, "SEED": "7"}) for rank in ("1", "2")]
        assert subprocess_script.subprocess is subprocess
        assert started[0] is ours
        assert processes == {}
    assert [process.wait(60) for process in started] == [0, 0]
    assert sorted(capfd.readouterr().out.splitlines()) == [__version__, "anew 2 7", "imported 1"]


def test_one_that_has_ended_is_started_anew(capfd: pytest.CaptureFixture[str]) -> None:
    with ahead.started(1, "no_such_module") as processes:
        processes[1].wait(60)
        with ahead.taken_by_lightning(processes):
            process = subprocess_script.subprocess.Popen(OTHERWISE, env=os.environ | {"LOCAL_RANK": "1"})
    assert process.wait(60) == 0
    assert capfd.readouterr().out == "anew 1 None\n"


def test_those_that_are_not_needed_end() -> None:
    with ahead.started(2, "json") as processes:
        found = list(processes.values())
        found[0].stdin.close()  # type: ignore[union-attr]  # as when the first process is killed
        assert found[0].wait(60) == 0
        found[0].stdin = None
    assert found[1].returncode is not None
