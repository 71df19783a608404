"""What is odd about recordings that can be read: clipped, silent, or channels that cancel."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

_CLIPPED = 1e-3  # the share of a file's samples at full scale from which it counts as clipped
_CANCELLED = 0.1  # of the power that channels keep when they have nothing in common
_FULL = 0.9999
_FULL_8_BITS = 0.992  # 127 of 128


class Heard:
    """One recording as it is read."""

    def __init__(self, path: Path, subtype: str) -> None:
        """subtype: libsndfile's name of how samples are stored."""
        self.path, self.floats = str(path), subtype in ("FLOAT", "DOUBLE")
        self.full = _FULL_8_BITS if subtype in ("PCM_U8", "PCM_S8") else _FULL
        self.values = self.loud = self.channels = 0
        self.peak = self.power = self.mixed_power = 0.0

    def add(self, samples: np.ndarray, mixed: np.ndarray) -> None:
        """samples: `(length, channels)` as they are in the file. mixed: `(length, 1)`, their mean; or what is read."""
        size = np.abs(samples)
        self.values, self.channels = self.values + samples.size, samples.shape[1]
        self.loud += int(np.count_nonzero(size > 1 if self.floats else size >= self.full))
        self.peak = max(self.peak, float(size.max(initial=0.0)))
        if self.channels > 1:
            self.power += float(np.square(samples, dtype=np.float64).mean(axis=1).sum())
            self.mixed_power += float(np.square(mixed, dtype=np.float64).mean(axis=1).sum())


class Notices:
    """Collects what is odd, from any thread, to say it in one line a kind.

    generated: of clips that a model has made, not of recordings.
    """

    def __init__(self, generated: bool = False) -> None:
        self._lock, self._generated = threading.Lock(), generated
        self.beyond: Counter[str] = Counter()
        self.peaks: dict[str, float] = {}
        self.clipped: dict[str, float] = {}
        self.silent: list[str] = []
        self.cancelled: dict[str, float] = {}
        self._rates: dict[str, tuple[int, int]] = {}

    def resampled(self, recording: str, rate: int, wanted: int) -> None:
        """Note that a recording is brought from one rate to another, in samples a second."""
        with self._lock:
            self._rates[recording] = (rate, wanted)

    def tell_rates(self) -> None:
        """Log a line for each rate from which data are resampled, of data whose rate is a setting."""
        for (rate, wanted), count in sorted(Counter(self._rates.values()).items()):
            logger.warning(
                "%s at %s Hz %s resampled to %s Hz (data.sample_rate).",
                f"{count:,} recording{'s' if count > 1 else ''}",
                f"{rate:,}",
                "are" if count > 1 else "is",
                f"{wanted:,}",
            )

    def add(self, heard: Heard) -> None:
        """Count a recording that was read to its end."""
        with self._lock:
            if heard.floats and heard.loud:
                self.beyond[heard.path] += heard.loud
                self.peaks[heard.path] = max(self.peaks.get(heard.path, 1.0), heard.peak)
            elif not heard.floats and heard.loud >= _CLIPPED * heard.values > 0:
                self.clipped[heard.path] = heard.loud / heard.values
            if heard.peak == 0:
                self.silent.append(heard.path)
            elif heard.channels > 1 and heard.mixed_power * heard.channels < _CANCELLED * heard.power:
                share = max(heard.mixed_power / heard.power, 1e-12)
                self.cancelled[heard.path] = -10 * math.log10(share)

    def tell(self) -> None:
        """Log a line for each kind that there is."""
        if self.beyond:
            path, count = self.beyond.most_common(1)[0]
            logger.warning(
                "Float files with samples beyond full scale, which are clipped: %s (%s samples of %s; its peak is "
                "%.3g). Lower their volume if this is not intended.",
                f"{len(self.beyond):,}",
                f"{count:,}",
                path,
                self.peaks[path],
            )
        if self.clipped:
            path, share = max(self.clipped.items(), key=lambda item: item[1])
            what, remedy = "Files that were clipped when they were recorded", "Nothing can restore them"
            if self._generated:
                what, remedy = "Generated clips that reach full scale", "The model makes them so"
            logger.warning(
                "%s: %s (%.2g%% of the samples of %s are at full scale). %s; leave them out if this is not intended.",
                what,
                f"{len(self.clipped):,}",
                100 * share,
                path,
                remedy,
            )
        if self.silent:
            logger.warning(
                "%s that are silent from beginning to end: %s (such as %s). Leave them out if this is not intended.",
                "Generated clips" if self._generated else "Files",
                f"{len(self.silent):,}",
                min(self.silent),
            )
        if self.cancelled:
            path, decibel = max(self.cancelled.items(), key=lambda item: item[1])
            logger.warning(
                "Files whose channels are of opposite phase and cancel in their mean: %s (%s loses %.0f dB). Set "
                "channels: left, right or each.",
                f"{len(self.cancelled):,}",
                path,
                decibel,
            )
