"""Pictures of sound: the waveform above its log spectrogram."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torchaudio.transforms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mambaseq.atomic import atomic_file

WINDOW_SECONDS = 0.032
FLOOR_DB = 80.0


def log_spectrogram(signal: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in dB, `(frequencies, frames)` float32, at most 80 dB below its peak.

    Hann windows of about 32 ms (a power of two), a quarter of that apart; row k is the frequency
    `k * sample_rate / 2 / (frequencies - 1)`.
    """
    n_fft = 2 ** max(4, round(np.log2(WINDOW_SECONDS * sample_rate)))
    wave = torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32))
    if len(wave) < n_fft:  # the transform reflects at the ends, which needs half a window
        wave = torch.nn.functional.pad(wave, (0, n_fft - len(wave)))
    power = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4)(wave)
    decibel: np.ndarray = torchaudio.transforms.AmplitudeToDB("power", top_db=FLOOR_DB)(power).numpy()
    return decibel


def draw(signals: Mapping[str, np.ndarray], sample_rate: int) -> bytes:
    """A PNG of waveforms above their spectrograms, a column for each title; signals are `(length,)` float.

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


def write_picture(path: str | Path, signals: Mapping[str, np.ndarray], sample_rate: int) -> None:
    """Write the picture of `draw` atomically. Raises UserError when the disk is full or not writable."""
    png = draw(signals, sample_rate)
    with atomic_file(path) as file:
        file.write(png)
