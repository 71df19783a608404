"""Spoken digits, sample by sample: U-Nets and stacks of one width, selective, time-invariant and S4, of one size and
trained for one time; bits a sample, scores of what they say, and which digit a classifier hears."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table
from mambaseq.runs import run as runs
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import DIGITS_NAMES
from mambaseq_audio.recipes import spoken
from mambaseq_audio.recipes.spoken import Recordings
from mambaseq_audio.recipes.spoken_clips import pool, speak, speak_and_choose, stem, takes, write
from mambaseq_audio.recipes.spoken_training import (
    CONTENDERS,
    HELD_OUT,
    LTI,
    RATED,
    RATES,
    VARIANTS,
    Contender,
    export,
    learn,
    tried,
)
from mambaseq_audio.scores import PUBLISHED_BAND, scores
from mambaseq_audio.scoring import Recognised, recognise_levels

MINUTES = 8.0
GUIDANCE = (1.0, 2.0)
"""How many times over what digit and speaker change counts in the clips: as it was learned, and guided."""
WANTED_BITS, WANTED_ACCURACY, WANTED_CLASSIFIER = 3.7, 0.90, 0.97
CLASSIFIER = "classifier"
CLASSIFIERS = (CLASSIFIER, f"{CLASSIFIER}, held-out speakers")


class Digits:
    """The recordings, split; and what the recipe asks about them once, when it is needed.

    folder: of the recordings as single files. held: speakers that training does not hear.
    """

    def __init__(self, context: Context, folder: Path, held: Sequence[str] = ()) -> None:
        self.context, self.folder, self.held = context, folder, held
        self.recordings: Recordings = spoken.load(folder)
        self.split = self.recordings.split(held)
        self.conditions = self.recordings.conditions(with_speaker=not held)
        speakers = [""] if held else self.recordings.names
        n_digits = int(self.recordings.digits.max()) + 1
        self.names = [f"{digit} {speaker}".strip() for digit in range(n_digits) for speaker in speakers]

    @property
    def minutes(self) -> float:
        return self.context.minutes or self.context.at(full=MINUTES, small=1.0, tiny=0.05)

    @property
    def run(self) -> Path:
        """The classifier's."""
        return self.context.folder / ("classifier-held-out" if self.held else "classifier")

    def clips(self, split: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Levels and conditions."""
        chosen = self.split[split]
        return self.recordings.levels(chosen), self.conditions[chosen]

    def bits(self, model: SequenceModel, split: str, at_most: int | None = None) -> float:
        """at_most: recordings, spread over all."""
        clips, conditions = self.clips(split)
        if at_most is not None and at_most < len(clips):
            some = np.linspace(0, len(clips) - 1, at_most).astype(int)
            clips, conditions = [clips[i] for i in some], conditions[some]
        return spoken.bits(model, clips, conditions)

    def classifier_trial(self, _: Path) -> dict[str, float]:
        """Train `audio/digit_classifier` on the training recordings; accuracy on the test's."""
        lists = self.context.folder / "lists"
        lists.mkdir(exist_ok=True)
        files = sorted(self.folder.rglob("*.wav"))
        given: dict[str, Any] = {"data.files": str(files[0].parent), "data.pattern": DIGITS_NAMES}
        for split in ("validation", "test"):
            path = lists / f"{self.run.name}-{split}.txt"
            with atomic_file(path) as file:
                file.write("".join(f"{files[i].name}\n" for i in self.split[split]).encode())
            given[f"data.{split}_list"] = str(path)
        given |= self.context.at(
            full={"loader.num_workers": 4},
            small={"trainer.max_steps": 600},
            tiny={
                **{"trainer.max_steps": 2, "trainer.val_check_interval": 2, "model.d_model": 8},
                **{"model.backbone.n_layers": 1, "loader.batch_size": 4, "optimizer.warmup_steps": 1},
            },
        )
        if self.context.device.type == "cpu":
            given["trainer.accelerator"] = "cpu"
        if (self.run / "checkpoints" / "last.ckpt").is_file():
            made = runs.Run(self.run).resume(progress=False)
        else:
            made = runs.fit("audio/digit_classifier", out=self.run, settings=given, progress=False)
        found = made.evaluate("test", progress=False)
        return {"accuracy": float(found["test/accuracy"]), "clips": len(self.split["test"])}

    def classifier(self) -> dict[str, list[float]]:
        found = self.context.trial(CLASSIFIERS[bool(self.held)], self.classifier_trial)
        return {key: [value] for key, value in found.items()}

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The classifier, which is trained first where it was not."""
        self.classifier()
        if not self.run.is_dir():
            raise UserError(f"{self.run} is missing. Remove the trial '{CLASSIFIER}' of its folder to train it again.")
        return load_model(self.run, self.context.device)

    @functools.cached_property
    def truth(self) -> Recognised:
        """What the classifier gives for all recordings that may be trained on."""
        return self.recognised(np.concatenate([self.split["train"], self.split["validation"]]))

    def recognised(self, chosen: np.ndarray) -> Recognised:
        return recognise_levels(self.loaded, [str(i) for i in chosen], self.recordings.levels(chosen))

    def scored(self, clips: Recognised, digits: np.ndarray) -> dict[str, float]:
        """Scores of clips against the training recordings, and the share heard as the digit that was asked for."""
        found = dataclasses.asdict(scores(self.truth.features, self.truth.log_p, clips.features, clips.log_p))
        names = self.loaded.card.class_names
        heard = np.array([int(names[answer]) for answer in clips.log_p.argmax(1)])
        return {**found, "accuracy": float((heard == digits).mean())}


def _trial(digits: Digits, name: str, of: Contender, seed: int, checkpoint: Path) -> dict[str, float]:
    """Train, export the model; bits a sample."""
    found = learn(digits, name, of, seed, digits.minutes, checkpoint)
    model, run = found.model, found.run
    export(digits, model, digits.context.folder / "models" / stem(name, digits.minutes, seed), run.steps)
    return {
        "bits": digits.bits(model, "test"),
        "validation": found.best,
        "train_bits": digits.bits(model, "train", len(digits.split["test"])),
        "last": run.loss / math.log(2),
        "rate": of.rate,
        "seconds": run.clock,
        "steps": run.steps,
        "passes": found.passes,
        "captured": float(run.captured),
        "parameters": model.n_parameters(),
    }


def run(context: Context) -> list[Table]:
    context.wanted([*CLASSIFIERS, *CONTENDERS, *HELD_OUT, *VARIANTS, *RATED])
    if not spoken.is_sample(context):
        return tables(context, spoken.unpacked(context))
    found = tables(context, spoken.sampled(context))
    for table in found:
        table.about = f"{_SAMPLE} {table.about}"
        for line in table.lines:
            line.paper = ""
    return found


def tables(context: Context, folder: Path) -> list[Table]:
    """The recipe on a folder of recordings."""
    usual = [*CLASSIFIERS, *CONTENDERS, *HELD_OUT]
    wanted = [name for name in (*usual, *VARIANTS, *RATED) if name in (context.only or usual)]
    found: list[Table] = []
    digits = Digits(context, folder)
    other = functools.cache(lambda: Digits(context, folder, spoken.HELD_OUT))
    if classifiers := [name for name in CLASSIFIERS if name in wanted]:
        found.append(_classifier_table(classifiers, digits, other))
    names = {name: of for name, of in {**CONTENDERS, **VARIANTS}.items() if name in wanted}
    if names:
        found += _main_tables(context, digits, names)
    if held := [name for name in HELD_OUT if name in wanted]:
        lines = []
        for name, like in ((name, HELD_OUT[name]) for name in held):
            values = _trials(other(), name, CONTENDERS[like], context.seeds[:1])
            lines.append(Line(name, values, note=_note(other())))
        found.append(Table("Spoken digits by speakers that training does not hear", _HELD, _HELD_COLUMNS, lines))
    if rated := [RATED[name] for name in wanted if name in RATED]:
        found.append(_rates_table(digits, rated))
    return found


def _rates_table(digits: Digits, rated: Sequence[tuple[str, float]]) -> Table:
    values: dict[str, dict[str, list[float]]] = {}
    for name, one in rated:
        values.setdefault(name, {})[f"{one:g}"] = [tried(digits, name, one)["validation"]]
    about = (
        f"Bits a sample on the validation recordings after {digits.minutes / 5:g} minutes of steps at each peak "
        "learning rate, under a schedule of that length."
    )
    columns = [Column(f"{one:g}", f"{one:g}", 3) for one in RATES]
    return Table("Learning rates", about, columns, [Line(name, of) for name, of in values.items()])


def _classifier_table(names: Sequence[str], digits: Digits, other: Callable[[], Digits]) -> Table:
    lines = []
    if CLASSIFIERS[0] in names:
        bound = Bound("accuracy", ">=", WANTED_CLASSIFIER)
        lines.append(Line("official split", digits.classifier(), "0.960", (bound,)))
    if CLASSIFIERS[1] in names:
        lines.append(Line("held-out speakers", other().classifier(), "0.702", note=_note(other())))
    about = (
        "The configuration `audio/digit_classifier`, which scores the clips below. The column paper has logistic "
        "regression on log spectrograms, as measured when the data were collected."
    )
    return Table(
        "Which digit is spoken", about, [Column("accuracy", "accuracy", 4), Column("clips", "clips", 0)], lines
    )


def _trials(digits: Digits, name: str, of: Contender, seeds: Sequence[int]) -> dict[str, list[float]]:
    return _over(
        digits,
        f"{name} minutes={digits.minutes:g}",
        seeds,
        lambda seed, checkpoint: _trial(digits, name, of, seed, checkpoint),
    )


def _over(
    digits: Digits, label: str, seeds: Sequence[int], trial: Callable[[int, Path], dict[str, float]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for seed in seeds:
        one = digits.context.trial(f"{label} seed={seed}", lambda path, seed=seed: trial(seed, path))  # type: ignore[misc]
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return found


def _main_tables(context: Context, digits: Digits, names: dict[str, Contender]) -> list[Table]:
    trained = {
        name: _trials(digits, name, of, context.seeds[: len(context.seeds) if context.only else 1])
        for name, of in names.items()
    }
    seeds = {name: list(context.seeds[: len(of["bits"])]) for name, of in trained.items()}
    if not context.only:  # a second seed for the two that lead, on the validation recordings
        for name in sorted(names, key=lambda name: trained[name]["validation"][0])[:2]:
            trained[name] = _trials(digits, name, names[name], context.seeds)
            seeds[name] = list(context.seeds)
    wanted = {name: [Bound("accuracy", ">=", WANTED_ACCURACY)] if name in CONTENDERS else [] for name in names}
    found = []
    for guidance in GUIDANCE:
        lines = []
        for name, of in names.items():
            if guidance != 1 and not of.condition_dropout:
                continue  # it has not learned to do without a condition
            said = _over(
                digits,
                f"{name} minutes={digits.minutes:g} guidance={guidance:g}",
                seeds[name],
                lambda seed, _, name=name, by=guidance: speak(digits, name, by, seed),  # type: ignore[misc]
            )
            bounds = wanted[name]
            if guidance == 1:
                if name in CONTENDERS:
                    bounds = [*bounds, Bound("bits", "<=", WANTED_BITS)]
                said = {**said, **trained[name]}
            lines.append(Line(name, said, wanted=tuple(bounds)))
        lines += _recorded(digits)
        if guidance == 1:
            lines += _counted(digits)
            found.append(Table("Spoken digits at 8 kHz", _about(digits), [*_BITS, *_SCORES, *_COSTS], lines))
            found.append(_rejection_table(digits, seeds, wanted))
        else:
            found.append(Table(f"What they say under guidance {guidance:g}", _GUIDED, [*_SCORES, *_PUBLISHED], lines))
    return found


def _rejection_table(digits: Digits, seeds: dict[str, list[int]], wanted: dict[str, list[Bound]]) -> Table:
    lines = []
    for name, some in seeds.items():
        said = _over(
            digits,
            f"{name} minutes={digits.minutes:g} rejection",
            some,
            lambda seed, _, name=name: speak_and_choose(digits, name, seed),  # type: ignore[misc]
        )
        lines.append(Line(name, said, wanted=tuple(wanted[name])))
    lower, upper = PUBLISHED_BAND
    of = takes(digits)
    about = (
        "The same weights, and rejection sampling as published (arXiv:2202.09729), by the likelihood that the model "
        "itself gives its clips; no classifier has a say. It is done within each digit and speaker, as likelihoods "
        f"given different conditions are no ranking, and by bits a sample, as clips differ in length: {pool(of)} clips "
        f"of each are ranked from the most bits to the fewest, and those between {lower:.0%} and {upper:.0%} of the "
        f"ranking kept, which are {of}: as many as in the table above."
    )
    return Table("What is kept of what they say", about, [*_LIKELY, *_SCORES, *_PUBLISHED], lines + _recorded(digits))


def _recorded(digits: Digits) -> list[Line]:
    """Scores of recordings themselves, as many as there are generated clips."""
    n = len(digits.split["test"])
    some = {
        "training recordings": digits.split["train"][np.linspace(0, len(digits.split["train"]) - 1, n).astype(int)],
        "test recordings": digits.split["test"],
    }
    lines = []
    for name, chosen in some.items():
        trial = digits.context.trial(
            f"{name}, scored",
            lambda _, chosen=chosen: digits.scored(digits.recognised(chosen), digits.recordings.digits[chosen]),  # type: ignore[misc]
        )
        lines.append(Line(name, {key: [value] for key, value in trial.items()}))
    place = digits.context.folder / "clips" / "recordings"
    if not place.is_dir():
        chosen = digits.split["test"]
        parts = (digits.recordings.digits, digits.recordings.speakers, digits.recordings.takes)
        digit, speaker, take = (of[chosen] for of in parts)
        names = [f"{a}_{digits.recordings.names[b]}_{c}" for a, b, c in zip(digit, speaker, take, strict=True)]
        write(place, names, digits.recordings.levels(chosen), replace=False)
    return lines


def _counted(digits: Digits) -> list[Line]:
    """Bits of counting, and of what noise alone costs."""

    def count(_: Path) -> dict[str, float]:
        seen = [*digits.clips("train")[0], *digits.clips("validation")[0]]
        found = unigram_bigram(seen, digits.clips("test")[0])
        return {**found, "noise": spoken.noise_bits([digits.recordings.signals[i] for i in digits.split["test"]])}

    values = digits.context.trial("counting", count)
    return [
        Line("counting pairs of samples", {"bits": [values["bigram"]]}, "5.45"),
        Line("counting samples", {"bits": [values["unigram"]]}, "7.18"),
        Line("background noise alone", {"bits": [values["noise"]]}, note="an estimate from below, not a model"),
    ]


_SAMPLE = (
    "**A sample: these are not the figures of the table in docs/reproduction.md.** The recordings are those that ship "
    "with the project, three of the six speakers (of the two that are held out, theo), at the scale tiny five takes of "
    "each digit; bring the whole set with --data FOLDER. What follows describes the whole at the scale full."
)
_BITS = [
    Column("bits", "bits a sample, test", 3),
    Column("validation", "validation", 3),
    Column("train_bits", "training recordings", 3),
]
_SCORES = [
    Column("fid", "FID", 2),
    Column("inception_score", "IS", 2),
    Column("modified_inception_score", "mIS", 1),
    Column("am_score", "AM", 3),
    Column("accuracy", "heard as asked for", 1, percent=True),
]
_PUBLISHED = [
    Column("published_inception_score", "IS, published code", 2),
    Column("published_modified_inception_score", "mIS, published code", 1),
]
_LIKELY = [
    Column("all_bits", "bits a sample, all clips", 3),
    Column("kept_bits", "bits a sample, kept", 3),
]
_COSTS = [
    Column("seconds", "seconds trained", 0),
    Column("rate", "learning rate", 4),
    Column("steps", "steps", 0),
    Column("passes", "times through the recordings", 0),
    Column("parameters", "parameters", 0),
]
_HELD_COLUMNS = [*_BITS, *_COSTS]


def _note(digits: Digits) -> str:
    held = [name for name in digits.held if name in digits.recordings.names]
    return f"{len(digits.split['test']):,} recordings of {' and '.join(held)}"


def _about(digits: Digits) -> str:
    usual = CONTENDERS[LTI]
    return (
        "The Free Spoken Digit Dataset, six speakers, official split: takes 0 to 4 of each digit and speaker are the "
        f"test ({len(digits.split['test']):,} recordings), takes 47 to 49 choose the weights, the others ("
        f"{len(digits.split['train']):,}) are trained on. 8-bit mu-law at fixed full scale, sample by sample, given "
        "digit and speaker. U-Nets have three resolutions, windows of 4 joined twice, "
        "and 4 layers each way; S4 is the diagonal one, with an MLP behind each layer; stacks have 8 layers. All are "
        f"of about 6 M parameters and trained for {digits.minutes:g} minutes of steps (compiling and looking at the "
        "validation recordings do not count), in rows of 4,096 samples, 16 a step; AdamW, a tenth of the time as "
        "warm-up, a cosine that ends with the clock, weight decay 0.1, an average of the weights (0.999), dropout "
        f"{usual.dropout:g}; one half of the rows is made louder or softer by up to {usual.variation.gain:g} dB, one "
        f"half begins up to {usual.variation.shift} samples later. bf16 autocast in training; bits in fp32. What "
        "bounds them: 'training recordings' has the same weights' bits on recordings that they were trained on, and "
        "'background noise alone' what a model that knows everything but the noise would still pay, if speech and "
        "stationary Gaussian noise as in a recording's quietest frames add up. Clips: at temperature 1, as many as "
        "there are test recordings, each as long as a training recording of its digit and speaker; "
        "FID against all recordings that may be trained on. A second seed for the two that lead on the "
        "validation recordings."
    )


_GUIDED = (
    "The same weights: logits without digit and speaker, plus so many times what these change (Ho and "
    "Salimans, arXiv:2207.12598); a tenth of the rows in training were not told them. "
    "'Published code' is what SaShiMi's code computes under these names (see `mambaseq audio/score --help`)."
)
_HELD = (
    "Trained on four speakers, given the digit alone, tested on all recordings of "
    f"the two others ({' and '.join(spoken.HELD_OUT)}); all else as above."
)

recipe = Recipe(run, seeds=2, brings=True, by_clock=True)
