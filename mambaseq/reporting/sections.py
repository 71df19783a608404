"""Pieces of a self-contained HTML report: sections, tables, pictures and sounds embedded in the page."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from mambaseq.reporting.pictures import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass
class Section:
    """A titled piece of a report. summary: a line for the page's head. body: HTML."""

    title: str
    summary: str
    body: str


Report = Callable[[Path], Section]
"""What a domain registers under `reports`: the folder of a finished run to a section."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; cells are escaped, numbers right-aligned."""

    def cell(value: object, tag: str) -> str:
        kind = ' class="number"' if isinstance(value, int | float) else ""
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell(name, "th") for name in header)
    body = "".join("<tr>" + "".join(cell(value, "td") for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(figure: Figure | bytes, caption: str) -> str:
    """A matplotlib figure or PNG bytes, embedded."""
    data = figure if isinstance(figure, bytes) else png(figure)
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


def audio_player(samples: np.ndarray, sample_rate: int, caption: str) -> str:
    """A player for samples `(length,)` float in [-1, 1], embedded as 16-bit wav."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype="PCM_16")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><audio controls src="data:audio/wav;base64,{encoded}"></audio>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
