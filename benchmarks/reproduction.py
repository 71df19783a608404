"""Writes docs/reproduction.md from the reports of `mambaseq reproduce` that are kept in benchmarks/reproduction/.

mambaseq reproduce NAME --out runs/NAME && cp runs/NAME/report.json benchmarks/reproduction/NAME.json
python benchmarks/reproduction.py
"""

from __future__ import annotations

from pathlib import Path

from mambaseq.reproduction.tables import Report

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reproduction.md"
HEAD = """# Reproduction

Published results beside ours, each with the command that repeats it. This page is made from the reports in
`benchmarks/reproduction/` by `python benchmarks/reproduction.py`. Means and standard deviations over seeds.
"""


def page() -> str:
    """The page that the kept reports make."""
    reports = [Report.read(path) for path in sorted((HERE / "reproduction").glob("*.json"))]
    return "\n".join([HEAD, *(f"## {report.recipe}\n\n{report.markdown()}" for report in reports)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
