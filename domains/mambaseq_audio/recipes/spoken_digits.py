"""Spoken digits, sample by sample: U-Nets and stacks of one width, selective, time-invariant and S4, of one size and
trained for one time; bits a sample, scores of what they say, and which digit a classifier hears."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mambaseq.atomic import atomic_file, atomic_folder, atomic_path
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.errors import UserError
from mambaseq.generation.decode import generate
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table
from mambaseq.runs import run as runs
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import DIGITS_NAMES
from mambaseq_audio.io import write_wav
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recipes import spoken
from mambaseq_audio.recipes.spoken import Recordings
from mambaseq_audio.recipes.spoken_training import (
    CONTENDERS,
    HELD_OUT,
    LONGEST,
    LTI,
    RATED,
    RATES,
    VARIANTS,
    Contender,
    export,
    learn,
    tried,
)
from mambaseq_audio.scores import scores
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
    export(digits, model, digits.context.folder / "models" / _stem(name, digits.minutes, seed), run.steps)
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


def _stem(name: str, minutes: float, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '_')}-{minutes:g}min-seed{seed}"


def _speak(digits: Digits, name: str, guidance: float, seed: int) -> dict[str, float]:
    """Clips of every digit by every speaker, as many as there are test recordings, as long as training recordings of
    the same digit and speaker; written, and scored."""
    context = digits.context
    folder = context.folder / "models" / _stem(name, digits.minutes, seed)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. Remove the trials of {name} from {context.folder} to train it again.")
    model = load_model(folder, context.device).model
    longest = context.at(full=LONGEST, small=LONGEST, tiny=32)
    recordings, chosen = digits.recordings, digits.split["train"]
    takes = max(len(digits.split["test"]) // len(digits.names), 1)
    rng = np.random.default_rng(seed)
    names, like = [], []  # a training recording for each clip, of the same digit, speaker and length
    for condition, said in enumerate(digits.names):
        some = chosen[digits.conditions[chosen] == condition]
        if len(some):
            like += rng.choice(some, takes).tolist()
            names += [f"{said.replace(' ', '_')}_{take}" for take in range(takes)]
    lengths = [min(len(recordings.signals[i]), longest) for i in like]
    condition = torch.from_numpy(digits.conditions[like]).to(context.device)
    prompt = torch.full((len(like), 1), MuLaw.start_id, device=context.device)
    ids = generate(model, prompt, max(lengths), guidance=guidance, seed=seed, condition=condition)[:, 1:]
    clips = [row[:length] for row, length in zip(ids.cpu().numpy().astype(np.uint8), lengths, strict=True)]
    stem = _stem(name, digits.minutes, seed) + ("" if guidance == 1 else f"-guidance{guidance:g}")
    _write(context.folder / "clips" / stem, names, clips)
    return digits.scored(recognise_levels(digits.loaded, names, clips), recordings.digits[like])


def _write(place: Path, names: Sequence[str], clips: Sequence[np.ndarray], replace: bool = True) -> None:
    """A folder of wav files for `mambaseq audio/score`, and a small ogg file beside it: all digits in turn, the
    speakers in turn. replace: write over those of another process."""
    codec = MuLaw()
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), atomic_folder(place, replace=replace) as folder:
        for name, clip in zip(names, clips, strict=True):
            write_wav(folder / f"{name}.wav", [clip], codec, sample_rate=spoken.RATE)
    by_digit: dict[str, dict[str, int]] = {}
    for i, name in enumerate(names):
        digit, _, speaker = name.rpartition("_")[0].partition("_")
        by_digit.setdefault(digit, {}).setdefault(speaker, i)
    parts = []
    for number, of in enumerate(by_digit.values()):
        parts += [codec.decode(clips[list(of.values())[number % len(of)]]), np.zeros(spoken.RATE // 8, np.float32)]
    with atomic_path(place.parent / f"{place.name}.ogg") as path:
        soundfile.write(path, np.concatenate(parts), spoken.RATE, format="OGG", subtype="VORBIS")


def run(context: Context) -> list[Table]:
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
    context.wanted([*usual, *VARIANTS, *RATED])
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
                lambda seed, _, name=name, by=guidance: _speak(digits, name, by, seed),  # type: ignore[misc]
            )
            bounds = [Bound("accuracy", ">=", WANTED_ACCURACY)] if name in CONTENDERS else []
            if guidance == 1:
                if name in CONTENDERS:
                    bounds.append(Bound("bits", "<=", WANTED_BITS))
                said = {**said, **trained[name]}
            lines.append(Line(name, said, wanted=tuple(bounds)))
        lines += _recorded(digits)
        if guidance == 1:
            lines += _counted(digits)
            found.append(Table("Spoken digits at 8 kHz", _about(digits), [*_BITS, *_SCORES, *_COSTS], lines))
        else:
            found.append(Table(f"What they say under guidance {guidance:g}", _GUIDED, [*_SCORES, *_PUBLISHED], lines))
    return found


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
        _write(place, names, digits.recordings.levels(chosen), replace=False)
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
