"""Spoken digits, sample by sample: U-Nets and stacks of one width, selective, time-invariant and S4, of one size and
trained for one time; bits a sample, scores of what they say, and which digit a classifier hears."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch

from mambaseq.atomic import atomic_file, atomic_folder, atomic_path
from mambaseq.checkpoints import LoadedModel, ModelCard, load_model, save_model
from mambaseq.errors import UserError
from mambaseq.generation.decode import generate
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.runs import run as runs
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import DIGITS_NAMES
from mambaseq_audio.io import write_wav
from mambaseq_audio.mulaw import LEVELS, MuLaw
from mambaseq_audio.recipes import spoken
from mambaseq_audio.recipes.spoken import Recordings, Rows, Variation
from mambaseq_audio.scores import scores
from mambaseq_audio.scoring import Recognised, recognise_levels

MINUTES = 8.0
GUIDANCE = (1.0, 2.0)
"""How many times over what digit and speaker change counts in the clips: as it was learned, and guided."""
WANTED_BITS, WANTED_ACCURACY, WANTED_CLASSIFIER = 3.7, 0.90, 0.97
LONGEST = 8192  # of a generated clip; 0.6 % of the recordings are longer


class Contender(NamedTuple):
    """A model: its parts at full scale, and how it is trained."""

    d_model: int
    backbone: dict[str, Any]
    mixer: dict[str, Any]
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed
    dropout: float = 0.2
    condition_dropout: float = 0.1
    variation: Variation = Variation(gain=6.0, shift=256)


_UNET = {"name": "unet", "n_layers": 4, "pool": [4, 4], "expand": 2}
_STACK = {"name": "residual", "n_layers": 8}
_LTI = {"name": "mamba", "lti": True}
MAMBA, LTI = "Mamba U-Net", "LTI U-Net"
CONTENDERS = {
    MAMBA: Contender(88, _UNET, {"name": "mamba"}),
    LTI: Contender(88, _UNET, _LTI),
    "isotropic Mamba": Contender(336, _STACK, {"name": "mamba"}),
    "isotropic LTI": Contender(336, _STACK, _LTI),
    "S4 U-Net": Contender(
        72,
        {**_UNET, "mlp": True},
        {"name": "s4d", "d_state": 32},
        {"mixers": {"mlp": {"activation": "gelu"}}},
    ),
}
UNCHANGED = f"{LTI}, recordings unchanged"
DROPOUTS = {f"{LTI}, dropout {rate}": rate for rate in (0.0, 0.1, 0.3)}
SMALL = f"small {LTI}"
VARIANTS = {
    SMALL: Contender(40, _UNET, _LTI, dropout=0.1, condition_dropout=0.0),
    UNCHANGED: CONTENDERS[LTI]._replace(variation=Variation()),
    **{name: CONTENDERS[LTI]._replace(dropout=rate) for name, rate in DROPOUTS.items()},
}
"""What is trained only when it is named: a model that is small enough to ship, and what of the training does which
part."""
HELD_OUT = {f"{name}, held-out speakers": name for name in (MAMBA, LTI)}
CLASSIFIER = "classifier"
CLASSIFIERS = (CLASSIFIER, f"{CLASSIFIER}, held-out speakers")


def _build(context: Context, of: Contender, n_conditions: int) -> SequenceModel:
    layers = context.at(full=of.backbone["n_layers"], small=2, tiny=1)
    spec = {
        "d_model": context.at(full=of.d_model, small=32, tiny=8),
        "encoder": {
            **{"name": "tokens", "vocab_size": LEVELS, "n_conditions": n_conditions},
            "condition_dropout": of.condition_dropout,
        },
        "backbone": {**of.backbone, "n_layers": layers, "dropout": of.dropout},
        "mixer": of.mixer,
        "head": {"name": "lm", "vocab_size": LEVELS},
        **of.more,
    }
    return build_model(spec).to(context.device)


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


def _learn(digits: Digits, name: str, of: Contender, seed: int, checkpoint: Path) -> dict[str, float]:
    """Train by the clock, keep the weights that are best on the validation recordings, export them; bits a sample."""
    context = digits.context
    torch.manual_seed(seed)
    model = _build(context, of, len(digits.names))
    chosen = digits.split["train"]
    length = context.at(full=4096, small=2048, tiny=128)
    rows = Rows([digits.recordings.signals[i] for i in chosen], digits.conditions[chosen], length, context.device)
    best_file = checkpoint.with_suffix(".best.pt")
    best = math.inf
    if best_file.exists():
        best = torch.load(best_file, map_location="cpu", weights_only=True)["bits"]

    def look() -> bool:
        nonlocal best
        now = digits.bits(model, "validation")
        if now < best:
            best = now
            with atomic_file(best_file) as file:
                torch.save({"bits": now, "weights": model.state_dict()}, file)
        return False

    steps = context.at(full=1_000_000, small=100_000, tiny=4)
    run = train(
        model,
        rows.batches(context.at(full=16, small=4, tiny=2), seed, of.variation),
        steps,
        OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=steps // 50, min_lr_ratio=0.02),
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        checkpoint=checkpoint,
        finished=look,
        check_every=context.at(full=400, small=100, tiny=2),
        label=name,
        clock=60 * digits.minutes,
        average=context.at(full=0.999, small=0.99, tiny=0.9),
    )
    look()
    if not best_file.exists():  # no look found a number of bits
        raise UserError(
            f"The training of {name} diverged: its bits on the validation recordings were never a finite number. Give "
            "another seed with --seed."
        )
    model.load_state_dict(torch.load(best_file, map_location=context.device, weights_only=True)["weights"])
    _export(digits, model, name, seed, run.steps)
    return {
        "bits": digits.bits(model, "test"),
        "validation": best,
        "train_bits": digits.bits(model, "train", len(digits.split["test"])),
        "last": run.loss / math.log(2),
        "seconds": run.clock,
        "steps": run.steps,
        "passes": run.steps * context.at(full=16, small=4, tiny=2) * length / rows.total,
        "samples_per_s": run.steps_per_second * context.at(full=16, small=4, tiny=2) * length,
        "captured": float(run.captured),
        "parameters": model.n_parameters(),
    }


def _stem(name: str, minutes: float, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '_')}-{minutes:g}min-seed{seed}"


def _export(digits: Digits, model: SequenceModel, name: str, seed: int, step: int) -> None:
    """A model that `mambaseq generate` reads."""
    assert model.spec is not None
    card = ModelCard(
        spec=model.spec,
        tokenizer={"name": "audio/mulaw", "options": {}},
        condition_names=digits.names,
        length=LONGEST,
        start_ids=[MuLaw.start_id],
        reader="audio/audio",
        writer="audio/wav",
        reader_options={"sample_rate": spoken.RATE, "resample": True, "channels": "mean"},
        writer_options={"sample_rate": spoken.RATE},
        generation={"max_new_tokens": 4000},
        step=step,
        task="next_token",
    )
    save_model(digits.context.folder / "models" / _stem(name, digits.minutes, seed), model, card, MuLaw())


def _speak(digits: Digits, name: str, guidance: float, seed: int) -> dict[str, float]:
    """Clips of every digit by every speaker, as many as there are test recordings, as long as training recordings of
    the same digit and speaker; written, and scored."""
    context = digits.context
    folder = context.folder / "models" / _stem(name, digits.minutes, seed)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. Remove the trials of {name} from {context.folder} to train it again.")
    model = load_model(folder, context.device).model
    longest = context.at(full=LONGEST, small=LONGEST, tiny=32)
    takes = max(len(digits.split["test"]) // len(digits.names), 1)
    rng = np.random.default_rng(seed)
    conditions, lengths = [], []
    chosen = digits.split["train"]
    for condition in range(len(digits.names)):
        like = chosen[digits.conditions[chosen] == condition]
        if not len(like):
            continue
        for _ in range(takes):
            conditions.append(condition)
            lengths.append(min(len(digits.recordings.signals[rng.choice(like)]), longest))
    of = torch.tensor(conditions, device=context.device)
    prompt = torch.full((len(of), 1), MuLaw.start_id, device=context.device)
    ids = generate(model, prompt, max(lengths), guidance=guidance, seed=seed, condition=of)[:, 1:]
    clips = [row[:length] for row, length in zip(ids.cpu().numpy().astype(np.uint8), lengths, strict=True)]
    said = np.array([int(digits.names[condition].split()[0]) for condition in conditions])
    names = [f"{digits.names[condition].replace(' ', '_')}_{i % takes}" for i, condition in enumerate(conditions)]
    stem = _stem(name, digits.minutes, seed) + ("" if guidance == 1 else f"-guidance{guidance:g}")
    _write(context.folder / "clips" / stem, names, clips)
    return digits.scored(recognise_levels(digits.loaded, names, clips), said)


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
    return tables(context, spoken.unpacked(context))


def tables(context: Context, folder: Path) -> list[Table]:
    """The recipe on a folder of recordings."""
    usual = [*CLASSIFIERS, *CONTENDERS, *HELD_OUT]
    context.wanted([*usual, *VARIANTS])
    wanted = [name for name in (*usual, *VARIANTS) if name in (context.only or usual)]
    found: list[Table] = []
    digits = Digits(context, folder)
    other = functools.cache(lambda: Digits(context, folder, spoken.HELD_OUT))
    if classifiers := [name for name in CLASSIFIERS if name in wanted]:
        found.append(_classifier_table(classifiers, digits, other))
    names = {name: of for name, of in {**CONTENDERS, **VARIANTS}.items() if name in wanted}
    if names:
        found += _main_tables(context, digits, names)
    if held := [name for name in HELD_OUT if name in wanted]:
        lines = [
            Line(name, _trials(other(), name, CONTENDERS[HELD_OUT[name]], context.seeds[:1]), note=_note(other()))
            for name in held
        ]
        found.append(Table("Spoken digits by speakers that training does not hear", _HELD, _HELD_COLUMNS, lines))
    return found


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
        lambda seed, checkpoint: _learn(digits, name, of, seed, checkpoint),
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
            trained[name], seeds[name] = _trials(digits, name, names[name], context.seeds), list(context.seeds)
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
    Column("steps", "steps", 0),
    Column("passes", "times through the recordings", 0),
    Column("parameters", "parameters", 0),
]
_HELD_COLUMNS = [*_BITS, *_COSTS]


def _note(digits: Digits) -> str:
    return f"{len(digits.split['test']):,} recordings of {' and '.join(digits.held)}"


def _about(digits: Digits) -> str:
    usual = CONTENDERS[LTI]
    return (
        "The Free Spoken Digit Dataset, six speakers, official split: takes 0 to 4 of each digit and speaker are the "
        f"test ({len(digits.split['test']):,} recordings), takes 47 to 49 choose the weights, the others ("
        f"{len(digits.split['train']):,}) are trained on. 8-bit mu-law at fixed full scale, sample by sample, given "
        "digit and speaker. U-Nets have three resolutions, windows of 4 joined twice, and 4 layers each way; S4 is the "
        "diagonal one, with an MLP behind each layer; stacks have 8 layers. All are of about 6 M parameters and "
        f"trained for {digits.minutes:g} minutes of steps (compiling and looking at the validation recordings do not "
        "count), in rows of 4,096 samples, 16 a step; AdamW, peak 2e-3, a cosine that ends with the clock, weight "
        f"decay 0.1, an average of the weights (0.999), dropout {usual.dropout:g}; one half of the rows is made louder "
        f"or softer by up to {usual.variation.gain:g} dB, one half begins up to {usual.variation.shift} samples later. "
        "bf16 autocast in training; bits in fp32. What bounds them: 'training recordings' has the same weights' bits "
        "on recordings that they were trained on, and 'background noise alone' what a model that knows everything but "
        "the noise would still pay, if speech and stationary Gaussian noise as in a recording's quietest frames add "
        "up. Clips: at temperature 1, as many as there are test recordings, each as long as a training recording of "
        "its digit and speaker; FID against all recordings that may be trained on. A second seed for the two that lead "
        "on the validation recordings."
    )


_GUIDED = (
    "The same weights: logits without digit and speaker, plus so many times what these change (Ho and Salimans, "
    "arXiv:2207.12598); a tenth of the rows in training were not told them. 'Published code' is what SaShiMi's code "
    "computes under these names (see `mambaseq audio/score --help`)."
)
_HELD = (
    f"Trained on four speakers, given the digit alone, tested on all recordings of the two others "
    f"({' and '.join(spoken.HELD_OUT)}); all else as above."
)

recipe = Recipe(run, seeds=2, brings=True, by_clock=True)
