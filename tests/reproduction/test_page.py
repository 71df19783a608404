"""docs/reproduction.md is what the kept reports say, and the script that makes them runs all there is."""

from __future__ import annotations

import runpy
from pathlib import Path

from mambaseq_text.recipes.mixers import MIXERS

from mambaseq.domain import catalog

ROOT = Path(__file__).parents[2]


def test_the_parts_that_are_run_over_gpus_are_all_there_is() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduce_all.py"))
    parts = [*made["timed"](), *made["untimed"]()]
    assert len(set(parts)) == len(parts)
    assert sum(part.only == made["BASELINE"] for part in parts) == 1
    assert {part.recipe for part in parts} == {entry.name.rpartition("/")[2] for entry in catalog()["recipes"]}
    lines = {name for part in parts if part.recipe == "mixers" for name in part.only}
    assert lines == set(MIXERS)
    command = made["Job"]("lra", ("s4d", "digits"), (2, 4)).command("tiny", "cpu", Path("out"))
    wanted = "reproduce lra --scale tiny --device cpu --out out/lra --only s4d digits --seed 2 4"
    assert " ".join(command[3:]) == wanted


def test_the_page_is_made_of_the_kept_reports() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduction.py"))["page"]()
    kept = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert made == kept, "run `python benchmarks/reproduction.py`"
