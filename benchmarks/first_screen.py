"""Draws the picture at the head of README.md, docs/images/first_screen.svg, from the figures that are kept here.

python benchmarks/first_screen.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mambaseq.reporting.charts import DARK, LIGHT, NARROW, STYLE, Bar, bars, frame, text

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "first_screen.svg"
EDGE, TALL, FOOT = 16, 136, 20  # around a panel, how high it is, and the line below all of them
_DECODED, _BATCH = "generation, 130M", {"batch": 1, "prompt": 2048}
NOTE = "bf16, on an H200. The Transformer has RoPE, SwiGLU, SDPA, and generates with a third of its keys and values."


def _rows(file: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((HERE / file).read_text(encoding="utf-8"))["rows"]
    return rows


def _panel(
    title: str, rows: list[dict[str, Any]], value: str, names: tuple[str, ...], scale: float = 1.0, places: int = 1
) -> str:
    """Bars of what the contenders took or did, in the order of their names."""
    found = {row["contender"]: row[value] * scale for row in rows}
    drawn = [Bar(name, found[name], 0 if name == "mambaseq" else 2) for name in names]
    return re.sub(r"^<svg[^>]*>|</svg>$", "", bars([title, *drawn], places=places))


def picture() -> str:
    """The picture, an SVG text."""
    training = [row for row in _rows("train_gpu.json") if row["shape"] == {"batch": 1, "length": 65_536}]
    decoding = [row for row in _rows("decode_gpu.json") if row["op"] == _DECODED and row["shape"] == _BATCH]
    block = [row for row in _rows("cpu.json") if row["what"] == "block forward, length 2048"]
    models, rate = ("mambaseq", "mamba-ssm", "Transformer"), "thousand tokens/s"
    panels = [
        _panel(f"Training 130M, 65,536 tokens long: {rate}", training, "tokens_per_s", models, 1e-3),
        _panel("Its peak memory: GiB", training, "peak_gib", models),
        _panel(f"Generating one text, 130M: {rate}", decoding, "decode_tokens_per_s", models, 1e-3),
        _panel(
            "A block forward, 2,048 tokens, two CPU cores: s",
            block,
            "seconds",
            ("mambaseq", "transformers", "mambapy"),
            places=2,
        ),
    ]
    wide, high = 2 * NARROW + 3 * EDGE, 2 * TALL + 3 * EDGE + FOOT
    placed = [
        f'<g transform="translate({EDGE + (i % 2) * (NARROW + EDGE)} {EDGE + (i // 2) * (TALL + EDGE)})">{panel}</g>'
        for i, panel in enumerate(panels)
    ]
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    ground = f'<rect width="{wide}" height="{high}" rx="8" fill="var(--ground)"/>'
    placed.append(text(EDGE + 4, high - EDGE, NOTE))
    told = "Speed and memory of training, of a block on a CPU and of decoding, beside others"
    return frame(wide, high, told, f"<style>{style}</style>{ground}{''.join(placed)}") + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
