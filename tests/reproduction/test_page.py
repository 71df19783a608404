"""docs/reproduction.md is what the kept reports say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_of_the_kept_reports() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "reproduction.py"))["page"]()
    kept = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert made == kept, "run `python benchmarks/reproduction.py`"
