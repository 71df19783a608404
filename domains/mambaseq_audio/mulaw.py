"""The 8-bit mu-law codec of ITU-T G.711, as tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchaudio.functional

from mambaseq.data.tokenizer import Tokenizer

LEVELS = 256


class MuLaw(Tokenizer):
    """A waveform to 256 levels and back: round((sign(x) · ln(1 + 255·|x|) / ln 256 + 1) / 2 · 255).

    The scale is fixed: full scale is [-1, 1], as in the file's samples, and values outside are clipped. A clip's
    contents do not change the scale, so bits a sample do not depend on where a recording is cut.

    start_id: the level of silence (amplitude 0), from which generation starts, and which precedes the first sample of a
        clip in training.
    """

    vocab_size = LEVELS
    start_id = 128

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Levels of a waveform: `(length,)` float in [-1, 1] to `(length,)` uint8."""
        signal = torch.from_numpy(np.ascontiguousarray(raw, dtype=np.float32)).clamp(-1.0, 1.0)
        levels: np.ndarray = torchaudio.functional.mu_law_encoding(signal, LEVELS).to(torch.uint8).numpy()
        return levels

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """The waveform of levels: `(length,)` ids to `(length,)` float32 in [-1, 1].

        Raises ValueError for ids outside of [0, 256).
        """
        levels = np.asarray(ids).astype(np.int64)
        if levels.size and not (levels.min() >= 0 and levels.max() < LEVELS):
            raise ValueError(f"mu-law levels are in [0, {LEVELS}), not in [{levels.min()}, {levels.max()}].")
        signal: np.ndarray = torchaudio.functional.mu_law_decoding(torch.from_numpy(levels), LEVELS).numpy()
        return signal
