"""One heartbeat in its context, as a model sees it."""

from __future__ import annotations

import dataclasses

import numpy as np

from mambaseq.errors import ConfigError
from mambaseq.limits import WINDOW, check_setting

RATE = 100  # samples a second
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Window:
    """What is read around a beat: `samples` of them, the last one `after` samples later than the beat.

    `patch` neighbouring samples enter the model at one position, so a window is `length` positions of `n_channels`.
    """

    samples: int
    after: int
    patch: int

    def __post_init__(self) -> None:
        check_setting("window", self.samples, 1, WINDOW.value)
        if self.patch < 1 or self.samples % self.patch or not 0 <= self.after < self.samples:
            raise ConfigError(
                f"window must be a positive multiple of patch, and after in [0, window): not window "
                f"{self.samples}, patch {self.patch}, after {self.after}."
            )

    @property
    def length(self) -> int:
        return self.samples // self.patch

    @property
    def n_channels(self) -> int:
        return CHANNELS * self.patch

    def read(
        self, signal: np.ndarray, beats: np.ndarray, beat: int, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """The window of `beats[beat]`, `(length, n_channels)` float32.

        Three channels, 0 outside of the record: the signal, z-scored over the window; the seconds since the last beat;
        the same in units of the window's median RR interval, so that a beat that comes early shows at any heart rate.
        signal: `(samples,)`, 100 Hz. beats: sample number of every beat of the record, ascending. rng: augment (see
        `_augment`), and play the record up to a fifth slower or faster; not at all if None.
        """
        tempo = 1.0 if rng is None else rng.uniform(0.8, 1.2)
        offsets = np.arange(self.after - self.samples + 1, self.after + 1)
        where = beats[beat] + tempo * offsets
        inside = (where >= 0) & (where <= len(signal) - 1)
        first, last = int(max(where[0], 0)), int(min(where[-1] + 2, len(signal)))
        values = np.interp(where, np.arange(first, last), signal[first:last])
        values = _standardised(values, inside)
        if rng is not None:
            values = _augment(values, inside, offsets, rng)
        times = (beats - beats[beat]) / tempo
        previous = np.searchsorted(times, offsets, side="right") - 1
        elapsed = np.where(inside & (previous >= 0), offsets - times[previous], 0) / RATE
        elapsed = np.minimum(elapsed, 3)  # a flutter has no beats for a long time
        seen = times[(times >= offsets[0]) & (times <= offsets[-1])]
        interval = np.median(np.diff(seen)) / RATE if len(seen) > 1 else 0.8
        window = np.stack([values, elapsed, elapsed / interval], axis=1)
        return window.reshape(self.length, self.n_channels).astype(np.float32)


def _standardised(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    kept = values[inside]
    return np.where(inside, (values - kept.mean()) / (kept.std() + 1e-3), 0)


def _augment(x: np.ndarray, inside: np.ndarray, offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another patient with the same rhythm, since QRS shapes differ more between patients than between beats: a random
    short filter, the same for all beats, and either polarity; then baseline wander (0.1 to 0.5 Hz), noise and gain."""
    kernel = rng.normal(scale=7**-0.5, size=7)
    kernel[3] += 1
    x = _standardised(np.convolve(x, kernel, mode="same"), inside)
    wander = np.sin(2 * np.pi * (rng.uniform(0.1, 0.5) * offsets / RATE + rng.uniform()))
    x = x * rng.choice([-1, 1]) + 0.2 * rng.uniform() * wander + 0.1 * rng.uniform() * rng.normal(size=len(x))
    return np.where(inside, x * rng.normal(1, 0.2), 0)
