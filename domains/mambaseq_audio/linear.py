"""Samples as whole numbers in even steps, and the choice of a codec."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from mambaseq.errors import ConfigError, shown
from mambaseq.limits import check_choice
from mambaseq_audio.mulaw import Codec, MuLaw

Samples = Literal["mulaw", "linear8", "linear16"]
"""How a sample is written as a token: 8 bits by mu-law, or 8 or 16 bits in even steps."""
CHOICES: tuple[str, ...] = get_args(Samples)


class Linear(Codec):
    """A waveform to 2^bits levels and back: round(x · 2^(bits - 1)) + 2^(bits - 1), as integer formats of wav. Values
    outside [-1, 1) are clipped. With 16 bits the samples of 16-bit files are kept exactly.

    start_id: the level of silence.

    Args:
        bits: 8 or 16.
    """

    name = "audio/linear"

    def __init__(self, bits: int = 16) -> None:
        if bits not in (8, 16):
            raise ConfigError(f"Linear samples have 8 or 16 bits, not {shown(bits)}.")
        self.bits, self.vocab_size, self.start_id = bits, 2**bits, 2 ** (bits - 1)

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits}

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Levels of a waveform: `(length,)` float to `(length,)` uint8 or uint16."""
        levels = np.rint(np.asarray(raw, dtype=np.float32) * np.float32(self.start_id)) + self.start_id
        return levels.clip(0, self.vocab_size - 1).astype(self.dtype)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """The waveform of levels: `(length,)` ids to `(length,)` float32 in [-1, 1), exact.

        Raises ValueError for ids outside of the levels.
        """
        return ((self.checked(ids) - self.start_id) / self.start_id).astype(np.float32)


def codec_of(samples: str, key: str = "data.samples") -> Codec:
    """The codec of a setting. Raises ConfigError for an unknown one."""
    check_choice(key, samples, CHOICES)
    return MuLaw() if samples == "mulaw" else Linear(int(samples.removeprefix("linear")))
