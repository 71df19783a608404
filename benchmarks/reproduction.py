"""Writes docs/reproduction.md from the reports of `mambaseq reproduce` that are kept in benchmarks/reproduction/.

mambaseq reproduce NAME --out runs/NAME && cp runs/NAME/report.json benchmarks/reproduction/NAME.json
python benchmarks/reproduction.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

from mambaseq.reproduction.tables import Report

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reproduction.md"
HEAD = """# Reproduction

Published results beside ours, each with the command that repeats it. This page is made from the reports in
`benchmarks/reproduction/` by `python benchmarks/reproduction.py`; `python benchmarks/reproduce_all.py` makes all of
them anew, over the GPUs of a machine. Means and standard deviations over seeds. A command with `--only` or `--seed`
made a part of a recipe.
"""


def page() -> str:
    """The page that the kept reports make."""
    reports = [Report.read(path) for path in sorted((HERE / "reproduction").glob("*.json"))]
    parts = [HEAD]
    for recipe, its in itertools.groupby(reports, key=lambda report: report.recipe):
        parts += [f"## {recipe}\n", *(report.markdown() for report in its)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
