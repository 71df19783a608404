"""The demo's section on sound: bits a sample next to count models, and generated digits next to real ones."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.checkpoints.card import read_card
from mambaseq.conditions import single
from mambaseq.conditions import told as told_condition
from mambaseq.errors import paragraph
from mambaseq.reporting import Section, audio_player, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars
from mambaseq.reporting.curves import loss_charts
from mambaseq.reporting.runs import RunFolder
from mambaseq.resources import share
from mambaseq.runs.generation import generate_to
from mambaseq.runs.known import Known
from mambaseq.runs.parsing import parse_config
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import ClipData
from mambaseq_audio.comparing import REAL, speaker, spoken
from mambaseq_audio.players import Clip, clip, grid, scales
from mambaseq_audio.spectrogram import draw, sketch

SHOWN = 5
HERE = "learned here"
SECONDS = 0.8  # of what a model that ships says
# bits a sample of the bigram on the official test split of the full data set, which does not ship
SIX_SPEAKERS = 5.45


def report(run: Path) -> Section:
    """Section of a finished `audio/clips` run."""
    folder = RunFolder(run)
    results = folder.read_results()
    data = parse_config(str(folder.config), []).make_data()
    assert isinstance(data, ClipData)
    floors = unigram_bigram(data.clips("train"), data.clips("test"))
    bits = results["test/bits_per_token"]
    folder.update_results((), **{f"report/{name}": value for name, value in floors.items()})
    real = real_clips(data)
    names = list(data.condition_names) or list(real)[: 2 * SHOWN]
    files = generate_to(run, folder.path / "generated", condition=names, seed=0, progress=True).files
    generated = {name: soundfile.read(file, dtype="float32")[0] for name, file in zip(names, files, strict=True)}
    sounds = {f"{name}, {kind}": of[name] for name in names for kind, of in (("real", real), ("generated", generated))}
    seconds, peak = scales(list(sounds.values()), data.sample_rate)
    drawn = [
        audio_player(sounds[told], data.sample_rate, told, sketch(sounds[told], data.sample_rate, seconds, peak, told))
        for told in (f"{names[0]}, real", f"{names[0]}, generated")
    ]
    others = shipped(names)
    seconds = max([seconds, *(len(sound) / one.rate for one in others.made for sound in one.sounds.values())])

    def cells(name: str) -> dict[str, Clip | str]:
        heard = {REAL: real[name], HERE: generated[name]}
        row: dict[str, Clip | str] = {of: clip(one, data.sample_rate, seconds, peak) for of, one in heard.items()}
        for one in others.made:
            said = one.sounds.get(name)
            row[one.name] = "It does not know this." if said is None else clip(said, one.rate, seconds, peak)
        return row

    heard = grid([(name, cells(name)) for name in names], [REAL, HERE, *(one.name for one in others.made)])
    shown = {told.replace(",", ":"): sound for told, sound in list(sounds.items())[: 2 * SHOWN]}
    with atomic_file(folder.path / "digits.png") as file:
        file.write(draw(shown, data.sample_rate))
    rows: list[tuple[str, float]] = [
        ("mambaseq", bits),
        ("mu-law bigram, the same clips", floors["bigram"]),
        ("mu-law unigram, the same clips", floors["unigram"]),
        ("mu-law bigram, all six speakers of the full data set", SIX_SPEAKERS),
    ]
    chart = bars([Bar(name, value, 0 if name == "mambaseq" else 2) for name, value in rows])
    chart = drawing(chart, "Bits a sample on the test clips: fewer are better")
    figures = table(("method", "bits a sample on the test clips"), rows)
    curves = loss_charts(folder, 1 / math.log(2), "bits a sample")
    verdict = "below" if bits < floors["bigram"] else "above"
    summary = f"{bits:.3f} bits a sample on held-out takes, {verdict} the mu-law bigram ({floors['bigram']:.3f})"
    body = (
        "<p>A model of sound without a vocoder: it predicts each of 8,000 samples a second from those before it, told "
        "which digit is spoken.</p>"
        f'<div class="wide">{side_by_side(chart + figures, curves)}</div>'
        "<p>Each digit as it was said in a take that the model never heard, and as the model says it. All pictures "
        f"have one scale of time and loudness.</p>{others.told}{heard}"
    )
    highlight = side_by_side(*drawn) + chart
    return Section("Audio: spoken digits, sample by sample", summary, body, highlight)


class Made(NamedTuple):
    """A model that ships, and what it says for each name that it knows."""

    name: str
    rate: int
    sounds: dict[str, np.ndarray]


class Shipped(NamedTuple):
    """Models that ship and speak. told: HTML that says which."""

    made: list[Made]
    told: str


def shipped(names: Sequence[str]) -> Shipped:
    """Every model of sound in `data/models`, speaking. One that cannot be used is told, and takes nothing from the
    page."""
    made, told = [], ""
    folder = share() / "data" / "models"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            card = read_card(path / "model.json")
            if card.writer != ClipData.writer or not str((card.tokenizer or {}).get("name")).startswith("audio/"):
                continue
            loaded = load_model(path)
            one = speaker(path, path.name, loaded)
            said = {name: text for number, name in enumerate(names) if (text := asked_as(loaded, name, number))}
            asked = list(said.values()) if one.conditional else [""] * len(names)
            rows = [(one_asked, 0 if one.conditional else number) for number, one_asked in enumerate(asked)]
            heard = spoken(one, loaded, rows, seconds=SECONDS)
            sounds = {
                name: sound
                for name, sound in zip(said if one.conditional else names, heard.signals, strict=True)
                if not isinstance(sound, str)
            }
            made.append(Made(f"{path.name}, which ships", one.rate, sounds))
            example = f" --condition {shlex.quote(asked[0])}" if one.conditional and asked else ""
            command = f"mambaseq generate --checkpoint mambaseq:data/models/{path.name}{example} --out said.wav"
            told += (
                f"<p>Beside it speaks <b>{html.escape(path.name)}</b>, a model of {loaded.model.n_parameters():,} "
                f"parameters that ships with mambaseq, trained for longer: <code>{html.escape(command)}</code></p>"
            )
        except Exception as error:  # the demo is complete without
            reason = paragraph(f"{type(error).__name__}: {error}", 300)
            told += f"<p>The model {html.escape(path.name)} that ships could not speak: {html.escape(reason)}</p>"
    return Shipped(made, told)


def asked_as(loaded: LoadedModel, name: str, number: int) -> str:
    """A condition of a model with this name among its values, as `mambaseq generate` takes it: the value itself, or one
    with this word in it ("7 theo"). Where there are several, and of what else the model is conditioned on, another one
    for each number. "" where no condition has it."""
    known = Known(loaded).all
    fitting = [
        [value for value in one.names if value == name] or [value for value in one.names if name in value.split()]
        for one in known
    ]
    if not any(fitting):
        return ""
    chosen = [
        values[number % len(values)] if (values := of or list(one.names)) else f"{one.mean:.4g}"
        for of, one in zip(fitting, known, strict=True)
    ]
    if single(known):
        return chosen[0]
    return " ".join(f"{one.name}={value}" for one, value in zip(known, chosen, strict=True))


def real_clips(data: ClipData) -> dict[str, np.ndarray]:
    """The first test clip of each condition, as a waveform `(samples,)`, by what the condition is called."""
    test = data.test()
    assert test is not None
    conditions: Any = test.conditions
    assert conditions is not None
    first: dict[str, np.ndarray] = {}
    for levels, condition in zip(data.clips("test"), conditions, strict=True):
        first.setdefault(told_condition(data.conditions, condition), data.codec.decode(levels))
    return first
