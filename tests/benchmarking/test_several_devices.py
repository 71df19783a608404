"""Rows of several counts of GPUs become one table and one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def step(gpus: int, relayed: float) -> dict:
    """Of a split sequence: one GPU takes eight seconds for all of it."""
    row = {"name": "step", "length": 131072, "ranks": gpus, "one_s": 8.0, "one_gib": 40.0, "relayed_s": relayed}
    return {**row, "relayed_efficiency": 8.0 / (gpus * relayed), "relayed_memory": 0.55}


def run(way: str, gpus: int, rate: float) -> dict:
    return {"name": way, "length": 2048, "ranks": gpus, "parameters": 130_000_000, "tokens_per_s": rate}


def test_rows_of_any_number_of_gpus_are_told_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import parallel_report

    first = [run("fit, ddp", 1, 100.0), step(2, 9.0), run("fit, ddp", 2, 190.0), run("fit, fsdp2", 8, 500.0)]
    second = [step(2, 5.0), step(4, 2.5), run("fit, ddp x context parallel", 4, 300.0)]
    second += [{"name": "a chunk, apart", "length": 64, "ranks": 4, "chunk_ms": 9.0, "waits_ms": [1.0, 2.25]}]
    replayed = {"relayed_replays": 0, "why_not_replayed": "it waits", "relayed_gc_ms": 4.0, "relayed_mallocs": 0}
    second += [{**step(2, 5.0), "name": "step, chunk_length 32", "eager_s": 6.0, **replayed}]
    second += [{"name": "fit, fsdp2", "length": 2048, "ranks": 2, "failed": "it ended"}]
    second += [{**step(4, 4.0), "name": "step, ddp x context parallel 2, chunk_length 65536", "length": 2**20}]
    rows = parallel_report.merged(first, second)
    assert [row["ranks"] for row in rows] == [1, 2, 2, 2, 2, 4, 4, 4, 4, 8]
    failed = {"name": "fit, ddp", "length": 2048, "ranks": 2, "failed": "not done"}
    assert parallel_report.merged(rows, [failed]) == rows  # what was measured stays
    told = parallel_report.tables(json.loads(json.dumps(rows)))
    assert "| step | 131,072 | 2 | 8.0000 | 5.0000 | 80 % |  |  | 55 % |" in told  # not the earlier 9.0
    assert "| step | 131,072 | 4 | 8.0000 | 2.5000 | 80 % |" in told
    assert "| fit, ddp | 130,000,000 | 2 | 190 | 95 % |" in told
    assert "| fit, ddp x context parallel | 130,000,000 | 4 | 300 | 75 % |" in told  # of one GPU by ddp
    assert "a chunk, apart, 64 positions on 4: chunk_ms 9.0, waits_ms 1.0 and 2.2" in told
    how = "eager 6.0000 s, relayed 5.0000 s; relayed_replays 0, not captured: it waits, relayed_gc_ms 4"
    assert f"step, chunk_length 32, 131,072 positions on 2: {how}" in told
    assert "fit, fsdp2 on 2: it ended" in told
    pictures = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in pictures:
        parallel_report.picture(rows, path)
    drawn = pictures[0].read_text(encoding="utf-8")
    assert drawn == pictures[1].read_text(encoding="utf-8")
    pairs = "step, ddp x context parallel 2, 1,048,576 positions, relayed"
    for words in ("step, 131,072 positions, relayed", pairs, "fit, ddp x context parallel", "GPUs of one host"):
        assert words in drawn
    assert "stroke-dasharray" not in drawn
    parallel_report.picture([step(2, 5.0) | {"length": length} for length in range(128, 139)], pictures[0])
    assert "stroke-dasharray" in pictures[0].read_text(encoding="utf-8")  # an eleventh line, and ten colours
    parallel_report.picture([], tmp_path / "empty.png")
    assert "torch" not in vars(parallel_report)
    sys.modules.pop("parallel_report")


def test_rows_are_added_one_by_one_to_what_a_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import parallel_report

    path = tmp_path / "new" / "all.json"
    assert parallel_report.rows_of(path) == []
    parallel_report.keep(path, step(2, 9.0), gpu="H200", torch="2.11")
    parallel_report.keep(path, run("fit, ddp", 1, 100.0))
    parallel_report.keep(path, step(2, 5.0), gpu=None)
    kept = json.loads(path.read_text())
    assert (kept["gpu"], kept["torch"]) == ("H200", "2.11")
    assert [(row["name"], row.get("relayed_s")) for row in kept["rows"]] == [("fit, ddp", None), ("step", 5.0)]
    sys.modules.pop("parallel_report")
