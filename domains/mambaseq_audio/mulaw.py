"""The base of codecs of samples, and the 8-bit mu-law codec of ITU-T G.711, as tokens.

PyTorch is imported where it computes, so that commands that only ask what sound is written as need not wait for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mambaseq.data.store import smallest_dtype
from mambaseq.data.tokenizer import Tokenizer

LEVELS = 256


class Codec(Tokenizer):
    """A token for each sample, which depends on that sample alone.

    name: the registered one. start_id: the level of silence, from which generation starts, and which precedes the first
        sample of a clip in training.
    """

    name: str
    start_id: int

    @property
    def dtype(self) -> str:
        """The type that levels are kept in."""
        return smallest_dtype(self.vocab_size)

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """Levels as int64. Raises ValueError for those outside of `[0, vocab_size)`."""
        levels = np.asarray(ids).astype(np.int64)
        if levels.size and not (levels.min() >= 0 and levels.max() < self.vocab_size):
            raise ValueError(
                f"{self.name} levels are in [0, {self.vocab_size}), not in [{levels.min()}, {levels.max()}]."
            )
        return levels


class MuLaw(Codec):
    """A waveform to 256 levels and back: round((sign(x) · ln(1 + 255·|x|) / ln 256 + 1) / 2 · 255).

    The scale is fixed: full scale is [-1, 1], as in the file's samples, and values outside are clipped. A clip's
    contents do not change the scale, so bits a sample do not depend on where a recording is cut.

    start_id: the level of silence (amplitude 0), from which generation starts, and which precedes the first sample of a
        clip in training.
    """

    name = "audio/mulaw"
    vocab_size = LEVELS
    start_id = 128

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Levels of a waveform: `(length,)` float in [-1, 1] to `(length,)` uint8."""
        import torch
        import torchaudio.functional

        signal = torch.from_numpy(np.ascontiguousarray(raw, dtype=np.float32)).clamp(-1.0, 1.0)
        levels: np.ndarray = torchaudio.functional.mu_law_encoding(signal, LEVELS).to(torch.uint8).numpy()
        return levels

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """The waveform of levels: `(length,)` ids to `(length,)` float32 in [-1, 1].

        Raises ValueError for ids outside of [0, 256).
        """
        import torch
        import torchaudio.functional

        levels = torch.from_numpy(self.checked(ids))
        signal: np.ndarray = torchaudio.functional.mu_law_decoding(levels, LEVELS).numpy()
        return signal
