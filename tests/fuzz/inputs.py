"""Files that are read: to be predicted, to train on, as prompts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mutations as m
from cases import Case, Place, as_argument, condition, generated_as, mutated_input, predict


def fasta(place: Place) -> Case:
    rng = place.rng
    run = place.one_of("dna_lm", "dna_labels")
    if rng.random() < 0.01:
        path = place.folder / "bomb.fa.gz"
        path.symlink_to(place.world.data / "bomb.gz")
    else:
        path = mutated_input(place, ("genome.fa", "genome.fa", "other.fa.gz", "genome.fa.bgz"))
    return Case(predict(place.world.run(run), path, place.folder / "out.csv"), {path.name})


def _lying_wav(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        place, width = rng.choice(((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4)))
        known = (0, 1, 3, 8, 16, 24, 11127, 44101, 48001, 655343, 2**31 - 1, 2**31, 2**32 - 1, 65534, 65535)
        number = rng.choice(known) % 2 ** (8 * width)
        out[place : place + width] = number.to_bytes(width, "little")
    return bytes(out)


def audio(place: Place) -> Case:
    rng = place.rng
    kind = rng.random()
    if kind < 0.01:
        path = place.folder / "bomb.flac"
        path.symlink_to(place.world.data / "bomb.flac")
    elif kind < 0.3:
        path = place.copy(rng.choice(("tone.wav", "float.wav")))
        path.write_bytes(_lying_wav(rng, path.read_bytes()))
    else:
        path = mutated_input(
            place, tuple(f"tone.{s}" for s in ("wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64")), False
        )
    return Case(predict(place.world.run("audio"), path, place.folder / "out.csv", "--condition", "7"), {path.name})


def text(place: Place) -> Case:
    rng = place.rng
    run = place.one_of("text", "pieces")
    kind = rng.random()
    if kind < 0.015:
        suffix = rng.choice(("gz", "xz"))
        path = place.folder / f"bomb.{rng.choice(('txt', 'jsonl'))}.{suffix}"
        path.symlink_to(place.world.data / f"bomb.{suffix}")
    elif kind < 0.1:
        path = _odd_parquet(place)
    else:
        names = [f"{stem}{packed}" for stem in ("text.txt", "rows.jsonl") for packed in ("", "", ".gz", ".xz", ".zst")]
        path = mutated_input(place, (*names, "rows.parquet"))
    return Case(predict(place.world.run(run), path, place.folder / "out.csv"), {path.name})


def _odd_parquet(place: Place) -> Path:
    import pyarrow
    import pyarrow.parquet

    rng = place.rng
    column: list[Any] = rng.choice(
        ([1, 2], [None, None], ["a", None], [["a"], []], [b"\xff"], [{"a": 1}], [], ["a\0"], [1.5])
    )
    table = pyarrow.table({rng.choice(("text", "text", "Text", "")): column, "id": list(range(len(column)))})
    path = place.folder / "odd.parquet"
    pyarrow.parquet.write_table(table, path)
    return path


def ecg(place: Place) -> Case:
    path = mutated_input(place, ("strip.csv",))
    return Case(predict(place.world.run("ecg"), path, place.folder / "out.csv"), {path.name})


def training_data(place: Place) -> Case:
    """Mutated files to train on."""
    rng = place.rng
    name = place.one_of("dna_lm", "dna_labels", "audio", "text", "pieces")
    key, given, wrong = "files", "", {"data."}
    if name in ("dna_lm", "dna_labels"):
        path = mutated_input(place, ("genome.fa", "genome.fa.bgz", "other.fa.gz"))
        key, given = (
            ("fasta", str([str(path)]))
            if name == "dna_lm"
            else ("species", json.dumps({"one": [str(path)], "two": [str(place.world.data / "other.fa.gz")]}))
        )
    elif name == "audio":
        shutil.copytree(place.world.data / "clips", place.folder / "clips")
        path = rng.choice(sorted((place.folder / "clips").iterdir()))
        kind = rng.random()
        if kind < 0.2:
            path = path.rename(
                path.with_name(rng.choice(("7_me_9.wav", "x.wav", "._a.wav", "é_me_1.wav", "7_me_.wav")))
            )
        elif kind < 0.3:
            m.of_path(rng, path, place.world.folder / "elsewhere.txt")
        else:
            path.write_bytes(_lying_wav(rng, path.read_bytes()) if kind < 0.6 else m.of_bytes(rng, path.read_bytes()))
        given = str(place.folder / "clips")
        wrong |= {"clips"}
    elif name == "text":
        path = mutated_input(place, ("text.txt", "text.txt.gz", "text.txt.xz"))
    else:
        path = mutated_input(place, ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"))
    config = place.world.folder / "configs" / f"{name}.yaml"
    argv = ["fit", "--config", str(config), "--out", str(place.folder / "run"), f"--data.{key}", given or str(path)]
    return Case(argv, {path.name, *wrong})


def prompts(place: Place) -> Case:
    """Harmed prompts, as files and as they are."""
    rng = place.rng
    name = place.one_of("dna_lm", "audio", "text", "pieces")
    out = place.folder / generated_as(name)
    wrong = {"--prompt", "prompt"}
    if rng.random() < 0.6:
        names = {
            "dna_lm": ("genome.fa", "other.fa.gz"),
            "audio": ("tone.wav", "tone.flac", "tone.mp3"),
            "text": ("text.txt", "rows.jsonl", "rows.parquet"),
            "pieces": ("rows.jsonl", "text.txt.gz"),
        }[name]
        path = mutated_input(place, names, name != "audio")
        prompt, wrong = str(path), {*wrong, path.name}
    else:
        prompt = as_argument(rng, m.value(rng, rng.choice(("ACGTN", "To be", 5)), place.canary))
    argv = ["generate", "--checkpoint", str(place.world.run(name)), "--out", str(out), "-n", "3", "--device", "cpu"]
    return Case([*argv, "--prompt", prompt, *condition(name)], wrong)
