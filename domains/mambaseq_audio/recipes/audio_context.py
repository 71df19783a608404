"""Bits a byte of long recordings by how much of them a model sees: selective mixers against time-invariant ones, real
and complex (Gu and Dao, arXiv:2312.00752, section 4.4.1 and appendix E.4)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.atomic import atomic_file
from mambaseq.errors import DataError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reporting.charts import DARK, LIGHT, STYLE, Curve, lines
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_audio.io import read_signal
from mambaseq_audio.mulaw import LEVELS, MuLaw
from mambaseq_audio.recipes.spoken import bits_of_pieces

RATE = 16_000
SOURCE = (
    "from the GitHub repository librosa/data, commit 450cdd8a002c98e7bdbfebb309fc1ed024001f77, folder audio/, by the "
    "name of the piece (hungarian_dance_5_16k.wav: that recording at 16 kHz, one channel, 16 bits)"
)
FILES = {
    "hungarian_dance_5_16k.wav": "96c2cc96d4af6a308ccbeb52974da3453443875ec49b8c482c47ee707d879890",
    "sugar_plum_fairy.ogg": "b5c1a3e26310e6618d3c124f458654cd235650fcb9db7d711302644566600484",
    "vibe_ace.ogg": "6c23aed3dd5aa57f2b1652ecab68d15d9b82ad257f54e639eb2880ca09bc118a",
    "lets_go_fishin.ogg": "27b3667c396c1831511aa3c415fcf582b6e8be560cafb844c5b67b76b72c1cb3",
    "humpback_whale.ogg": "64395c617b28b5e31a03032b99b4617bc96b926f3bc5c141862cd13fb79ccd8e",
}
"""Public domain (hungarian_dance_5, humpback_whale) and CC BY 3.0 (Kevin MacLeod; Karissa Hobbs)."""
TESTED = 0.2  # share of each recording, at its end

WINNER = "LTI, complex"
# as many real numbers a channel are the state of each
MIXERS: dict[str, dict[str, Any]] = {
    WINNER: {"name": "mamba", "lti": True, "d_state": 8},
    "LTI, real": {"name": "mamba", "lti": True, "lti_complex": False, "d_state": 16},
    "selective, real": {"name": "mamba", "d_state": 16},
    "selective, complex": {"name": "mamba", "complex": True, "d_state": 8},
}


class Sizes(NamedTuple):
    """contexts: positions a window, each with `tokens` a step for `steps` steps."""

    contexts: tuple[int, ...]
    tokens: int
    steps: int


def sizes(context: Context) -> Sizes:
    return context.at(
        full=Sizes((2**11, 2**13, 2**15, 2**17), 2**17, 300),
        small=Sizes((2**9, 2**11), 2**12, 100),
        tiny=Sizes((32, 64), 64, 2),
    )


class Sound(NamedTuple):
    """train: all training parts, one after the other, `(samples,)` uint8. test: `(windows, longest + 1)` uint8."""

    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, recordings: list[np.ndarray], longest: int, device: torch.device) -> Sound:
        """Of each recording `(samples,)` of levels, as many windows of the longest context as its last fifth holds are
        the test, and what is before them is trained on.

        Raises DataError for a recording whose last fifth holds none.
        """
        train, test = [], []
        for number, levels in enumerate(recordings):
            count = (int(TESTED * len(levels)) - 1) // longest
            if count < 1:
                raise DataError(
                    f"The last fifth of recording {number + 1} holds no {longest:,} samples. Use longer ones."
                )
            first = len(levels) - count * longest - 1
            train.append(levels[:first])
            test += [levels[at : at + longest + 1] for at in range(first, len(levels) - longest, longest)]
        parts = (np.concatenate(train), np.stack(test))
        return cls(*(torch.from_numpy(part).to(device) for part in parts))


def run(context: Context) -> list[Table]:
    context.wanted(MIXERS)
    paths = [context.brought(name, sha256, SOURCE) for name, sha256 in FILES.items()]
    return tables(context, [MuLaw().encode(read_signal(path, RATE)) for path in paths])


def tables(context: Context, recordings: list[np.ndarray]) -> list[Table]:
    """The recipe on recordings in levels, `(samples,)` uint8."""
    of = sizes(context)
    sound = Sound.of(recordings, of.contexts[-1], context.device)
    wanted = context.wanted(MIXERS)
    found: dict[str, dict[str, list[float]]] = {}
    for name in wanted:
        values: dict[str, list[float]] = {}
        for length in of.contexts:
            ends = length in (of.contexts[0], of.contexts[-1])
            for seed in context.seeds if ends else context.seeds[:1]:
                one = context.trial(
                    f"{name} context={length} seed={seed}",
                    functools.partial(_trained, context, sound, name, length, seed),
                )
                values.setdefault(f"bits {length}", []).append(one["bits"])
                values["parameters"] = [one["parameters"]]
                values.setdefault("seconds", [0.0])[0] += one["seconds"]
        found[name] = values
    made = [Line(name, values) for name, values in found.items()]
    if WINNER in found and len(found) > 1:
        made.append(_verdict(found, of.contexts))
    _draw(context, found, of.contexts)
    columns = [Column(f"bits {length}", f"bits a byte, context {length:,}", 3) for length in of.contexts]
    columns += [Column("parameters", "parameters", 0), Column("seconds", "seconds, all contexts", 0)]
    return [Table("Selective or time-invariant, by context", _about(context, sound), columns, made)]


def _model(context: Context, name: str) -> SequenceModel:
    spec = {
        "d_model": context.at(full=64, small=32, tiny=8),
        "encoder": {"name": "tokens", "vocab_size": LEVELS},
        "backbone": {"name": "unet", "n_layers": context.at(full=2, small=1, tiny=1), "pool": [4, 4], "expand": 2},
        "mixer": MIXERS[name],
        "head": {"name": "lm", "vocab_size": LEVELS},
    }
    return build_model(spec).to(context.device)


def _trained(context: Context, sound: Sound, name: str, length: int, seed: int, checkpoint: Path) -> dict[str, float]:
    torch.manual_seed(seed)
    model, of = _model(context, name), sizes(context)
    done = train(
        model,
        of_text(sound.train, length, max(of.tokens // length, 1), seed),
        of.steps,
        OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=of.steps // 10),
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        checkpoint=checkpoint,
        label=f"{name}, context {length}",
    )
    found = bits_of_pieces(model, sound.test, length, of.tokens)
    return {"bits": found, "parameters": model.n_parameters(), "seconds": done.seconds}


def _verdict(found: dict[str, dict[str, list[float]]], contexts: tuple[int, ...]) -> Line:
    """By how much the complex time-invariant mixer is ahead of the best of the others, seed by seed."""
    others = [name for name in found if name != WINNER]
    ahead: dict[str, list[float]] = {}
    for length in contexts:
        key = f"bits {length}"
        best = [min(of) for of in zip(*(found[name][key] for name in others), strict=True)]
        ahead[key] = [other - own for own, other in zip(found[WINNER][key], best, strict=True)]
    last = ahead[f"bits {contexts[-1]}"]
    said = "yes" if min(last) > 0 else "no" if max(last) < 0 else "in some of the seeds"
    bound = Bound(f"bits {contexts[-1]}", ">=", 0.0)
    return Line(
        f"does '{WINNER}' win? ahead of the best other by", ahead, "yes", (bound,), f"at the longest context: {said}"
    )


def _draw(context: Context, found: dict[str, dict[str, list[float]]], contexts: tuple[int, ...]) -> None:
    """Write `context.svg` into the recipe's folder."""
    curves = []
    for name, values in found.items():
        kind = "dots" if "complex" in name else "curve"
        short = name.replace(", complex", " \u2102 \u2022").replace(", real", " \u211d")  # the legend is one line
        ys = [float(np.mean(values[f"bits {length}"])) for length in contexts]
        xs = [float(np.log2(length)) for length in contexts]
        curves.append(Curve(short, xs, ys, kind, int(not name.startswith("LTI"))))
    head, body = lines(curves, "log2 of the context in samples", "bits", 260).split(">", 1)
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    ground = '<rect width="100%" height="100%" rx="8" fill="var(--ground)"/>'
    with atomic_file(context.folder / "context.svg", "w", encoding="utf-8") as file:
        file.write(f"{head}><style>{style}</style>{ground}{body}\n")


def _about(context: Context, sound: Sound) -> str:
    of = sizes(context)
    return (
        f"Five recordings (four of music, one of a humpback whale; {len(sound.train) / RATE:.0f} s to train on, one "
        "after the other) at 16 kHz in 8-bit mu-law levels. U-Nets over three resolutions, windows of 4 joined twice; "
        f"{of.steps:,} steps of {of.tokens:,} samples whatever the context, AdamW, peak 2e-3, bf16 autocast on a GPU. "
        f"Bits a byte of the same {sound.test.shape[0]} stretches of {sound.test.shape[1] - 1:,} samples at the "
        "recordings' ends, in pieces of the context that know nothing of what is before them. Each state has as many "
        "real numbers. Two seeds at the shortest and the longest context, one between; the verdict is of the mean at "
        "the longest, and the column paper its finding on hours of piano music after many more steps. As many samples "
        "a step are fewer windows the longer they are: these figures do not tell apart what a longer context says and "
        "what is lost by seeing fewer places. A picture is in context.svg."
    )


recipe = Recipe(run, seeds=2, brings=True)
