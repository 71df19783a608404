"""What models of spoken digits say: clips of every digit by every speaker, those of them that rejection sampling keeps,
written as sound files and scored."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import torch

from mambaseq.atomic import atomic_folder, atomic_path
from mambaseq.checkpoints import load_model
from mambaseq.errors import UserError
from mambaseq.generation.decode import generate
from mambaseq.models import SequenceModel
from mambaseq_audio.io import write_wav
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recipes import spoken
from mambaseq_audio.recipes.spoken_training import LONGEST
from mambaseq_audio.scores import kept
from mambaseq_audio.scoring import recognise_levels

if TYPE_CHECKING:
    from mambaseq_audio.recipes.spoken_digits import Digits


def stem(name: str, minutes: float, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '_')}-{minutes:g}min-seed{seed}"


def speak(digits: Digits, name: str, guidance: float, seed: int) -> dict[str, float]:
    """Clips of every digit by every speaker, as many as there are test recordings; written, and scored."""
    said = say(digits, _model(digits, name, seed), takes(digits), guidance, seed)
    return hear(digits, said, stem(name, digits.minutes, seed) + ("" if guidance == 1 else f"-guidance{guidance:g}"))


def speak_and_choose(digits: Digits, name: str, seed: int) -> dict[str, float]:
    """The same number of clips: those that rejection sampling as published keeps of each digit by each speaker, by the
    bits a sample that they cost the model that made them."""
    model, of_each = _model(digits, name, seed), pool(takes(digits))
    said = say(digits, model, of_each, 1.0, seed)
    cost = spoken.bits_of_each(model, said.clips, digits.conditions[said.like])
    chosen = kept_within(cost, of_each)
    values = hear(digits, said.only(chosen), f"{stem(name, digits.minutes, seed)}-kept")
    return {**values, "all_bits": float(cost.mean()), "kept_bits": float(cost[chosen].mean())}


class Said(NamedTuple):
    """Clips that a model has made: their names, levels, and the recordings that each is as long as."""

    names: list[str]
    clips: list[np.ndarray]
    like: np.ndarray

    def only(self, chosen: np.ndarray) -> Said:
        return Said([self.names[i] for i in chosen], [self.clips[i] for i in chosen], self.like[chosen])


def takes(digits: Digits) -> int:
    """Clips of each digit by each speaker, so that there are as many as test recordings."""
    return max(len(digits.split["test"]) // len(digits.names), 1)


def pool(wanted: int) -> int:
    """How many clips the published band keeps so many of."""
    return next(n for n in itertools.count(2) if len(kept(np.arange(n))) == wanted)


def kept_within(cost: np.ndarray, of_each: int) -> np.ndarray:
    """Indices of the clips that the published band keeps of each `of_each` clips, which have one condition. cost:
    `(clips,)`, bits a sample, from which those that cost most are ranked lowest."""
    groups = np.arange(len(cost)).reshape(-1, of_each)
    return np.concatenate([np.sort(group[kept(-cost[group])]) for group in groups])


def _model(digits: Digits, name: str, seed: int) -> SequenceModel:
    folder = digits.context.folder / "models" / stem(name, digits.minutes, seed)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing. Remove the trials of {name} from {digits.context.folder} to train it again."
        )
    return load_model(folder, digits.context.device).model


def say(digits: Digits, model: SequenceModel, of_each: int, guidance: float, seed: int) -> Said:
    """So many clips of every digit by every speaker, each as long as a training recording of them; those of one
    condition follow each other."""
    context = digits.context
    longest = context.at(full=LONGEST, small=LONGEST, tiny=32)
    chosen = digits.split["train"]
    rng = np.random.default_rng(seed)
    names, like = [], []
    for number, said in enumerate(digits.names):
        some = chosen[digits.conditions[chosen] == number]
        if len(some):
            like += rng.choice(some, of_each).tolist()
            names += [f"{said.replace(' ', '_')}_{take}" for take in range(of_each)]
    lengths = [min(len(digits.recordings.signals[i]), longest) for i in like]
    condition = torch.from_numpy(digits.conditions[like]).to(context.device)
    prompt = torch.full((len(like), 1), MuLaw.start_id, device=context.device)
    ids = generate(model, prompt, max(lengths), guidance=guidance, seed=seed, condition=condition)[:, 1:]
    clips = [row[:length] for row, length in zip(ids.cpu().numpy().astype(np.uint8), lengths, strict=True)]
    return Said(names, clips, np.array(like))


def hear(digits: Digits, said: Said, place: str) -> dict[str, float]:
    """Write clips, and score them."""
    write(digits.context.folder / "clips" / place, said.names, said.clips)
    return digits.scored(recognise_levels(digits.loaded, said.names, said.clips), digits.recordings.digits[said.like])


def write(place: Path, names: Sequence[str], clips: Sequence[np.ndarray], replace: bool = True) -> None:
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
