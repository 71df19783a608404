"""Clips to be heard beside each other: a row of players for each condition, each with a picture to click at.

What `grid` gives goes into a page of `mambaseq.reporting`; it needs no network. One player plays at a time, all of it
can be done by keys, and the names of columns can be hidden, as listening tests want it. Without JavaScript each clip
has the browser's own player.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np

from mambaseq_audio.io import encode_wav
from mambaseq_audio.spectrogram import FLOOR_DB, log_spectrogram

FORMAT = "flac"  # 16 bits without loss, which all browsers play: what is compared by ear must not be the codec
_COLUMNS, _ROWS, _WAVE, _SHADES = 160, 56, 20, 24  # of a picture's dots, and of its colours


class Clip(NamedTuple):
    """What is heard in a cell. sound: its file's bytes, or a link relative to the page. picture: bytes of a PNG.
    seconds: its length. wide: the share of the picture's width that it takes."""

    sound: bytes | str
    picture: bytes
    seconds: float
    wide: float = 1.0


Row = tuple[str, Mapping[str, Clip | str]]
"""A title, and what each column has: a clip, or a text that says why there is none."""


def clip(signal: np.ndarray, sample_rate: int, seconds: float, peak: float, link: str = "") -> Clip:
    """A clip of a signal `(length,)` or `(length, 2)` float in [-1, 1].

    seconds, peak: the width of its picture and the height of its waveform; equal in pictures to compare. link: of its
        file, relative to the page; "" embeds it.
    """
    sound: bytes | str = link or encode_wav(signal, sample_rate, FORMAT)
    own = len(signal) / sample_rate
    return Clip(sound, thumbnail(signal, sample_rate, seconds, peak), own, min(own / seconds, 1.0))


def scales(signals: Sequence[np.ndarray], sample_rate: int) -> tuple[float, float]:
    """The length in seconds and the peak of the longest and the loudest of waveforms `(samples,)`, at least a sample
    and 1/100."""
    longest = max((len(one) for one in signals), default=1)
    loudest = max((float(np.abs(one).max(initial=0.0)) for one in signals), default=0.0)
    return max(longest, 1) / sample_rate, max(loudest, 0.01)


def thumbnail(signal: np.ndarray, sample_rate: int, seconds: float, peak: float) -> bytes:
    """A small PNG of a few kilobytes, however long the signal is: its waveform above its log spectrogram."""
    mono = signal if signal.ndim == 1 else signal.mean(1)
    mono = np.ascontiguousarray(mono, dtype=np.float32)
    columns = int(np.clip(round(_COLUMNS * len(mono) / sample_rate / seconds), 1, _COLUMNS))
    decibel = log_spectrogram(mono, sample_rate)
    picture = np.zeros((_WAVE + _ROWS, _COLUMNS))
    levels = np.clip((_reduced(decibel, columns) - decibel.max()) / FLOOR_DB + 1, 0, 1)
    picture[_WAVE:, :columns] = levels[::-1]
    edges = np.linspace(0, len(mono), columns + 1).astype(int)
    heights = np.array([np.abs(mono[a : max(b, a + 1)]).max(initial=0.0) for a, b in itertools.pairwise(edges)])
    distance = np.abs(np.arange(_WAVE) - (_WAVE - 1) / 2)[:, None]
    picture[:_WAVE, :columns] = 0.75 * (distance <= np.minimum(heights / peak, 1)[None] * (_WAVE - 2) / 2)
    buffer = io.BytesIO()
    shades = np.round(picture * (_SHADES - 1)) / (_SHADES - 1)  # few colours pack well
    matplotlib.image.imsave(buffer, shades, vmin=0, vmax=1, cmap="magma", format="png")
    return buffer.getvalue()


def _reduced(decibel: np.ndarray, columns: int) -> np.ndarray:
    """The loudest of each block of a spectrogram, `(_ROWS, columns)`."""
    for axis, wanted in ((0, _ROWS), (1, columns)):
        have = decibel.shape[axis]
        if have > wanted:
            decibel = np.maximum.reduceat(decibel, np.linspace(0, have, wanted + 1).astype(int)[:-1], axis=axis)
        else:
            decibel = np.take(decibel, np.linspace(0, have - 1, wanted).round().astype(int), axis=axis)
    return decibel


def grid(rows: Sequence[Row], columns: Sequence[str], *, blind: bool = False, name: str = "clips") -> str:
    """HTML of rows of clips, one below the other on a narrow screen.

    blind: begin with the names of columns hidden, and their order in each row drawn by lot. name: what a screen reader
        calls the whole.
    """
    body = "".join(_row(title, cells, columns) for title, cells in rows)
    pressed = ' data-blind="1"' if blind else ""
    return (
        f'<div class="listen"{pressed} role="region" aria-label="{html.escape(name, quote=True)}">'
        f'<div class="controls"><button type="button" class="hide">Hide the names</button>'
        f'<span class="told" role="status"></span><details class="keys"><summary>Keys</summary>'
        "<p><kbd>Tab</kbd> and the arrows move, <kbd>Space</kbd> plays and stops, <kbd>1</kbd> to <kbd>9</kbd> play a "
        "clip of the row, <kbd>A</kbd> plays the whole row, <kbd>Esc</kbd> stops, <kbd>B</kbd> hides or shows the "
        "names, <kbd>V</kbd> votes for a clip while they are hidden.</p></details></div>"
        f"{body}</div><style>{_beside('players.css')}</style><script>{_beside('players.js')}</script>"
    )


def _row(title: str, cells: Mapping[str, Clip | str], columns: Sequence[str]) -> str:
    told = html.escape(title, quote=True)
    inner = "".join(_cell(title, column, cells.get(column, "")) for column in columns)
    return (
        f'<div class="heard" role="group" aria-label="{told}"><h3>{told} <button type="button" class="all">play all'
        f'</button></h3><div class="cells" style="--n: {len(columns)}">{inner}</div></div>'
    )


def _cell(title: str, column: str, cell: Clip | str) -> str:
    name = html.escape(column, quote=True)
    if isinstance(cell, str):
        told = f"<p>{html.escape(cell)}</p><figcaption>{name}</figcaption>"
        return (
            f'<figure class="clip none" data-name="{name}" data-row="{html.escape(title, quote=True)}">{told}</figure>'
        )
    sound = html.escape(cell.sound, quote=True) if isinstance(cell.sound, str) else _data(cell.sound, f"audio/{FORMAT}")
    row, picture = html.escape(title, quote=True), _data(cell.picture, "image/png")
    return (
        f'<figure class="clip" data-name="{name}" data-row="{row}" data-wide="{cell.wide:.3f}">'
        f'<button type="button" class="play" aria-label="{row}, {name}"><img alt="" src="{picture}"><i></i></button>'
        f'<audio controls preload="none" aria-label="{row}, {name}" src="{sound}"></audio>'
        f"<figcaption><span>{name}</span> <small>{cell.seconds:.1f} s</small>"
        f'<button type="button" class="vote">best</button></figcaption></figure>'
    )


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
