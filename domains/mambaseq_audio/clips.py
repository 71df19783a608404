"""Short clips, each one sequence, with conditions from its file name or a manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mambaseq.conditions import composed, of_names, of_numbers, rows, single
from mambaseq.data.module import SequenceData
from mambaseq.data.windows import Interval
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown, typed
from mambaseq.limits import SEEDS, WINDOW, check_setting
from mambaseq_audio.clip_splits import SPLITS, check_selection, check_words, drawn_clips, listed_clips, selector
from mambaseq_audio.io import Channels, check_channels, check_rate
from mambaseq_audio.linear import Samples, codec_of
from mambaseq_audio.mulaw import Codec
from mambaseq_audio.random_clips import RandomClips
from mambaseq_audio.recordings import Recording, all_recordings, are_manifests, names_of, overlap
from mambaseq_audio.stores import SoundStore, sound_store
from mambaseq_audio.tiles import Tiles

DIGITS = "mambaseq:data/fsdd/recordings/*.flac"
DIGITS_NAMES = r"^(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)$"


class ClipData(SequenceData):
    """Short clips, each one sequence of 8-bit samples to be predicted one by one.

    The first sample is predicted from silence, so a model can start from a condition alone. Clips of a
    batch are padded on the right, masked and without targets there. Validation and test predict every sample
    of every clip once.

    Names are compared in Unicode's composed form (NFC), however a file system or an editor writes accents.

    Args:
        files: a folder of sound files, a pattern (`*`, `?`, `**`), a resource, or a list of these; or a manifest, or a
            list of manifests: tables that end in .csv, .tsv or .jsonl, with a column `file` and, if wanted, `split`,
            `start` and `end` (in seconds) and any others; the default is the spoken digits that ship.
        pattern: a regular expression with named groups, searched in each file's name without folder and suffix. A
            manifest's columns are groups too, and need no pattern; the default is that of the digits' names.
        condition: the groups that a clip is generated from, such as `[digit]` or `[digit, speaker]`, each by itself:
            combinations that no clip has can be generated too. None if empty. The default is `digit`, where the pattern
            has that group.
        condition_numbers: groups that are numbers, such as `[age]`; a clip may lack one.
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
        length: samples of the longest sequence. A longer clip is cropped at random in training, and cut into pieces in
            validation and test.
        sample_rate: samples a second.
        resample: convert files of another rate; false refuses them.
        samples: what a token is: a sample of 8 bits by mu-law (`mulaw`) or in even steps (`linear8`), or one of 16 bits
            (`linear16`, for the encoder and the head `levels`).
        channels: of files with several: their mean (`mean`), the first or second one (`left`, `right`), each as a clip
            (`each`), both in turn (`stereo`: `length` then counts both), or an error (`refuse`).
        skip_bad: leave out recordings that cannot be used, and list them; false lists them in an error.
        seed: of the order of clips and of the crops in training.
    """

    reader = "audio/audio"
    writer: str | None = "audio/wav"
    condition_setting = "data.condition"
    """What names the conditions, for messages."""

    def __init__(
        self,
        *,
        files: str | Sequence[str] = DIGITS,
        pattern: str | None = None,
        condition: Sequence[str] | None = None,
        condition_numbers: Sequence[str] = (),
        split: str | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_list: str | None = None,
        test_list: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
        length: int = 8192,
        sample_rate: int = 8000,
        resample: bool = True,
        samples: Samples = "mulaw",
        channels: Channels = "mean",
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        self.files, self.skip_bad = names_of(files), skip_bad
        self.manifest, self._given = are_manifests(self.files), cut_list(self.files)
        shipped = self.files == [DIGITS]
        self.pattern = DIGITS_NAMES if shipped and pattern is None else pattern
        if condition is None:
            condition = ("digit",) if not self.manifest and "(?P<digit>" in (self.pattern or "") else ()
        self.condition = tuple(map(composed, condition))
        self.condition_numbers = tuple(map(composed, condition_numbers))
        self.split = composed(split or ("split" if self.manifest else "take"))
        self.lists = {"validation": validation_list, "test": test_list}
        given: dict[str, str | Sequence[str] | None] = {"validation": validation, "test": test}
        # whether the words of a manifest's column `split` are those of SPLITS
        self._by_words = self.manifest and self.split == "split" and validation is None and test is None
        # whether nothing but a manifest's column, which is looked for later, says which set a clip is in
        self._undecided = not shipped and validation is None and test is None and (split is None or self._by_words)
        self._silent = not shipped and split is not None and not self._by_words and validation is None and test is None
        defaults: dict[str, str | Sequence[str]] = {"validation": "", "test": ""}
        if self.manifest and self.split == "split":
            defaults = {"validation": SPLITS["validation"], "test": SPLITS["test"]}
        elif shipped:
            defaults = {"validation": "47-49", "test": "0-4"}
        self.selections: dict[str, str | Sequence[str]] = {
            name: defaults[name] if value is None else value for name, value in given.items()
        }
        self.fractions = {"validation": validation_fraction, "test": test_fraction}
        for name, fraction in self.fractions.items():
            if fraction is None:
                continue
            if not 0 <= fraction < 1:
                raise ConfigError(f"data.{name}_fraction must be in [0, 1), not {fraction}.")
            if fraction and (given[name] or self.lists[name]):
                raise ConfigError(
                    f"data.{name}_fraction draws a {name} set, which data.{name if given[name] else f'{name}_list'} "
                    "gives. Leave one of them out."
                )
            self.selections[name] = given[name] or ""
        if sum(fraction or 0 for fraction in self.fractions.values()) >= 1:
            raise ConfigError("data.validation_fraction and data.test_fraction leave nothing for training.")
        self.length, self.sample_rate, self.resample, self.channels = length, sample_rate, resample, channels
        self.seed = seed
        self._use(codec_of(samples))
        self._splits: dict[str, list[int]] | None = None

    def _use(self, codec: Codec) -> None:
        self.tokenizer = self.codec = codec
        self.tokenizer_name, self.vocab_size, self.start_ids = codec.name, codec.vocab_size, (codec.start_id,)

    def setup(self) -> None:
        if self._splits is not None:
            return
        names = [*self.condition, *self.condition_numbers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"data.condition and data.condition_numbers name {shown(twice[0])} twice. Name it once.")
        self._check()
        check_setting("data.seed", self.seed, *SEEDS)
        found = self._found()
        self._settle(found)
        groups = self._groups(found)
        self._label(found, groups, self._split(found, groups))  # before anything is decoded
        self._sounds = sounds = self._stored(found)
        groups = self._groups(sounds.recordings)
        splits = self._split(sounds.recordings, groups)
        self._label(sounds.recordings, groups, splits)
        lengths = sounds.store.lengths
        self._clips = [Interval(sounds.store, i, 0, int(lengths[i])) for i in sounds.records]
        self._refuse_copies(sounds, splits)
        self._splits = splits

    def _settle(self, found: Sequence[Recording]) -> None:
        """Decide by a manifest's columns whether sets are drawn where no setting gives them."""
        self._draw = {name: fraction or 0.0 for name, fraction in self.fractions.items()}
        if self._silent and not any(self.lists.values()) and not any(self._draw.values()):
            raise ConfigError(
                f"data.split is {shown(self.split)}, but neither data.validation nor data.test says which of its "
                "values are not for training. Name some, or leave data.split out: then files are drawn."
            )
        if not self._undecided:
            return
        columns = dict.fromkeys(name for one in found for name in one.fields)
        if self.manifest and (own := next((name for name in columns if name.lower() == "split"), None)) is not None:
            self.split = own
            return
        if self.manifest and "(?P<split>" in (self.pattern or ""):
            return
        self._by_words = False
        for name, fraction in self.fractions.items():
            self.selections[name] = ""
            self._draw[name] = (0.1 if fraction is None else fraction) if self.lists[name] is None else 0.0

    def _selects(self, split: str) -> bool:
        """Whether values of the group `data.split` give a set."""
        return self.lists[split] is None and bool(self.selections[split])

    def splits_told(self) -> str:
        self.setup()
        assert self._splits is not None
        how = [f"data.{name}_list" for name, of in self.lists.items() if of]
        if any(map(self._selects, self.lists)):
            how.append(f"{shown(self.split)} of the {'manifest' if self.manifest else 'name'}")
        if drawn := [f"{name} {fraction:.0%}" for name, fraction in self._draw.items() if fraction]:
            how.append(f"a draw of files by data.seed {self.seed} ({' and '.join(drawn)})")
        told = ", ".join(f"{name} {len(members):,}" for name, members in self._splits.items())
        return f"clips: {told}; chosen by {', '.join(how) or 'nothing: all are for training'}"

    def _check(self) -> None:
        """Raise ConfigError for settings out of range."""
        check_setting("data.length", self.length, 1, WINDOW.value)
        check_rate(self.sample_rate, "data.sample_rate")
        check_channels(self.channels, "data.channels")
        if self.channels == "stereo" and self.length % 2:
            raise ConfigError(f"data.length must be even with channels: stereo; it is {self.length}.")

    def _found(self) -> list[Recording]:
        return all_recordings(self.files)

    def _stored(self, found: Sequence[Recording]) -> SoundStore:
        return sound_store(
            "clips",
            found,
            self.sample_rate,
            resample=self.resample,
            channels=self.channels,
            skip_bad=self.skip_bad,
            codec=self.codec,
        )

    def sources(self) -> dict[str, str]:
        """sha256 of each sound file."""
        self.setup()
        return self._sounds.sources()

    def _groups(self, found: Sequence[Recording]) -> list[dict[str, str]]:
        """The named groups of each file's name, and the columns of its row in a manifest."""
        try:
            pattern = re.compile(composed(self.pattern or ""))
        except re.error as error:
            raise ConfigError(f"data.pattern is not a regular expression ({error}): {typed(self.pattern)}.") from error
        setting = {self.split: "data.split"} if any(map(self._selects, self.lists)) else {}
        setting |= dict.fromkeys(self.condition_numbers, "data.condition_numbers")
        setting |= dict.fromkeys(self.condition, self.condition_setting)
        columns = dict.fromkeys(name for one in found for name in one.fields)
        if both := sorted(set(columns) & set(pattern.groupindex)):
            raise ConfigError(f"{shown(both[0])} is a column of {self._given} and a group of data.pattern. Rename one.")
        known = (*pattern.groupindex, *columns)
        for name in sorted(set(setting) - set(known)):
            if self.manifest and self.pattern is None:
                raise ConfigError(
                    f"The manifest {self._given} has no column named {shown(name)}.{did_you_mean(name, known)} It has: "
                    f"{cut_list(known) or 'none'}. Add it, or change {setting[name]}."
                )
            if self.pattern is None:
                raise ConfigError(
                    f"{setting[name]} is {shown(name)}, but nothing says where it is in the files' names. Give "
                    f"data.pattern, with (?P<{name}>...) around it, or change {setting[name]}."
                )
            raise ConfigError(
                f"data.pattern has no group named {shown(name)}.{did_you_mean(name, known)} It has: "
                f"{cut_list(known) or 'none'}. Write (?P<{name}>...) in it, or change {setting[name]}."
            )
        matches = [pattern.search(composed(one.path.stem)) for one in found]
        if strays := [str(one) for one, match in zip(found, matches, strict=True) if match is None]:
            raise DataError(
                f"{len(strays):,} of {len(found):,} names do not match data.pattern, {typed(self.pattern)}: "
                f"{cut_list(strays, 5)}. Change the pattern, or narrow data.files so that it leaves such files out."
            )
        groups = []
        for recording, match in zip(found, matches, strict=True):
            assert match is not None
            groups.append({**dict.fromkeys(columns, ""), **recording.fields, **match.groupdict(default="")})
        return groups

    def _split(self, found: Sequence[Recording], groups: Sequence[dict[str, str]]) -> dict[str, list[int]]:
        """Indices of the clips of each split; every clip is in exactly one."""
        splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        chosen: dict[str, set[int]] = {}
        for split, name in self.lists.items():
            if name is None:
                values = [group.get(self.split, "") for group in groups]
                if self._by_words:
                    check_words(found, values)
                elif self.selections[split] is not SPLITS[split]:  # nobody asked for the default
                    check_selection(split, self.selections[split], set(values), self.split)
                takes = selector(self.selections[split])
                chosen[split] = {i for i, value in enumerate(values) if takes(value)}
            else:
                chosen[split] = listed_clips([one.path for one in found], name, self._given)
        if both := chosen["validation"] & chosen["test"]:
            raise ConfigError(f"{found[min(both)]} is chosen for both validation and test. Choose it for only one.")
        kinds = [tuple(group.get(name, "") for name in self.condition) for group in groups]
        taken = set().union(*chosen.values())
        chosen |= drawn_clips(found, kinds, self._draw, taken, self.seed, self._given)
        for i in range(len(found)):
            split = next((split for split, members in chosen.items() if i in members), "train")
            splits[split].append(i)
        if not splits["train"]:
            raise DataError(f"No clip of {self._given} is left for training: all are chosen for validation or test.")
        if pair := overlap(found, {i: split for split, members in splits.items() for i in members}):
            one, other = (found[i] for i in pair)
            raise DataError(f"{one} and {other} are in different splits and hold the same time. Put them into one.")
        return splits

    def _label(
        self, found: Sequence[Recording], groups: Sequence[dict[str, str]], splits: dict[str, list[int]]
    ) -> None:
        """Number the conditions' names and measure their numbers. Raises for what training never sees, which would mean
        nothing to the model."""
        self._conditions: list[int] | list[tuple[int, ...]] | None = None
        names = (*self.condition, *self.condition_numbers)
        if not names:
            return
        values = {name: [group[name] for group in groups] for name in names}
        for i, one in enumerate(found):
            if not any(values[name][i] for name in names):
                verb = "are" if len(names) > 1 else "is"
                raise DataError(
                    f"{one} has no condition: {' and '.join(names)} {verb} empty. Fill it in, or change data.condition."
                )
        train = splits["train"]
        self.conditions = tuple(
            of_numbers(name, values[name], train, found)
            if name in self.condition_numbers
            else of_names(name, values[name], train)
            for name in names
        )
        made = rows(self.conditions, values, splits, found)
        self.n_conditions = sum(len(one.names) for one in self.conditions)
        if single(self.conditions):
            self.condition_names = list(self.conditions[0].names)
            self._conditions = [one[0] for one in made]
        else:
            self._conditions = made

    def _refuse_copies(self, sounds: SoundStore, splits: dict[str, list[int]]) -> None:
        """Compares stored samples, whatever the files are called and however they are packed."""
        first: dict[tuple[int, int], tuple[str, Recording]] = {}
        for split, members in splits.items():
            for i in members:
                record = sounds.records[i]
                content = (int(sounds.store.lengths[record]), int(sounds.store.checksums[record, 0]))
                other, one = first.setdefault(content, (split, sounds.recordings[i]))
                if other != split:
                    raise DataError(
                        f"{sounds.recordings[i]} ({split}) is a copy of {one} ({other}): the same samples. Remove one, "
                        f"or put both into one split."
                    )

    def clips(self, split: str) -> list[np.ndarray]:
        """The whole clips of `"train"`, `"validation"` or `"test"`: `(length,)` levels."""
        self.setup()
        assert self._splits is not None
        return [clip.read(clip.start, len(clip)) for clip in self._members(split)[0]]

    def _members(self, split: str) -> tuple[list[Interval], list[Any] | None]:
        assert self._splits is not None, "setup comes first"
        members = self._splits[split]
        conditions = None if self._conditions is None else [self._conditions[i] for i in members]
        return [self._clips[i] for i in members], conditions

    def train(self) -> RandomClips:
        step = 2 if self.channels == "stereo" else 1
        return RandomClips(*self._members("train"), self.length, self.seed, step, self.codec.start_id)

    def _tiles(self, split: str) -> Tiles | None:
        clips, conditions = self._members(split)
        return Tiles(clips, self.length, first=self.codec.start_id, conditions=conditions) if clips else None

    def validation(self) -> Tiles | None:
        return self._tiles("validation")

    def test(self) -> Tiles | None:
        return self._tiles("test")

    def reader_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate, "resample": self.resample, "channels": self.channels}

    def writer_options(self) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate, **({"channels": 2} if self.channels == "stereo" else {})}
