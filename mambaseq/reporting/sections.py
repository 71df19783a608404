"""Parts of a self-contained HTML report: sections, tables, pictures and sounds embedded in the page."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import soundfile

from mambaseq.reporting.numbers import decimals, number
from mambaseq.reporting.pictures import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass
class Section:
    """A section of a report, with a title. summary: a line for the page's head. body: HTML. highlight: HTML of a
    picture that stands in the page's head, above the summary."""

    title: str
    summary: str
    body: str
    highlight: str = ""


Report = Callable[[Path], Section]
"""A function that a domain registers under `reports`: from the folder of a finished run to a section."""


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], alike: Literal["columns", "rows"] = "columns"
) -> str:
    """An HTML table in a box that it scrolls in; cells are escaped, numbers right-aligned.

    alike: what holds numbers of one quantity, which get the same number of decimals. A column of theirs is headed on
    the right.
    """
    groups = rows if alike == "rows" else [[row[i] for row in rows if i < len(row)] for i in range(len(header))]
    places = [decimals(value for value in group if isinstance(value, float)) for group in groups]

    def cell(value: object, group: int, tag: str = "td") -> str:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        shown = number(value, places[group]) if numeric else str(value)  # type: ignore[arg-type]
        return f"<{tag}{_NUMBER if numeric else ''}>{html.escape(shown)}</{tag}>"

    numeric = [any(isinstance(row[i], int | float) for row in rows if i < len(row)) for i in range(len(header))]
    head = "".join(
        f"<th{_NUMBER if right else ''}>{html.escape(name)}</th>" for name, right in zip(header, numeric, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(cell(value, r if alike == "rows" else c) for c, value in enumerate(row)) + "</tr>"
        for r, row in enumerate(rows)
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


_NUMBER = ' class="number"'


def scrolling(inner: str) -> str:
    """HTML that may be wider than a phone's screen, in a box that it scrolls in."""
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def side_by_side(*parts: str) -> str:
    """Pieces beside each other where the screen is wide enough, else below each other."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def picture(figure: Figure | bytes, caption: str) -> str:
    """A matplotlib figure or PNG bytes, embedded. What `mambaseq.reporting.charts` draws goes to `drawing`."""
    data = figure if isinstance(figure, bytes) else png(figure)
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


def drawing(svg: str, caption: str = "") -> str:
    """A chart of `mambaseq.reporting.charts`, in the page's colours."""
    told = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{told}</figure>"


def audio_player(samples: np.ndarray, sample_rate: int, caption: str, above: str = "") -> str:
    """A player for samples `(length,)` float in [-1, 1], embedded as 16-bit wav. above: HTML, such as its picture."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype="PCM_16")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    told = html.escape(caption, quote=True)
    return (
        f"<figure>{above}<figcaption>{told}</figcaption>"
        f'<audio controls aria-label="{told}" src="data:audio/wav;base64,{encoded}"></audio></figure>'
    )
