"""What cases begin from: small data files of every kind, a finished tiny run of every domain, a data set to fetch.

Made once; cases get copies and never write here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
TRAINER: dict[str, Any] = {
    "max_steps": 1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
}
MODEL: dict[str, Any] = {"d_model": 8, "backbone": {"name": "residual", "n_layers": 1}, "mixer": {"name": "mamba"}}
BOMB = 2**30


@dataclasses.dataclass(frozen=True)
class World:
    """Paths of what was made. site: a folder for `sys.path` with the examples' and the canary's packages."""

    folder: Path

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The runs that were made."""
        return tuple(sorted(path.name for path in (self.folder / "runs").iterdir()))

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def expected(self, name: str) -> Path:
        """What an unharmed run says: `NAME.csv` of predict, `NAME-resumed` for what training on makes of it."""
        return self.folder / "expected" / name


INPUTS = {
    "dna_lm": "genome.fa",
    "dna_labels": "genome.fa",
    "audio": "tone.wav",
    "text": "text.txt",
    "pieces": "rows.jsonl",
    "ecg": "strip.csv",
}


def configurations(data: Path) -> dict[str, dict[str, Any]]:
    """A configuration of one step for each domain."""
    lm, best = {**MODEL, "head": {"name": "lm"}}, {"every_n_steps": 1, "monitor": "val/loss"}
    common = {"seed": 0, "loader": {"batch_size": 2}, "trainer": TRAINER}
    labels = {**MODEL, "head": {"name": "classification"}}
    return {
        "dna_lm": {
            **common,
            "data": {"name": "dna/genome", "fasta": [str(data / "genome.fa")], "test_records": ["r3"], "length": 16},
            "model": lm,
            "checkpoint": best,
            "metrics": ["bits_per_token"],
        },
        "dna_labels": {
            **common,
            "data": {
                "name": "dna/species",
                "length": 16,
                "test_records": ["r3"],
                "species": {"one": [str(data / "genome.fa")], "two": [str(data / "other.fa.gz")]},
            },
            "metrics": ["accuracy", "confusion"],
            "model": {**labels, "encoder": {"name": "dna/kmer", "k": 3, "stride": 2}},
            "checkpoint": best,
        },
        "audio": {
            **common,
            "data": {
                "name": "audio/clips",
                "files": str(data / "clips"),
                "length": 40,
                "pattern": r"^(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)$",
                "validation": "1",
                "test": "2",
            },
            "model": lm,
            "generation": {"max_new_tokens": 20},
            "length_warmup": {"start": 8, "steps_per_stage": 1},
        },
        "text": {
            **common,
            "data": {"name": "text/corpus", "files": str(data / "text.txt"), "length": 16},
            "model": lm,
            "metrics": ["bits_per_byte"],
            "checkpoint": best,
            "generation": {"max_new_tokens": 8, "top_p": 0.9},
        },
        "pieces": {
            **common,
            "data": {
                "name": "text/documents",
                "files": str(data / "rows.jsonl"),
                "length": 24,
                "tokenizer": "text/hf",
                "validation_fraction": 0.3,
                "test_fraction": 0.3,
                "tokenizer_options": {"path": str(data / "tokenizer.json"), "eos": "<|endoftext|>"},
            },
            "model": {**lm, "tie_embeddings": True},
        },
        "ecg": {
            **common,
            "data": {"name": "ecg/beats", "window": 64, "after": 8},
            "model": {**labels, "encoder": {"name": "signal"}},
            "metrics": ["accuracy"],
            "checkpoint": best,
        },
        "synthetic": {
            **common,
            "data": {
                "name": "synthetic/selective_copying",
                "length": 16,
                "n_data": 2,
                "vocab_size": 6,
                "n_validation": 2,
                "n_test": 2,
            },
            "metrics": ["token_accuracy"],
            "model": {**lm, "backbone": {"name": "residual", "n_layers": 2, "pattern": ["mamba", "attention"]}},
        },
    }


