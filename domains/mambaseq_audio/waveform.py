"""Long recordings, in windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambaseq.data.module import SequenceData
from mambaseq.data.store import TokenStore
from mambaseq.data.windows import Group, Interval, RandomWindows, next_token
from mambaseq.errors import ConfigError, DataError
from mambaseq.limits import EPOCH, SEEDS, WINDOW, check_setting
from mambaseq_audio.io import Channels, audio_files, check_rate
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.stores import checksums, sound_store
from mambaseq_audio.tiles import Tiles


class WaveformData(SequenceData):
    """Long recordings as 8-bit samples to be predicted one by one: random windows in training; validation and test cut
    their part of every recording into pieces, so that each of its samples but the first is predicted once.

    Every recording is split by time: training first, then validation, then test.

    Args:
        files: a folder of sound files, a pattern (`*`, `?`), a resource, or a list of them.
        length: samples a window.
        validation_fraction: share of every recording's time for validation, just before the test's.
        test_fraction: share of every recording's time for the test, at its end.
        epoch_size: windows that count as one epoch of training.
        sample_rate: samples a second.
        resample: convert files of another rate; false refuses them.
        channels: several channels are averaged (`mean`), or the file is refused (`refuse`).
        seed: of the places of windows in training.
    """

    reader, writer = "audio/audio", "audio/wav"
    tokenizer_name = "audio/mulaw"
    vocab_size = MuLaw.vocab_size
    start_ids = (MuLaw.start_id,)

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        length: int = 16384,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        epoch_size: int = 1000,
        sample_rate: int = 16000,
        resample: bool = True,
        channels: Channels = "mean",
        seed: int = 0,
    ) -> None:
        self.files = [files] if isinstance(files, str) else list(files)
        self.length, self.epoch_size, self.seed = length, epoch_size, seed
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.sample_rate, self.resample, self.channels = sample_rate, resample, channels
        self.tokenizer = MuLaw()
        self._splits: dict[str, list[Interval]] | None = None

    def setup(self) -> None:
        if self._splits is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.epoch_size", self.epoch_size, *EPOCH)
        check_setting("data.seed", self.seed, *SEEDS)
        check_rate(self.sample_rate, "data.sample_rate")
        shares = (self.validation_fraction, self.test_fraction)
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise ConfigError(
                f"data.validation_fraction ({self.validation_fraction}) and data.test_fraction "
                f"({self.test_fraction}) are shares of every recording; together they must leave some of it "
                f"for training."
            )
        self._paths = paths = list(dict.fromkeys(path for name in self.files for path in audio_files(name)))
        if not paths:
            raise ConfigError("data.files names nothing. Give a folder, a pattern, or a list of them.")
        self._store = store = sound_store(
            "waveform", paths, self.sample_rate, resample=self.resample, channels=self.channels
        )
        self._refuse_copies(store)
        splits: dict[str, list[Interval]] = {"train": [], "validation": [], "test": []}
        for record, n in enumerate(store.lengths.tolist()):
            test = n - round(self.test_fraction * n)
            validation = test - round(self.validation_fraction * n)
            for split, start, stop in (
                ("train", 0, validation),
                ("validation", validation, test),
                ("test", test, n),
            ):
                if stop - start > 1:
                    splits[split].append(Interval(store, record, start, stop))
        self._splits = splits

    def _refuse_copies(self, store: TokenStore) -> None:
        """Refuse copies: a recording that is there twice would count twice in every result, whatever the files are
        called."""
        first: dict[tuple[int, int], Path] = {}
        for path, length, content in zip(
            self._paths, store.lengths.tolist(), store.checksums[:, 0].tolist(), strict=True
        ):
            if (other := first.setdefault((length, content), path)) != path:
                raise DataError(f"{path} is a copy of {other}: the same samples. Remove one, or narrow data.files.")

    def sources(self) -> dict[str, str]:
        """sha256 of each recording's file."""
        self.setup()
        return checksums(self._paths, self._store)

    def intervals(self, split: str) -> list[Interval]:
        """The parts of recordings in `"train"`, `"validation"` or `"test"`."""
        self.setup()
        assert self._splits is not None
        return self._splits[split]

    def train(self) -> RandomWindows:
        group = Group("recordings", self.intervals("train"))
        return RandomWindows(
            [group], self.length + 1, next_token, size=self.epoch_size, seed=self.seed, by_position=True
        )

    def _tiles(self, split: str) -> Tiles | None:
        intervals = self.intervals(split)
        return Tiles(intervals, self.length) if intervals else None

    def validation(self) -> Tiles | None:
        return self._tiles("validation")

    def test(self) -> Tiles | None:
        return self._tiles("test")

    def reader_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate, "resample": self.resample, "channels": self.channels}

    def writer_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate}
