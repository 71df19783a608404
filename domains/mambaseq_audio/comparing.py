"""`mambaseq audio/compare`: a page on which runs are compared by ear, side by side with real recordings."""

from __future__ import annotations

import html
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError, UserError, cut_list, paragraph, shown
from mambaseq.generation.checks import continues
from mambaseq.limits import check_setting, check_whole
from mambaseq.outputs import output_target
from mambaseq.reporting import Section, table
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import RunFolder
from mambaseq.resources import located
from mambaseq.runs.generation import generate_from
from mambaseq.runs.known import Known, condition_ids
from mambaseq.runs.parsing import parse_config
from mambaseq_audio.players import Clip, clip, grid, scales
from mambaseq_audio.references import Reference, references, signal_of, sound_of, title

MOST_RUNS, MOST_ROWS, MOST_SECONDS = 12, 64, 60.0
MOST_SOUND = 48 * 2**20
"""Bytes of 16-bit sound in a page, before it is packed."""
REAL = "real"


class Speaker(NamedTuple):
    """A model that makes sound, and what is said of it. name: its column. told: cells of a table."""

    name: str
    path: Path
    rate: int
    channels: int
    conditional: bool
    told: dict[str, Any]


class Heard(NamedTuple):
    """signals: a row for each (condition, number), the sound or why there is none. seconds: that making them took."""

    signals: list[np.ndarray | str]
    seconds: float


def speaker(path: str | Path, name: str, loaded: LoadedModel) -> Speaker:
    """Raises ConfigError for a model that generates no sound."""
    card = loaded.card
    rate = card.writer_options.get("sample_rate")
    if loaded.tokenizer is None or not isinstance(rate, int) or not continues(loaded.model, "tokens"):
        raise ConfigError(
            f"The model at {shown(path)} generates no sound. Give runs of audio/clips or audio/waveform with the head "
            "lm, or models exported from them."
        )
    folder = RunFolder(located(path))
    results = folder.read_results() if folder.config.is_file() else {}
    told: dict[str, Any] = {"bits a sample, test": results.get("test/bits_per_token", "")}
    told["bits a sample, validation"] = results.get("val/bits_per_token", "") or _logged(folder)
    told["parameters"] = loaded.model.n_parameters()
    told["steps"] = "" if card.step is None else card.step
    conditional = bool(Known(loaded).all)
    return Speaker(name, Path(path), rate, int(card.writer_options.get("channels", 1)), conditional, told)


def _logged(folder: RunFolder) -> float | str:
    """Bits of the last validation; "" where there was none."""
    points = folder.points("val/loss") if folder.config.is_file() else []
    return points[-1].value / math.log(2) if points else ""


def spoken(
    one: Speaker,
    loaded: LoadedModel,
    rows: Sequence[tuple[str, int]],
    *,
    seconds: float | None = None,
    seed: int = 0,
    temperature: float | None = None,
    device: str | None = None,
) -> Heard:
    """What a model says for each (condition, number): the sample of this number under the condition, by one seed. A
    model without conditions gives its samples in the order of the rows.

    seconds: of each; None is the run's own, at most 60. A condition that the model does not know is told in its place.
    """
    ours: list[tuple[str, int] | str] = []
    for number, (said, place) in enumerate(rows):
        if not one.conditional:
            ours.append(("", number))
            continue
        try:
            asked = condition_ids(loaded, said or None)
            if len(asked) > 1:
                raise ConfigError(f"{shown(said)} is several conditions. Give them one by one.")
            ours.append((said, place) if asked else ("", number))
        except ConfigError as error:
            ours.append(paragraph(error, 200))
    known = list(dict.fromkeys(row[0] for row in ours if not isinstance(row, str)))
    if not known:
        return Heard([row if isinstance(row, str) else "" for row in ours], math.inf)
    count, _ = length_of(loaded, one, seconds)
    made: dict[tuple[str, int], np.ndarray] = {}
    began = time.perf_counter()
    for conditions in ([said for said in known if said], [""] if "" in known else []):
        if conditions:
            samples = 1 + max(row[1] for row in ours if not isinstance(row, str) and row[0] in conditions)
            found = generate_from(
                one.path,
                condition=conditions if conditions[0] else None,
                samples=samples,
                max_new_tokens=count,
                seed=seed,
                temperature=temperature,
                device=device,
            )
            made |= zip(itertools.product(conditions, range(samples)), found.ids, strict=True)
    took = time.perf_counter() - began
    assert loaded.tokenizer is not None
    signals: list[np.ndarray | str] = []
    for row in ours:
        if isinstance(row, str):
            signals.append(row)
        else:
            signals.append(signal_of(loaded.tokenizer, made[row], one.channels))
    return Heard(signals, took)