def make_data(folder: Path) -> None:
    """Every kind of file that a reader knows."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    fasta = "".join(
        f">r{i} record {i}\n"
        + "".join("".join(rng.choices("ACGTacgtNRY" if i == 2 else "ACGT", k=60)) + "\n" for _ in range(10))
        for i in range(4)
    )
    (folder / "genome.fa").write_text(fasta)
    other = "".join(f">r{i}\n" + "".join(rng.choices("ACCGGT", k=600)) + "\n" for i in range(4))
    (folder / "other.fa.gz").write_bytes(gzip.compress(other.encode(), mtime=0))
    from Bio.bgzf import BgzfWriter

    with BgzfWriter(str(folder / "genome.fa.bgz")) as out:
        out.write(fasta)
    _make_sound(folder)
    text = "".join(
        f"{' '.join(rng.choices(['the', 'end', 'of', 'café', 'and', 'beginning', 'Ж', '𝄞'], k=8))}\n" for _ in range(40)
    )
    (folder / "text.txt").write_text(text)
    _packed(folder, "text.txt")
    rows = [
        {"text": " ".join(rng.choices(["the", "end", "of", "café"], k=12)), "id": i, "tags": ["a"]} for i in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _packed(folder, "rows.jsonl")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    _make_tokenizer(folder / "tokenizer.json")
    strip = (ROOT / "examples" / "ecg" / "strip.csv").read_text().splitlines(keepends=True)
    (folder / "strip.csv").write_text("".join(strip[:600]))
    zeros = gzip.compress(bytes(2**22), mtime=0) * (BOMB // 2**22)
    (folder / "bomb.gz").write_bytes(zeros)
    (folder / "bomb.xz").write_bytes(lzma.compress(bytes(2**22), preset=0) * (BOMB // 2**22))


def _packed(folder: Path, name: str) -> None:
    import pyarrow

    data = (folder / name).read_bytes()
    (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
    (folder / f"{name}.xz").write_bytes(lzma.compress(data))
    with pyarrow.CompressedOutputStream(str(folder / f"{name}.zst"), "zstd") as out:
        out.write(data)


def _make_sound(folder: Path) -> None:
    import soundfile

    draws = np.random.default_rng(0)
    tone = (0.4 * np.sin(np.arange(400) / 5) + 0.05 * draws.standard_normal(400)).astype(np.float32)
    for suffix, options in {
        "wav": {},
        "flac": {},
        "ogg": {},
        "mp3": {},
        "aiff": {},
        "au": {},
        "caf": {},
        "w64": {},
    }.items():
        soundfile.write(folder / f"tone.{suffix}", tone, 8000, **options)
    soundfile.write(folder / "float.wav", np.stack([tone, tone], 1), 11_025, subtype="FLOAT")
    (folder / "clips").mkdir(exist_ok=True)
    for digit in "07":
        for take in range(4):
            soundfile.write(folder / "clips" / f"{digit}_me_{take}.wav", 0.2 * draws.standard_normal(150), 8000)
    # 600 million samples of silence in a small file
    with soundfile.SoundFile(folder / "bomb.flac", "w", 8000, 1, "PCM_16") as out:
        for _ in range(64):
            out.write(np.zeros(2**20, dtype=np.int16))


def _make_tokenizer(path: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the end of the café and the beginning of the end"] * 3, trainer)
    made.save(str(path))


def make_site(folder: Path, *, ecg: bool) -> None:
    """The examples as if installed, and a module that tells when it is imported or called. ecg: with a little data."""
    (folder / "mambaseq_ecg-0.1.0.dist-info").mkdir(parents=True, exist_ok=True)
    (folder / "mambaseq_ecg-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mambaseq-ecg\nVersion: 0.1.0\n"
    )
    (folder / "mambaseq_ecg-0.1.0.dist-info" / "entry_points.txt").write_text(
        "[mambaseq.domains]\necg = mambaseq_ecg:domain\n"
    )
    if ecg:
        _make_ecg(folder / "mambaseq_ecg")
    (folder / "fuzz_canary.py").write_text("def run(*args, **kwargs):\n    raise SystemExit('the canary was called')\n")


def _make_ecg(folder: Path) -> None:
    """The example with a little of its data: two beats of each class of each patient, of their first five minutes. A
    case that takes the limits away would go through all of it."""
    shutil.copytree(ROOT / "examples" / "ecg" / "mambaseq_ecg", folder, ignore=shutil.ignore_patterns("*.xz", "__pyc*"))
    shipped = ROOT / "examples" / "ecg" / "mambaseq_ecg" / "data"
    with lzma.open(shipped / "mitbih_mlii_100hz.npy.xz") as file:
        signals = np.load(file, allow_pickle=False)[:, :30_000]
    with lzma.open(folder / "data" / "mitbih_mlii_100hz.npy.xz", "wb", preset=0) as out:
        np.save(out, signals)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    with lzma.open(shipped / "beats.csv.xz", "rt") as lines, lzma.open(folder / "data" / "beats.csv.xz", "wt") as kept:
        kept.write(next(lines))
        for line in lines:
            record, sample, *_, label = line.strip().split(",")
            found[record, label] += int(sample) < signals.shape[1]
            if int(sample) < signals.shape[1] and found[record, label] <= 2:
                kept.write(line)


def make_fetched(folder: Path) -> None:
    """Files to be served, a manifest of them, and what the cache holds once they are fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {"set/a.txt": b"one\n" * 50, "set/sub/b.txt": b"two\n"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "set.tar.gz").write_bytes(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    (folder / "set.zip").write_bytes(buffer.getvalue())
    (folder / "plain.txt").write_bytes(b"plain\n" * 100)


def manifest(served: Path, url: str) -> dict[str, Any]:
    """The manifest of the files to be served."""
    files: list[dict[str, Any]] = []
    for name in ("set.tar.gz", "set.zip", "plain.txt"):
        digest = hashlib.sha256((served / name).read_bytes()).hexdigest()
        file = {"name": name, "url": f"{url}/{name}", "checksum": f"sha256:{digest}", "unpack": name != "plain.txt"}
        files.append({**file, "size": (served / name).stat().st_size})
    files[1]["name"] = "second.zip"
    files[2] |= {"checksum": None, "checksum_note": "none is published"}
    return {"name": "fuzzed", "summary": "a set", "licence": "CC0", "homepage": "http://localhost/", "files": files}


def call(*argv: Any) -> None:
    """Run a command that must succeed."""
    from mambaseq.cli.main import main

    if code := main([str(argument) for argument in argv]):
        raise SystemExit(f"{argv} ended with {code}: the unharmed runs must work")


def make_world(folder: Path, names: Sequence[str] = ()) -> World:
    """Make all of it, or the runs of these names only."""
    world = World(folder)
    make_data(world.data)
    make_site(world.site, ecg=not names or "ecg" in names)
    make_fetched(folder / "served")
    enter(world)
    os.environ["MAMBASEQ_CACHE"] = str(world.cache)
    (folder / "expected").mkdir(exist_ok=True)
    for name, settings in configurations(world.data).items():
        if names and name not in names:
            continue
        config = folder / "configs" / f"{name}.yaml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(yaml.safe_dump(settings))
        call("fit", "--config", config, "--out", world.run(name))
        call("test", "--checkpoint", world.run(name))
        if name in INPUTS:
            condition = ["--condition", "7"] if name == "audio" else []
            call(
                "predict",
                "--checkpoint",
                world.run(name),
                world.data / INPUTS[name],
                "--device",
                "cpu",
                "--out",
                world.expected(f"{name}.csv"),
                *condition,
            )
        resumed = world.expected(f"{name}-resumed")
        shutil.copytree(world.run(name), resumed)
        call("fit", "--resume", resumed, "--trainer.max_steps", 2)
    (folder / "elsewhere.txt").write_text("not of this case\n")
    return world


def enter(world: World) -> None:
    """Let this process find the examples' package and the canary, and nothing on the network."""
    for place in (str(ROOT / "examples" / "ecg"), str(world.site)):  # the world's own copy goes first
        if place not in sys.path:
            sys.path.insert(0, place)
