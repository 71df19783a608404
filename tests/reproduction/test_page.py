"""docs/reproduction.md is what the kept reports say, and the script that makes them runs all there is."""

from __future__ import annotations

import runpy
from pathlib import Path

from mambaseq_synthetic.recipes import lra, selection, selective_copying
from mambaseq_text.recipes import ablations, mixers

from mambaseq.domain import catalog

ROOT = Path(__file__).parents[2]


def test_the_parts_that_are_run_over_gpus_are_all_there_is() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduce_all.py"))
    parts = [*made["timed"](), *made["untimed"]()]
    assert len(set(parts)) == len(parts)
    assert sum(part.only == made["BASELINE"] for part in parts) == 1
    recipes = {entry.name.rpartition("/")[2]: entry.load() for entry in catalog()["recipes"]}
    assert {part.recipe for part in parts} == {name for name, recipe in recipes.items() if not recipe.brings}
    only = {recipe: [part.only for part in parts if part.recipe == recipe] for recipe in {p.recipe for p in parts}}
    assert {name for (name,) in only["mixers"]} == set(mixers.MIXERS)
    assert set(only["lra"]) == {(mixer, task) for mixer in lra.MIXERS for task in lra.TASKS}
    assert {name for (name,) in only["selective_copying"]} == set(selective_copying.MODELS)
    assert only["selection"] == [(name,) for name in selection.LINES for _ in made["SEEDS"]]
    seeds = [(*part.only, *part.seeds) for part in parts if part.recipe == "induction_heads"]
    assert sorted(seeds) == [("attention", 0), ("mamba", 0), ("mamba", 1), ("mamba", 2), ("s4d", 0)]
    entries = [entry for group in ablations.GROUPS for entry in group.entries]
    run = [(e.mixer, e.all_options()) for e in entries if (e.name,) in only["ablations"]]
    assert all((entry.mixer, entry.all_options()) in run for entry in entries)
    assert len(only["ablations"]) < len(entries)  # what is in two tables is trained once
    command = made["Job"]("lra", ("s4d", "digits"), (2, 4)).command("tiny", "cpu", Path("out"))
    wanted = "reproduce lra --scale tiny --device cpu --out out/lra-tiny --only s4d digits --seed 2 4"
    assert " ".join(command[3:]) == wanted


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduce_all.py"))
    wrong = made["Job"]("no/such recipe")
    assert made["run"]([wrong], [""], 1, "tiny", "cpu", tmp_path) == [wrong]
    assert "no/such recipe" in wrong.log(tmp_path).read_text()


def test_the_page_is_made_of_the_kept_reports() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduction.py"))["page"]()
    kept = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert made == kept, "run `python benchmarks/reproduction.py`"
