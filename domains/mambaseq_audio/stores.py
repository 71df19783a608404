"""Recordings decoded once: token stores of mu-law levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mambaseq.data.cache import fingerprint
from mambaseq.data.store import TokenStore
from mambaseq_audio.io import Channels, Clipped, signal_blocks
from mambaseq_audio.mulaw import MuLaw

RESAMPLER = "soxr HQ"
"""Levels depend on this version: another one makes another store."""


def sound_store(
    label: str, paths: Sequence[Path], sample_rate: int, *, resample: bool, channels: Channels
) -> TokenStore:
    """The store whose record i holds the levels of `paths[i]`, `(length,)` uint8, built at first use.

    See `mambaseq_audio.io.signal_blocks` for the settings and errors.
    """
    codec = MuLaw()
    meta = {
        "codec": "mulaw",
        "sample_rate": sample_rate,
        "resample": RESAMPLER if resample else False,
        "channels": channels,
        "sources": [fingerprint(path) for path in paths],
    }

    def records() -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        clipped = Clipped()
        for path in paths:
            blocks = signal_blocks(path, sample_rate, resample=resample, channels=channels, clipped=clipped)
            yield path.name, map(codec.encode, blocks)
        clipped.tell()

    return TokenStore.cached(label, records, "uint8", meta)


def checksums(paths: Sequence[Path], store: TokenStore) -> dict[str, str]:
    """The sha256 of each file behind a store of `sound_store`."""
    return {str(path): str(source["sha256"]) for path, source in zip(paths, store.meta["sources"], strict=True)}