def length_of(loaded: LoadedModel, one: Speaker, seconds: float | None) -> tuple[int, float]:
    """Tokens and seconds of a clip: of so many seconds, or as long as the run's own, at most 60 seconds."""
    card = loaded.card
    assert loaded.tokenizer is not None
    probe = np.resize(np.asarray(card.start_ids or [0], dtype=np.int64), 256 * one.channels)
    a_second = len(probe) * one.rate / max(len(signal_of(loaded.tokenizer, probe, one.channels)), 1)
    most = (MOST_SECONDS if seconds is None else seconds) * a_second
    own = card.generation.get("max_new_tokens") or card.length
    count = max(1, round(min(own, most) if seconds is None and own else most))
    return count, count / a_second


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """A short name for each, unlike the others: its folder, with those above it as far as they differ.

    >>> names_of(["runs/a", "runs/b/model", "old/a"])
    ['runs/a', 'b', 'old/a']
    """
    whole = [Path(str(path).rpartition(":")[2]).parts for path in paths]
    parts = [[part for part in one if part != "model"] or ["model"] for one in whole]
    found = []
    for own in parts:
        for depth in range(1, len(own) + 1):
            if sum(other[-depth:] == own[-depth:] for other in parts) == 1:
                break
        found.append("/".join(own[-depth:]))
    return [name if found.count(name) == 1 and name != REAL else f"{name} ({i})" for i, name in enumerate(found, 1)]


def real_of(
    paths: Sequence[str | Path], rows: int, said: Sequence[str], note: list[str]
) -> tuple[SequenceData | None, list[Reference]]:
    """Recordings of the test set, or else the validation set, of the first run whose data are there. What is missing is
    added to `note`."""
    for path in paths:
        config = RunFolder(located(path)).config
        if not config.is_file():
            continue
        try:
            data = parse_config(str(config), []).make_data(setup=True)
        except UserError as error:
            note.append(f"No recordings of {path}: {paragraph(error, 200)}")
            continue
        for name, of in (("test", data.test()), ("validation", data.validation())):
            if of is not None and not isinstance(of, dict) and (found := references(data, rows, of, said)):
                note.append(f"The recordings are of the {name} set of {path}.")
                return data, found
    return None, []


