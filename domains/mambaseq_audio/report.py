"""The demo's section on sound: bits a sample next to count models, and generated digits next to real ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mambaseq.atomic import atomic_file
from mambaseq.conditions import told as told_condition
from mambaseq.reporting import Section, audio_player, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars
from mambaseq.reporting.curves import loss_charts
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.generation import generate_to
from mambaseq.runs.parsing import parse_config
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import ClipData
from mambaseq_audio.spectrogram import draw, sketch

SHOWN = 5
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
    seconds = max(map(len, sounds.values())) / data.sample_rate
    peak = max(float(np.abs(sound).max(initial=0.0)) for sound in sounds.values())
    drawn = {
        told: audio_player(sound, data.sample_rate, told, sketch(sound, data.sample_rate, seconds, peak, told))
        for told, sound in sounds.items()
    }
    pairs = {name: side_by_side(drawn[f"{name}, real"], drawn[f"{name}, generated"]) for name in names}
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
        "have one scale of time and loudness.</p>"
        f'<div class="pairs">{"".join(f"""<div class="tile">{pairs[name]}</div>""" for name in names)}</div>'
    )
    return Section("Audio: spoken digits, sample by sample", summary, body, pairs[names[0]] + chart)


def real_clips(data: ClipData) -> dict[str, np.ndarray]:
    """The first test clip of each condition, as a waveform."""
    test = data.test()
    assert test is not None
    conditions: Any = test.conditions
    assert conditions is not None
    first: dict[str, np.ndarray] = {}
    for clip, condition in zip(data.clips("test"), conditions, strict=True):
        first.setdefault(told_condition(data.conditions, condition), data.codec.decode(clip))
    return first
