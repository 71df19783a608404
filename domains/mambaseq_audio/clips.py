"""Short clips, each one sequence, with a condition from its file name."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.batch import Batch
from mambaseq.data.cache import locate
from mambaseq.data.module import SequenceData
from mambaseq.data.store import TokenStore
from mambaseq.data.windows import Interval
from mambaseq.errors import ConfigError, DataError, did_you_mean, shown
from mambaseq.limits import SEEDS, WINDOW, check_setting
from mambaseq_audio.io import Channels, audio_files, check_rate
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.stores import checksums, sound_store
from mambaseq_audio.tiles import Tiles, next_sample

DIGITS = "mambaseq:data/fsdd/recordings/*.flac"


def composed(text: str) -> str:
    """Letters with accents as one character: macOS gives them as two in file names."""
    return unicodedata.normalize("NFC", text)


def selection_parts(selection: str | Sequence[str]) -> list[str]:
    """The values in a selection: the items of a list, or the parts of a string between commas."""
    parts = [part.strip() for part in selection.split(",")] if isinstance(selection, str) else selection
    return [composed(part) for part in parts if part]


def selector(selection: str | Sequence[str]) -> Callable[[str], bool]:
    """A function that tells which values a selection takes: `"theo,lucas"`, `"0-4,9"` or `["Smith, Ann", "0-4"]`, with
    names, numbers and ranges of numbers; `""` takes none.

    >>> [take for take in ("0", "03", "7", "9") if selector("0-4,9")(take)]
    ['0', '03', '9']
    """
    names, ranges = set(), []
    for part in selection_parts(selection):
        names.add(part)
        if bounds := re.fullmatch(r"(\d{1,300})(?:-(\d{1,300}))?", part):
            ranges.append((int(bounds[1]), int(bounds[2] or bounds[1])))
    return lambda value: (
        composed(value) in names or (value.isdecimal() and any(a <= int(value) <= b for a, b in ranges))
    )


class RandomClips:
    """Endless training set: item i depends only on (seed, i). Each clip comes once in `len(clips)` items, in a new
    random order each time; a clip longer than `length` is cropped at a random place."""

    endless = True

    def __init__(self, clips: Sequence[Interval], conditions: Sequence[int] | None, length: int, seed: int) -> None:
        self.clips, self.conditions, self.length, self.seed = clips, conditions, length, seed

    def __len__(self) -> int:
        return len(self.clips)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - the set lives as long as the run
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.clips))

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, len(self.clips))
        which = int(self._order(epoch)[position])
        clip = self.clips[which]
        length = min(self.length, len(clip))
        start = int(np.random.default_rng((self.seed, index, 1)).integers(len(clip) - length + 1))
        previous = int(clip.read(start - 1, 1)[0]) if start else MuLaw.start_id
        condition = None if self.conditions is None else self.conditions[which]
        return next_sample(previous, clip.read(start, length), condition)


class ClipData(SequenceData):
    """Short clips, each one sequence of 8-bit samples to be predicted one by one.

    The first sample is predicted from silence, so a model can start from a condition alone. Clips of a
    batch are padded on the right, masked and without targets there. Validation and test predict every sample
    of every clip once.

    Names are compared in Unicode's composed form (NFC), however a file system or an editor writes accents.

    Args:
        files: a folder of sound files, a pattern (`*`, `?`), or a resource; the default is the spoken digits that ship.
        pattern: a regular expression with named groups, searched in each file's name without folder and suffix.
        condition: the groups that a clip is generated from, such as `[digit]` or `[digit, speaker]`; none if empty.
        split: the group of the name that decides which set a clip is in.
        validation: values of that group for the validation set, such as `0-4` or `theo,lucas`, or a list of them where
            they hold commas; `""` for none. All values that neither set takes are for training.
        test: the same for the test set.
        validation_list: a text file that names the validation clips, one a line (the end of its path); it replaces
            `validation`. Not used when left out.
        test_list: the same for the test set.
        length: samples of the longest sequence. A longer clip is cropped at random in training, and cut into pieces in
            validation and test.
        sample_rate: samples a second.
        resample: convert files of another rate; false refuses them.
        channels: several channels are averaged (`mean`), or the file is refused (`refuse`).
        seed: of the order of clips and of the crops in training.
    """

    reader, writer = "audio/audio", "audio/wav"
    tokenizer_name = "audio/mulaw"
    vocab_size = MuLaw.vocab_size
    start_ids = (MuLaw.start_id,)

    def __init__(
        self,
        *,
        files: str = DIGITS,
        pattern: str = r"^(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)$",
        condition: Sequence[str] = ("digit",),
        split: str = "take",
        validation: str | Sequence[str] = "47-49",
        test: str | Sequence[str] = "0-4",
        validation_list: str | None = None,
        test_list: str | None = None,
        length: int = 8192,
        sample_rate: int = 8000,
        resample: bool = True,
        channels: Channels = "mean",
        seed: int = 0,
    ) -> None:
        self.files, self.pattern, self.condition = files, pattern, tuple(condition)
        self.split, self.selections = split, {"validation": validation, "test": test}
        self.lists = {"validation": validation_list, "test": test_list}
        self.length, self.sample_rate, self.resample, self.channels = length, sample_rate, resample, channels
        self.seed = seed
        self.tokenizer = MuLaw()
        self._splits: dict[str, list[int]] | None = None

    def setup(self) -> None:
        if self._splits is not None:
            return
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_setting("data.seed", self.seed, *SEEDS)
        check_rate(self.sample_rate, "data.sample_rate")
        self._paths = paths = audio_files(self.files)
        groups = self._groups(paths)
        splits = self._split(paths, groups)
        self._label(paths, groups, splits)
        store = sound_store("clips", paths, self.sample_rate, resample=self.resample, channels=self.channels)
        self._refuse_copies(paths, store, splits)
        self._clips = [Interval(store, i, 0, int(store.lengths[i])) for i in range(len(store))]
        self._splits = splits

    def sources(self) -> dict[str, str]:
        """sha256 of each sound file."""
        self.setup()
        return checksums(self._paths, self._clips[0].store)

    def _groups(self, paths: Sequence[Path]) -> list[dict[str, str]]:
        """The named groups of each file's name."""
        try:
            pattern = re.compile(composed(self.pattern))
        except re.error as error:
            raise ConfigError(f"data.pattern is not a regular expression ({error}): {shown(self.pattern)}.") from error
        wanted = {*self.condition} if all(self.lists.values()) else {*self.condition, self.split}
        for name in sorted(wanted - set(pattern.groupindex)):
            raise ConfigError(
                f"data.pattern has no group named {shown(name)}.{did_you_mean(name, pattern.groupindex)} It has: "
                f"{', '.join(pattern.groupindex) or 'none'}. Write (?P<{name}>...) in it, or change "
                f"data.condition and data.split."
            )
        found = []
        for path in paths:
            match = pattern.search(composed(path.stem))
            if match is None:
                raise DataError(
                    f"The name of {path} does not match data.pattern, {shown(self.pattern)}. Change the pattern, "
                    f"or narrow data.files so that it leaves this file out."
                )
            found.append(match.groupdict(default=""))
        return found

    def _split(self, paths: Sequence[Path], groups: Sequence[dict[str, str]]) -> dict[str, list[int]]:
        """Indices of the clips of each split; every clip is in exactly one."""
        splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        chosen: dict[str, set[int]] = {}
        for split, name in self.lists.items():
            if name is None:
                values = [group.get(self.split, "") for group in groups]
                self._check_selection(split, set(values))
                takes = selector(self.selections[split])
                chosen[split] = {i for i, value in enumerate(values) if takes(value)}
            else:
                chosen[split] = self._listed(paths, name)
        if both := chosen["validation"] & chosen["test"]:
            raise ConfigError(f"{paths[min(both)]} is chosen for both validation and test. Choose it for only one.")
        for i in range(len(paths)):
            split = next((split for split, members in chosen.items() if i in members), "train")
            splits[split].append(i)
        if not splits["train"]:
            raise DataError(f"No clip of {self.files} is left for training: all are chosen for validation or test.")
        return splits

    def _check_selection(self, split: str, values: set[str]) -> None:
        """Raise ConfigError for selected values that no clip has."""
        for part in selection_parts(self.selections[split]):
            if not any(map(selector([part]), values)):
                known = sorted(values)
                raise ConfigError(
                    f"data.{split} asks for {shown(part)}, but no clip has this "
                    f"{self.split}.{did_you_mean(part, known)} There are: "
                    f"{', '.join(known[:8])[:300]}{', ...' if len(known) > 8 else ''}. Correct it; data.{split}: '' "
                    "chooses none, and names with commas go into a list."
                )

    def _listed(self, paths: Sequence[Path], name: str) -> set[int]:
        names = [tuple(map(composed, path.parts)) for path in paths]
        by_name = defaultdict(list)
        for i, parts in enumerate(names):
            by_name[parts[-1]].append(i)
        members: set[int] = set()
        for file in locate(name):
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except (UnicodeDecodeError, OSError) as error:
                raise DataError(
                    f"{file} cannot be read as a list of clips: {error}. Write one name a line, in UTF-8."
                ) from error
            for number, line in enumerate(lines, start=1):
                if not (wanted := composed(line.strip())):
                    continue
                parts = Path(wanted).parts or (wanted,)
                hits = [i for i in by_name.get(parts[-1], ()) if names[i][-len(parts) :] == parts]
                if not hits:
                    raise DataError(
                        f"Line {number} of {file} names {shown(wanted, 200)}, which is not among the clips of "
                        f"{self.files}. Correct the line, or add the clip."
                    )
                members.update(hits)
        if not members:
            raise DataError(f"{name} names no clip. Write one name a line, or leave the list out.")
        return members

    def _label(self, paths: Sequence[Path], groups: Sequence[dict[str, str]], splits: dict[str, list[int]]) -> None:
        """Number the conditions. Raises for one that training never sees, which would mean nothing to the model."""
        self._conditions: list[int] | None = None
        if not self.condition:
            return
        values = [tuple(group[name] for name in self.condition) for group in groups]
        known = sorted(
            {values[i] for i in splits["train"]},
            key=lambda v: [(int(x) if x.isdecimal() else 0, x) for x in v],
        )
        numbers = {value: number for number, value in enumerate(known)}
        for i in (*splits["validation"], *splits["test"]):
            if values[i] not in numbers:
                raise DataError(
                    f"{paths[i]} has the condition {shown(' '.join(values[i]))}, which no training clip has. Add "
                    f"such clips, or change data.condition or the split."
                )
        self._conditions = [numbers.get(value, -1) for value in values]
        self.condition_names = [" ".join(value) for value in known]
        self.n_conditions = len(known)
        for name, count in Counter(self.condition_names).items():
            if count > 1:
                raise DataError(
                    f"{count} conditions of {self.files} are called {shown(name)}, since values are joined by blanks. "
                    "Change data.pattern so that values have no blanks, or rename the files."
                )

    def _refuse_copies(self, paths: Sequence[Path], store: TokenStore, splits: dict[str, list[int]]) -> None:
        """Compares stored samples, whatever the files are called and however they are packed."""
        first: dict[tuple[int, int], tuple[str, Path]] = {}
        for split, members in splits.items():
            for i in members:
                content = (int(store.lengths[i]), int(store.checksums[i, 0]))
                other, path = first.setdefault(content, (split, paths[i]))
                if other != split:
                    raise DataError(
                        f"{paths[i]} ({split}) is a copy of {path} ({other}): the same samples. Remove one, or put "
                        f"both into one split."
                    )

    def clips(self, split: str) -> list[np.ndarray]:
        """The whole clips of `"train"`, `"validation"` or `"test"`: `(length,)` uint8 levels."""
        self.setup()
        assert self._splits is not None
        return [clip.read(clip.start, len(clip)) for clip in self._members(split)[0]]

    def _members(self, split: str) -> tuple[list[Interval], list[int] | None]:
        assert self._splits is not None, "setup comes first"
        members = self._splits[split]
        conditions = None if self._conditions is None else [self._conditions[i] for i in members]
        return [self._clips[i] for i in members], conditions

    def train(self) -> RandomClips:
        return RandomClips(*self._members("train"), self.length, self.seed)

    def _tiles(self, split: str) -> Tiles | None:
        clips, conditions = self._members(split)
        return Tiles(clips, self.length, first=MuLaw.start_id, conditions=conditions) if clips else None

    def validation(self) -> Tiles | None:
        return self._tiles("validation")

    def test(self) -> Tiles | None:
        return self._tiles("test")

    def reader_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate, "resample": self.resample, "channels": self.channels}

    def writer_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate}