def compare(
    paths: Sequence[str | Path],
    out: Path,
    *,
    conditions: Sequence[str] = (),
    rows: int = 10,
    seconds: float | None = None,
    seed: int = 0,
    temperature: float | None = None,
    blind: bool = False,
    device: str | None = None,
) -> list[str]:
    """Write a page with a row for each condition and a column for each run, real recordings first. Returns what there
    is to say.

    conditions: as `mambaseq generate --condition` takes them; none are those of the recordings, or else of the first
        model. rows: at most so many. Every row has one seed for all runs.
    Raises UserError for models that make no sound, or a page that would be too large.
    """
    check_setting("RUN ...", len(paths), 1, MOST_RUNS)
    check_whole("--rows", rows, 1, MOST_ROWS)
    if seconds is not None:
        check_setting("--seconds", seconds, 0.01, MOST_SECONDS)
    out = output_target(out)
    notes: list[str] = []
    models = [load_model(path) for path in paths]
    speakers = [speaker(path, name, one) for path, name, one in zip(paths, names_of(paths), models, strict=True)]
    data, reals = real_of(paths, rows, conditions, notes)
    places = [(one.said, one.number) for one in reals]
    places += [(said, 0) for said in conditions if said not in [one.said for one in reals]]
    if not places:
        notes.append("There are no real recordings to compare with.")
        first = next((one for one, of in zip(models, speakers, strict=True) if of.conditional), None)
        places = [(said, 0) for said in (Known(first).examples(rows) if first else ())] or [
            ("", number) for number in range(min(rows, 4))
        ]
    lengths = [length_of(loaded, one, seconds)[1] for one, loaded in zip(speakers, models, strict=True)]
    size = sum(2 * one.channels * one.rate * length for one, length in zip(speakers, lengths, strict=True))
    if size * len(places) > MOST_SOUND:
        raise ConfigError(
            f"{len(places)} clips of each run are {size * len(places) / 2**20:,.0f} MiB of sound in one page, and "
            f"{MOST_SOUND / 2**20:,.0f} are the most. Lower --seconds or --rows."
        )
    columns: dict[str, tuple[int, list[np.ndarray | str]]] = {}
    if data is not None:
        rate, channels = sound_of(data)
        assert data.tokenizer is not None
        sounds = [signal_of(data.tokenizer, one.ids, channels)[: round(max(lengths) * rate)] for one in reals]
        columns[REAL] = rate, [*sounds, *["No recording of the set is this."] * (len(places) - len(reals))]
    told = []
    for one, loaded in zip(speakers, models, strict=True):
        heard = spoken(one, loaded, places, seconds=seconds, seed=seed, temperature=temperature, device=device)
        columns[one.name] = one.rate, heard.signals
        made = sum(len(signal) for signal in heard.signals if not isinstance(signal, str)) / one.rate
        speed = made / heard.seconds if made else "-"
        told.append({"run": one.name, **one.told, "times real time, loading included": speed})
    beside = " and real recordings" if data is not None else ""
    lead = f"{cut_list([one.name for one in speakers], 4)}{beside}: the same conditions and one seed ({seed}) for all."
    _write(out, lead, notes, told, places, columns, blind)
    return notes


def _write(
    out: Path,
    lead: str,
    notes: Sequence[str],
    told: Sequence[dict[str, Any]],
    places: Sequence[tuple[str, int]],
    columns: dict[str, tuple[int, list[np.ndarray | str]]],
    blind: bool,
) -> None:
    sounds = [(rate, one) for rate, signals in columns.values() for one in signals if not isinstance(one, str)]
    sizes = [scales([one], rate) for rate, one in sounds] or [(1.0, 1.0)]
    seconds = max(size[0] for size in sizes)
    real = [one for one in columns.get(REAL, (1, []))[1] if not isinstance(one, str)]
    peak = scales(real, 1)[1] if real else max(size[1] for size in sizes)

    def cell(rate: int, signal: np.ndarray | str) -> Clip | str:
        return signal if isinstance(signal, str) else clip(signal, rate, seconds, peak)

    rows = [
        (title(*place), {name: cell(rate, signals[number]) for name, (rate, signals) in columns.items()})
        for number, place in enumerate(places)
    ]
    keys = [key for key in told[0] if any(row[key] != "" for row in told)]
    figures = table(keys, [[row[key] for key in keys] for row in told])
    said = html.escape(" ".join([*notes, "All pictures have one scale of time and loudness."]))
    body = f"{figures}<p>Fewer bits a sample are better; what one hears is another matter. {said}</p>"
    body += grid(rows, list(columns), blind=blind, name="runs side by side")
    write_page(out, "Compared by ear", lead, [Section("Side by side", "", body)])
