"""Draws accuracy against window length, docs/images/dna_lengths.svg, from the reports that are kept here.

python benchmarks/dna_pictures.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean

from mambaseq.reporting.charts import DARK, LIGHT, STYLE, WIDTH, Curve, frame, lines, text
from mambaseq.reproduction.tables import Report

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "dna_lengths.svg"
EDGE, TALL, HEAD = 16, 240, 20
REGRESSION = "6-mer logistic regression, both strands"
PANELS = (
    ("species_length", "Five mammals, an unseen region", "10-mer naive Bayes"),
    ("yeasts", "Two yeasts, unseen chromosomes of unseen strains", "8-mer naive Bayes"),
)


def _panel(recipe: str, bayes: str) -> str:
    """Accuracy of three contenders at each length of a recipe's first table."""
    found = {line.name: line.values for line in Report.read(HERE / "reproduction" / f"{recipe}.json").tables[0].lines}
    contenders = (
        ("Mamba, pretrained", "Mamba"),
        (REGRESSION, "6-mer regression"),
        (bayes, bayes.replace("naive ", "")),
    )
    curves = []
    for colour, (name, shown) in enumerate(contenders):
        values = {int(key.split()[1]): fmean(of) for key, of in found[name].items() if key.startswith("accuracy ")}
        curves.append(Curve(shown, [math.log2(n) for n in values], list(values.values()), "dots", colour))
    return re.sub(r"^<svg[^>]*>|</svg>$", "", lines(curves, "log2 of a window's bases", "accuracy", TALL))


def picture() -> str:
    """The picture, an SVG text."""
    wide, high = 2 * WIDTH + 3 * EDGE, HEAD + TALL + 2 * EDGE
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    parts = [f'<rect width="{wide}" height="{high}" rx="8" fill="var(--ground)"/>']
    for number, (recipe, title, bayes) in enumerate(PANELS):
        x = EDGE + number * (WIDTH + EDGE)
        parts.append(text(x + 4, EDGE + 8, title, kind="strong"))
        parts.append(f'<g transform="translate({x} {EDGE + HEAD})">{_panel(recipe, bayes)}</g>')
    told = (
        "Accuracy against window length of a pretrained Mamba, 6-mer logistic regression and naive Bayes, on two sets"
    )
    return frame(wide, high, told, f"<style>{style}</style>{''.join(parts)}") + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
