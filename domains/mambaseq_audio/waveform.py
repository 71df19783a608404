"""Long recordings, in windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambaseq.data.module import SequenceData
from mambaseq.data.windows import Group, Interval, RandomWindows, next_token
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.limits import EPOCH, SEEDS, WINDOW, check_setting
from mambaseq_audio.clip_splits import SPLITS
from mambaseq_audio.io import Channels, check_channels, check_rate
from mambaseq_audio.linear import Samples, codec_of
from mambaseq_audio.recordings import Recording, all_recordings, names_of, overlap
from mambaseq_audio.stores import SoundStore, sound_store
from mambaseq_audio.tiles import Tiles


class WaveformData(SequenceData):
    """Long recordings as 8-bit samples to be predicted one by one: random windows in training; validation and test cut
    their part of every recording into pieces, so that each of its samples but the first is predicted once.

    Every recording is split by time: training first, then validation, then test; but one to which a manifest gives a
    split is in that as a whole.

    Args:
        files: a folder of sound files, a pattern (`*`, `?`, `**`), a resource, a manifest, or a list of them. A
            manifest is a table that ends in .csv, .tsv or .jsonl, with a column `file` and, if wanted, `split`, `start`
            and `end` (in seconds).
        length: samples a window.
        validation_fraction: share of every recording's time for validation, just before the test's.
        test_fraction: share of every recording's time for the test, at its end.
        epoch_size: windows that count as one epoch of training.
        sample_rate: samples a second.
        resample: convert files of another rate; false refuses them.
        samples: what a token is: a sample of 8 bits by mu-law (`mulaw`) or in even steps (`linear8`), or one of 16 bits
            (`linear16`, for the encoder and the head `levels`).
        channels: of files with several: their mean (`mean`), the first or second one (`left`, `right`), each as a
            recording (`each`), or an error (`refuse`).
        skip_bad: leave out recordings that cannot be used, and list them; false lists them in an error.
        seed: of the places of windows in training.
    """

    reader, writer = "audio/audio", "audio/wav"

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
        samples: Samples = "mulaw",
        channels: Channels = "mean",
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        self.files = names_of(files)
        self.length, self.epoch_size, self.seed = length, epoch_size, seed
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.sample_rate, self.resample, self.channels = sample_rate, resample, channels
        self.skip_bad = skip_bad
        self.tokenizer = self.codec = codec = codec_of(samples)
        self.tokenizer_name, self.vocab_size, self.start_ids = codec.name, codec.vocab_size, (codec.start_id,)
        self._splits: dict[str, list[Interval]] | None = None

    def setup(self) -> None:
        if self._splits is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.epoch_size", self.epoch_size, *EPOCH)
        check_setting("data.seed", self.seed, *SEEDS)
        check_rate(self.sample_rate, "data.sample_rate")
        check_channels(self.channels, "data.channels")
        if self.channels == "stereo":
            raise ConfigError(
                "data.channels: stereo is for audio/clips: windows of long recordings may begin with either channel. "
                "Set mean, left, right or each."
            )
        shares = (self.validation_fraction, self.test_fraction)
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise ConfigError(
                f"data.validation_fraction ({self.validation_fraction}) and data.test_fraction "
                f"({self.test_fraction}) are shares of every recording; together they must leave some of it "
                f"for training."
            )
        found = all_recordings(self.files)
        given = [self._given(one) for one in found]
        # those without a split are split one by one, so that what two of them share may be in two sets
        if pair := overlap(found, {i: split or f"row {i}" for i, split in enumerate(given)}):
            one, other = (found[i] for i in pair)
            raise DataError(
                f"{one} and {other} hold the same time, and would be in different splits. Give both rows one split, or "
                "other times."
            )
        self._sounds = sounds = sound_store(
            "waveform",
            found,
            self.sample_rate,
            resample=self.resample,
            channels=self.channels,
            skip_bad=self.skip_bad,
            codec=self.codec,
        )
        self._refuse_copies(sounds)
        splits: dict[str, list[Interval]] = {"train": [], "validation": [], "test": []}
        for one, record in zip(sounds.recordings, sounds.records, strict=True):
            n = int(sounds.store.lengths[record])
            if whole := self._given(one):
                splits[whole].append(Interval(sounds.store, record, 0, n))
                continue
            test = n - round(self.test_fraction * n)
            validation = test - round(self.validation_fraction * n)
            for split, start, stop in (
                ("train", 0, validation),
                ("validation", validation, test),
                ("test", test, n),
            ):
                if stop - start > 1:
                    splits[split].append(Interval(sounds.store, record, start, stop))
        self._splits = splits

    def _given(self, one: Recording) -> str | None:
        """The split that a manifest gives a recording; None if it gives none."""
        if not (value := one.fields.get("split", "")):
            return None
        for split, words in SPLITS.items():
            if value in words:
                return split
        raise DataError(f"{one}: the split is {shown(value)}. Write train, validation or test, or leave it empty.")

    def _refuse_copies(self, sounds: SoundStore) -> None:
        """Refuse copies: a recording that is there twice would count twice in every result, whatever the files are
        called."""
        first: dict[tuple[int, int], Recording] = {}
        lengths, checksums = sounds.store.lengths.tolist(), sounds.store.checksums[:, 0].tolist()
        for one, record in zip(sounds.recordings, sounds.records, strict=True):
            if (other := first.setdefault((lengths[record], checksums[record]), one)) is not one:
                raise DataError(f"{one} is a copy of {other}: the same samples. Remove one, or narrow data.files.")

    def sources(self) -> dict[str, str]:
        """sha256 of each recording's file."""
        self.setup()
        return self._sounds.sources()

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
