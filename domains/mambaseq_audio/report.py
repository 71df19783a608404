"""The demo's section on sound: bits a sample beside counts, and what the model says beside what was said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile

from mambaseq.atomic import atomic_file
from mambaseq.reporting import Section, audio_player, picture, table
from mambaseq.reporting.pictures import learning_curves
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.generation import generate_to
from mambaseq.runs.parsing import parse_config
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clips import ClipData
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.spectrogram import draw

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
    names = list(data.condition_names)
    files = generate_to(run, folder.path / "generated", condition=names, seed=0, progress=True).files
    generated = {name: soundfile.read(file, dtype="float32")[0] for name, file in zip(names, files, strict=True)}
    real = real_clips(data)
    shown = {}
    for name in names[:SHOWN]:
        shown[f"{name}: real"], shown[f"{name}: generated"] = real[name], generated[name]
    players = "".join(
        audio_player(real[name], data.sample_rate, f"{name}, real")
        + audio_player(generated[name], data.sample_rate, f"{name}, generated")
        for name in names
    )
    drawn = draw(shown, data.sample_rate)
    with atomic_file(folder.path / "digits.png") as file:
        file.write(drawn)
    body = (
        table(
            ("method", "bits a sample on the test clips"),
            [
                ("mambaseq", bits),
                ("mu-law bigram, the same clips", floors["bigram"]),
                ("mu-law unigram, the same clips", floors["unigram"]),
                ("mu-law bigram, all six speakers of the full data set", SIX_SPEAKERS),
            ],
        )
        + picture(learning_curves(folder, 1 / math.log(2), "bits a sample"), "Learning curves")
        + picture(drawn, "Real and generated: waveform above log spectrogram")
        + players
    )
    verdict = "below" if bits < floors["bigram"] else "above"
    summary = f"{bits:.3f} bits a sample on held-out takes, {verdict} the mu-law bigram ({floors['bigram']:.3f})"
    return Section("Audio: spoken digits, sample by sample", summary, body)


def real_clips(data: ClipData) -> dict[str, np.ndarray]:
    """The first test clip of each condition, as a waveform."""
    test = data.test()
    assert test is not None
    conditions = test.conditions
    assert conditions is not None
    first: dict[str, np.ndarray] = {}
    for clip, condition in zip(data.clips("test"), conditions, strict=True):
        first.setdefault(data.condition_names[condition], MuLaw().decode(clip))
    return first
