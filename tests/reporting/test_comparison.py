"""Runs side by side."""

from __future__ import annotations

import csv
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, UserError
from mambaseq.reporting.comparison import compare, curves, ordered


def made(folder: Path, lr: float, results: dict[str, Any], losses: list[float], spent: bool = True) -> None:
    for name in ("model", "logs/version_0"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 1\noptimizer: {{lr: {lr}, name: adamw}}\n")
    (folder / "results.json").write_text(json.dumps(results))
    rows = ["step,val/loss,tokens,seconds", *(f"{n},{loss},{7 * (n + 1)},{n * n}.5" for n, loss in enumerate(losses))]
    text = "".join(",".join(row.split(",")[: 4 if spent else 2]) + "\n" for row in rows)
    (folder / "logs/version_0/metrics.csv").write_text(text)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    results = {"val/accuracy": 0.5, "steps": 2, "train_tokens": 100, "parameters": 7, "train_seconds": 3.5}
    made(tmp_path / "b", 0.1, results, [3.0, 2.0])
    made(tmp_path / "deep" / "a", 0.2, results | {"val/accuracy": 0.75}, [3.0, 1.0])
    made(tmp_path / "deep" / "c", 0.3, {}, [])
    (tmp_path / "other").mkdir()
    return tmp_path


def test_what_differs_is_a_column(runs: Path) -> None:
    found = compare([runs])
    assert found.columns[:3] == ["run", "optimizer.lr", "val/accuracy"]
    assert "seed" not in found.columns
    assert [row[1] for row in found.rows] == [0.1, 0.2, 0.3]
    assert [row[2] for row in ordered(found, "accuracy", descending=True).rows] == [0.75, 0.5, ""]
    assert [row[1] for row in ordered(found, "lr").rows] == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match="Did you mean 'val/accuracy'"):
        ordered(found, "val/acuracy")
    with pytest.raises(UserError, match="There is no run in"):
        compare([runs / "other"])


def test_a_run_that_cannot_be_read_is_said(runs: Path, capsys: pytest.CaptureFixture) -> None:
    (runs / "b" / "results.json").write_text("{")
    assert main(["runs", str(runs)]) == 0
    told = capsys.readouterr().out
    assert "left out" in told
    assert len(compare([runs]).rows) == 2


def test_curves_are_over_the_tokens_and_seconds_that_were_logged(tmp_path: Path, capsys) -> None:
    made(tmp_path / "a", 0.1, {"steps": 2, "train_tokens": 1000, "train_seconds": 99}, [3.0, 2.0])
    made(tmp_path / "b", 0.2, {"steps": 2, "train_tokens": 1000, "train_seconds": 99}, [3.0, 1.0], spent=False)
    figure, notes = curves(compare([tmp_path]))
    lines = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes]
    assert lines[0] == [[[1, 3], [2, 2]], [[1, 3], [2, 1]]]
    assert lines[1:] == [[[[7, 3], [14, 2]]], [[[0.5, 3], [1.5, 2]]]]
    assert main(["runs", str(tmp_path), "--picture", str(tmp_path / "p.png")]) == 0
    assert notes == [f"over steps alone: an earlier version did not log tokens and seconds of {tmp_path / 'b'}"]
    assert notes[0] in capsys.readouterr().out


def test_no_two_curves_of_a_picture_look_alike(tmp_path: Path) -> None:
    for number in range(23):
        made(tmp_path / f"r{number:02}", 0.1, {"steps": 2, "train_tokens": 9, "train_seconds": 9}, [3.0, 2.0])
    figure, _ = curves(compare([tmp_path]))
    for axes in figure.axes:
        assert len({(to_rgb(line.get_color()), line.get_linestyle()) for line in axes.get_lines()}) == 23


def test_the_command(runs: Path, drawn: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table, picture = runs / "t.csv", runs / "p.png"
    assert main(["runs", str(runs), "--sort", "accuracy", "--csv", str(table), "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "optimizer.lr", "val/accuracy"]
    assert len(lines) == 4
    with table.open(newline="") as file:
        assert [row["val/accuracy"] for row in csv.DictReader(file)] == ["0.5", "0.75", ""]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["runs", str(runs), "--picture", str(picture), "--curve", "val/none"]) == 2
    assert main(["runs", str(runs / "nowhere")]) == 2


def test_the_table_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results = {
        "val/loss": 2.0,
        "val/accuracy": 0.5,
        "train/loss": 1.0,
        "steps": 2,
        "parameters": 7,
        "train_seconds": 3.5,
    }
    made(tmp_path / f"a-run-with-{'a-long-' * 8}name", 0.1, results, [3.0])
    made(tmp_path / "b", 0.2, {**results, "val/loss": 1.0}, [2.0])
    order = ["run", "optimizer.lr", "val/accuracy", "val/loss", "parameters", "steps", "train_seconds", "train/loss"]
    whole = compare([tmp_path]).columns
    assert sorted(whole) == sorted(order)
    shown = []
    for width in range(200, 5, -1):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["runs", str(tmp_path), "--sort", "val/loss"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        columns = head.split()
        assert "val/loss" in columns
        if width >= 16 + 2 + len("val/loss"):
            assert max(map(len, (head, *rows[:2]))) <= width
        assert rows[0].split()[0].endswith("b")
        assert ("not shown" in rows[-1]) is (len(columns) < len(order))
        if columns not in shown:
            shown.append(columns)
    left = [next(name for name in before if name not in after) for before, after in itertools.pairwise(shown)]
    assert left == ["train/loss", "train_seconds", "steps", "parameters", "optimizer.lr", "val/accuracy"]
    assert main(["runs", str(tmp_path), "--all", "--json", str(tmp_path / "t.json")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == whole
    assert [list(row) for row in json.loads((tmp_path / "t.json").read_text())] == [whole, whole]
    monkeypatch.delenv("COLUMNS")
    made(tmp_path / "c", 0.3, {f"val/f1_of_class_{number}": 0.5 for number in range(9)}, [])
    assert main(["runs", str(tmp_path)]) == 0  # into a file or a pipe
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert 100 < max(map(len, (head, *rows))) <= 120
    assert last.startswith("not shown: ")


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_what_is_written_to_a_pipe_is_alone_there(option: str, runs: Path, tmp_path: Path, capsys) -> None:
    """And the pipe stays one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # a small file fits into it
    assert main(["runs", str(runs), option, str(pipe)]) == 0
    assert pipe.is_fifo()
    written = os.read(reader, 2**16)
    os.close(reader)
    assert written.startswith({"--csv": b"run,optimizer.lr,", "--json": b"[\n"}[option])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split()[:2] == ["run", "optimizer.lr"]
