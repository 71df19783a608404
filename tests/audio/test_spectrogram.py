from __future__ import annotations

import numpy as np
import pytest
from mambaseq_audio.spectrogram import FLOOR_DB, draw, log_spectrogram


def test_a_tone_peaks_at_its_frequency() -> None:
    for rate, frequency in ((8000, 1000), (16000, 3000)):
        signal = np.sin(2 * np.pi * frequency * np.arange(rate) / rate)
        decibel = log_spectrogram(signal, rate)
        rows = len(decibel)
        assert decibel.mean(axis=1).argmax() == round(frequency / (rate / 2) * (rows - 1))
        assert decibel.max() - decibel.min() <= FLOOR_DB + 1e-3


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_any_length_is_drawn(length: int) -> None:
    png = draw({"one": np.zeros(length, np.float32), "other": np.ones(length, np.float32)}, 8000)
    assert png.startswith(b"\x89PNG")
