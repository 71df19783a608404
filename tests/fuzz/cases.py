"""A case, and what targets make it of."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import lzma
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations as m
import yaml
from world import World


@dataclasses.dataclass
class Case:
    """argv: the command. wrong: names of files and keys, one of which a refusal must name. same: what an accepted case
    must equal: `(written, expected)` tables, or folders of runs whose weights are compared; None for nothing.
    senseless: what makes no sense, so that the case must be refused; "" for nothing."""

    argv: list[str]
    wrong: set[str] = dataclasses.field(default_factory=set)
    same: tuple[Path, Path] | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    senseless: str = ""


class Place:
    """A case's folder, number and random numbers, and what it may copy from. url, served: of the server of files."""

    def __init__(
        self, world: World, folder: Path, rng: random.Random, url: str, served: dict[str, bytes], number: int
    ) -> None:
        self.world, self.folder, self.rng, self.url, self.served = world, folder, rng, url, served
        self.number = number
        self.canary = str(folder / "canary")

    def one_of(self, *names: str) -> str:
        """One of these runs, of those that the world has."""
        return self.rng.choice([name for name in names if name in self.world.names])

    def copy(self, name: str) -> Path:
        """A copy of a file of the data."""
        target = self.folder / name
        shutil.copyfile(self.world.data / name, target)
        return target

    def run(self, name: str) -> Path:
        """A copy of a finished run."""
        target = self.folder / "run"
        shutil.copytree(self.world.run(name), target)
        return target

    def cache(self) -> Path:
        """A copy of the cache."""
        target = self.folder / "cache"
        shutil.copytree(self.world.cache, target)
        return target

    def mutate(
        self, path: Path, tree: Callable[[random.Random, Any, str], tuple[bytes, set[str]]] | None = None
    ) -> set[str]:
        """Mutate a file where it is; returns the keys that were touched. tree: how, for files of plain values."""
        rng = self.rng
        if rng.random() < 0.06:
            m.of_path(rng, path, self.world.folder / "elsewhere.txt")
            return set()
        data = path.read_bytes()
        if tree is not None and rng.random() < 0.85:
            loaded = yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
            mutated, touched = tree(rng, loaded, self.canary)
        else:
            mutated, touched = m.of_bytes(rng, data), set()
        path.write_bytes(mutated)
        return touched


def predict(run: Path | str, source: Path, out: Path, *more: str) -> list[str]:
    return ["predict", "--checkpoint", str(run), str(source), "--out", str(out), "--device", "cpu", *more]


def generated_as(name: str) -> str:
    """The name of a file that a run's generated sequences may be written to."""
    return {"audio": "out.wav", "dna_lm": "out.fa", "dna_labels": "out.fa", "ecg": "out.csv"}.get(name, "out.txt")


def condition(run: str) -> list[str]:
    return ["--condition", "7"] if run == "audio" else []


def _repack(rng: random.Random, place: Place, name: str, mutated: bytes) -> Path:
    """Write what was mutated before it was packed."""
    path = place.folder / name
    if name.endswith(".gz"):
        mutated = gzip.compress(mutated, 1)
        if rng.random() < 0.2:
            mutated += rng.choice((mutated, b"\0" * 20, b"trailing"))
    elif name.endswith(".xz"):
        mutated = lzma.compress(mutated, preset=0)
    elif name.endswith(".zst"):
        import pyarrow

        mutated = pyarrow.compress(mutated, codec="zstd", asbytes=True)
    elif name.endswith(".bgz"):
        from Bio.bgzf import BgzfWriter

        with BgzfWriter(str(path)) as out:
            out.write(mutated)
        return path
    path.write_bytes(mutated)
    return path


def mutated_input(place: Place, names: tuple[str, ...], of_text: bool = True) -> Path:
    """A mutated input: its bytes as they are, its text before it is packed, or something else in its place."""
    rng = place.rng
    name = rng.choice(names)
    kind = rng.random()
    if kind < 0.05:
        path = place.copy(name)
        m.of_path(rng, path, place.world.folder / "elsewhere.txt")
        return path
    plain = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst").removesuffix(".bgz")
    if of_text and kind < 0.6 and not plain.endswith((".parquet", "other.fa")):
        text = (place.world.data / plain).read_text(encoding="utf-8")
        if plain.endswith("jsonl") and rng.random() < 0.6:
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            mutated, _ = m.json_text(rng, json.loads(lines[at]), place.canary)
            return _repack(
                rng, place, name, "".join(lines[:at]).encode() + mutated + b"\n" + "".join(lines[at + 1 :]).encode()
            )
        return _repack(rng, place, name, m.encoded(rng, m.of_lines(rng, text)))
    path = place.copy(name)
    path.write_bytes(m.of_bytes(rng, path.read_bytes()))
    if rng.random() < 0.05:
        path = path.rename(path.with_name(rng.choice(("é ü.", "=1+1.", "a,b.", "-x.", "a\nb.")) + path.name))
    return path


def as_argument(rng: random.Random, value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\0", "" if rng.random() < 0.9 else "\0")
    if value != value or value in (float("inf"), float("-inf")):
        return rng.choice((".nan", "nan", ".inf", "inf", "-.inf", "1e999"))
    try:
        return json.dumps(value)
    except (TypeError, RecursionError):
        return str(value)[:1000]


def tables_differ(written: Path, expected: Path) -> bool:
    """Whether two tables of predictions differ."""
    with written.open(newline="") as one, expected.open(newline="") as two:
        return list(csv.reader(one)) != list(csv.reader(two))


def runs_differ(run: Path, expected: Path) -> bool:
    """Whether the exported weights of two runs differ, or those of their last checkpoints."""
    import torch
    from safetensors.torch import load_file

    def weights_of(folder: Path) -> dict[str, Any]:
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return {**load_file(folder / "model" / "model.safetensors"), **{f"last {name}": last[name] for name in last}}

    one, two = weights_of(run), weights_of(expected)
    return one.keys() != two.keys() or any(not one[name].equal(two[name]) for name in one)
