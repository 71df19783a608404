"""A learned track on disk: as BED, and drawn beside the annotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mambaseq.atomic import atomic_file
from mambaseq.reporting.charts import DARK, LIGHT, STYLE
from mambaseq.reporting.tracks import Band, runs_of, tracks


def write_bed(path: Path, shares: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """BED of the stretches in which one class is the most probable; those of the first class are left out.

    shares: of each sequence, probabilities of the classes `(length, classes)`. The score is their mean over the
        stretch, times 1000; the strand is the class name's last character, if that is + or -.
    """
    with atomic_file(path, "w", encoding="utf-8") as file:
        for name, of in shares.items():
            start = 0
            for label, length in runs_of(of.argmax(1)):
                stop = start + length
                if label:
                    score = round(1000 * float(of[start:stop, label].mean()))
                    strand = names[label][-1] if names[label][-1] in "+-" else "."
                    file.write(f"{name}\t{start}\t{stop}\t{names[label]}\t{score}\t{strand}\n")
                start = stop


def picture(labels: np.ndarray, told: np.ndarray, names: Sequence[str], start: int, unit: str) -> str:
    """An SVG file's text: classes `(length,)` of the annotation above those of a model; labels above the last class are
    unknown. start: the first base's place."""
    known = np.where(labels < len(names), labels.astype(np.int64), -1)
    chart = tracks([Band("annotation", runs_of(known)), Band("model", runs_of(told), 1)], names, start=start, unit=unit)
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    head, rest = chart.split(">", 1)
    return f'{head}><style>{style}</style><rect width="100%" height="100%" rx="8" fill="var(--ground)"/>{rest}\n'
