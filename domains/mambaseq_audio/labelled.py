"""Short clips with a label each, from their file names: what a classifier of sounds learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.windows import Interval
from mambaseq.errors import ConfigError
from mambaseq_audio.clips import DIGITS, ClipData
from mambaseq_audio.io import Channels
from mambaseq_audio.mulaw import MuLaw


def middle(levels: np.ndarray, length: int) -> np.ndarray:
    """At most `length` samples, from the middle of a longer clip `(samples,)`."""
    start = max(0, (len(levels) - length) // 2)
    return levels[start : start + length]


def item(levels: np.ndarray, label: int) -> Batch:
    """A clip of `(length,)` levels and its label."""
    inputs = torch.from_numpy(levels.astype(np.int64))[None]
    return Batch(inputs=inputs, targets=torch.tensor([label]), target_of="sequence")


class WholeClips:
    """Clips as they are, from the middle where they are longer than `length`."""

    def __init__(self, clips: Sequence[Interval], labels: Sequence[int], length: int) -> None:
        self.clips, self.labels, self.length = clips, labels, length

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Batch:
        clip = self.clips[index]
        return item(middle(clip.read(clip.start, len(clip)), self.length), self.labels[index])


class VariedClips(WholeClips):
    """Endless training set: item i depends only on (seed, i). Each clip comes once in `len(clips)` items, in a new
    random order each time, faster or slower and louder or softer."""

    endless = True

    def __init__(
        self, clips: Sequence[Interval], labels: Sequence[int], length: int, speed: float, gain: float, seed: int
    ) -> None:
        super().__init__(clips, labels, length)
        self.speed, self.gain, self.seed, self.codec = speed, gain, seed, MuLaw()
        self._last: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if self._last[0] != epoch:
            self._last = epoch, np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.clips))
        return self._last[1]

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, len(self.clips))
        which = int(self._order(epoch)[position])
        clip = self.clips[which]
        levels = clip.read(clip.start, len(clip))
        fast, loud, place = np.random.default_rng((self.seed, index, 1)).uniform(-1, 1, 3)
        if self.speed or self.gain:
            signal = self.codec.decode(levels)
            steps = np.arange(0, len(signal) - 0.5, 1 + self.speed * fast)
            signal = np.interp(steps, np.arange(len(signal)), signal) * 10 ** (self.gain * loud / 20)
            levels = self.codec.encode(signal)
        start = round((place + 1) / 2 * max(0, len(levels) - self.length))
        return item(levels[start : start + self.length], self.labels[which])


class LabelledClips(ClipData):
    """Short clips in 8-bit mu-law levels, each with a label from its file name: for classifiers.

    What is a clip's label, and which set it is in, is read from its name as in `audio/clips`. Generated clips that are
    scored by a classifier go through the same mu-law levels, so that rounding tells nothing.

    Args:
        files: a folder of sound files, a pattern (`*`, `?`, `**`), a resource, a manifest, or a list (see
            `audio/clips`); the default is the spoken digits that ship.
        pattern: a regular expression with named groups, searched in each file's name without folder and suffix. A
            manifest's columns are groups too, and need no pattern; the default is that of the digits' names.
        label: the group that is to be recognised.
        split: the group that decides which set a clip is in; the default is `take`, and `split` with a manifest. Files
            of your own for which neither this nor `validation`, `test` or the column `split` says anything are drawn.
        validation: values of that group for the validation set, such as `0-4` or `theo,lucas`, or a list of them where
            they hold commas; `""` for none. All values that neither set takes are for training. The default is that of
            the digits, and `validation` (`valid`, `val` and `dev` too) of a manifest's column `split`.
        test: the same for the test set.
        validation_list: a text file that names the validation clips, one a line (the end of its path); it replaces
            `validation`. Not used when left out.
        test_list: the same for the test set.
        validation_fraction: share of the files that is drawn for the validation set, by `seed`, where nothing else
            gives one; a tenth where nothing gives any set.
        test_fraction: the same for the test set.
        length: samples of the longest sequence. Of a longer clip a random part is used in training, otherwise the
            middle.
        speed: in training, clips are played faster or slower by up to this share, which changes the pitch too.
        gain: in training, clips are made louder or softer by up to so many dB.
        sample_rate: samples a second.
        resample: convert files of another rate; false refuses them.
        channels: of files with several: their mean (`mean`), the first or second one (`left`, `right`), each as a clip
            (`each`), both in turn (`stereo`), or an error (`refuse`).
        skip_bad: leave out recordings that cannot be used, and list them; false lists them in an error.
        seed: of the order of clips and of their changes in training.
    """

    task: Literal["classes"] = "classes"
    writer = None
    condition_setting = "data.label"

    def __init__(
        self,
        *,
        files: str | Sequence[str] = DIGITS,
        pattern: str | None = None,
        label: str = "digit",
        split: str | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_list: str | None = None,
        test_list: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
        length: int = 16384,
        speed: float = 0.0,
        gain: float = 0.0,
        sample_rate: int = 8000,
        resample: bool = True,
        channels: Channels = "mean",
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            files=files,
            pattern=pattern,
            condition=(label,),
            split=split,
            validation=validation,
            test=test,
            validation_list=validation_list,
            test_list=test_list,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            length=length,
            sample_rate=sample_rate,
            resample=resample,
            channels=channels,
            skip_bad=skip_bad,
            seed=seed,
        )
        self.label, self.speed, self.gain = label, speed, gain

    def setup(self) -> None:
        if not (0 <= self.speed <= 0.5 and 0 <= self.gain <= 60):
            raise ConfigError(
                f"data.speed must be from 0 to 0.5 and data.gain from 0 to 60 dB, not {self.speed} and {self.gain}."
            )
        super().setup()
        if self.condition_names:  # they are what is asked, not what is given
            self.class_names = tuple(self.condition_names)
            self.condition_names, self.conditions, self.n_conditions = (), (), 0

    def _labelled(self, split: str) -> tuple[list[Interval], list[int]]:
        clips, labels = self._members(split)
        assert labels is not None
        return clips, labels

    def train(self) -> VariedClips:  # type: ignore[override]
        return VariedClips(*self._labelled("train"), self.length, self.speed, self.gain, self.seed)

    def _whole(self, split: str) -> WholeClips | None:
        clips, labels = self._labelled(split)
        return WholeClips(clips, labels, self.length) if clips else None

    def validation(self) -> WholeClips | None:  # type: ignore[override]
        return self._whole("validation")

    def test(self) -> WholeClips | None:  # type: ignore[override]
        return self._whole("test")
