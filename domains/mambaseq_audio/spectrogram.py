"""Pictures of sound: the waveform above its log spectrogram."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping

import matplotlib.image
import numpy as np
import torch
import torchaudio.transforms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mambaseq.reporting.charts import frame, text, ticks

WINDOW_SECONDS = 0.032
FLOOR_DB = 80.0


def log_spectrogram(signal: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in dB, `(frequencies, frames)` float32, at most 80 dB below its peak.

    Hann windows of about 32 ms (a power of two samples), a quarter of that apart; row k is the frequency
    `k * sample_rate / 2 / (frequencies - 1)`.
    """
    n_fft = 2 ** max(4, round(np.log2(WINDOW_SECONDS * sample_rate)))
    wave = torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32))
    if len(wave) < n_fft:  # the transform reflects at the ends and needs half a window
        wave = torch.nn.functional.pad(wave, (0, n_fft - len(wave)))
    power = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4)(wave)
    decibel: np.ndarray = torchaudio.transforms.AmplitudeToDB("power", top_db=FLOOR_DB)(power).numpy()
    return decibel


def draw(signals: Mapping[str, np.ndarray], sample_rate: int) -> bytes:
    """A PNG of waveforms above their spectrograms, one column for each title; signals are `(length,)` float.

    All share one scale of amplitude and one of time, so that they can be compared.
    """
    seconds = max(len(signal) for signal in signals.values()) / sample_rate
    peak = max(float(np.abs(signal).max(initial=0.0)) for signal in signals.values()) or 1.0
    figure = Figure(figsize=(max(3.2, 2.4 * len(signals)), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(signals), sharex=True, sharey="row", squeeze=False, height_ratios=(1, 2))
    for column, (title, signal) in enumerate(signals.items()):
        wave, image = axes[:, column]
        wave.plot(np.arange(len(signal)) / sample_rate, signal, linewidth=0.4, color="#22577a")
        wave.set(title=title, ylim=(-1.05 * peak, 1.05 * peak), xlim=(0, seconds))
        image.imshow(
            log_spectrogram(signal, sample_rate),
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(0, len(signal) / sample_rate, 0, sample_rate / 2000),
        )
        image.set(xlabel="s", xlim=(0, seconds), facecolor="black")
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("kHz")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def sketch(signal: np.ndarray, sample_rate: int, seconds: float, peak: float, told: str) -> str:
    """The waveform above its spectrogram as an SVG text in the page's colours, of a signal `(length,)` float.

    seconds, peak: the width and the waveform's height in units; equal in pictures to compare. told: a description in
        words.
    """
    wide, tall, left, wave = 320.0, 200.0, 30.0, 44.0
    width = wide - left - 4
    share = min(len(signal) / sample_rate / seconds, 1.0)
    edges = np.linspace(0, len(signal), 200 + 1).astype(int)
    heights = [np.abs(signal[a:b]).max(initial=0.0) / (peak or 1.0) for a, b in itertools.pairwise(edges)]
    xs = left + (np.arange(200) + 0.5) / 200 * width * share
    ends = [(x, 0.5 * wave * min(float(h), 1.0)) for x, h in zip(xs, heights, strict=True)]
    upper = "L".join(f"{x:.1f} {wave / 2 + 2 - h:.1f}" for x, h in ends)
    lower = "L".join(f"{x:.1f} {wave / 2 + 2 + h:.1f}" for x, h in reversed(ends))
    decibel = log_spectrogram(signal, sample_rate)
    buffer = io.BytesIO()
    levels = (decibel[::-1] - decibel.max()) / FLOOR_DB + 1
    matplotlib.image.imsave(buffer, levels, vmin=0, vmax=1, cmap="magma", format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    top, bottom = wave + 8, tall - 18
    parts = [
        f'<path class="c0 area" d="M{upper}L{lower}Z"/>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{bottom - top}" rx="3"/>',
        f'<image x="{left}" y="{top}" width="{width * share:.1f}" height="{bottom - top}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{encoded}"/>',
        text(left - 5, top + 9, f"{sample_rate / 2000:g}", "end"),
        text(left - 5, bottom, "kHz", "end"),
    ]
    for second in ticks(0, seconds, 3):
        place = left + second / seconds * width
        words = f"{second:g}" if second + 0.1 * seconds < seconds else ""
        parts.append(text(place, tall - 5, words, "middle"))
    parts.append(text(left + width, tall - 5, "s", "end"))
    return frame(wide, tall, told, "".join(parts))
