"""What is fuzzed: each target makes a case (files in a folder, a command) from a seed and a number."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations as m
import yaml
from world import INPUTS, World, configurations, manifest


@dataclasses.dataclass
class Case:
    """argv: the command. wrong: names of files and keys, one of which a refusal must name. same: what an accepted case
    must equal: `(written, expected)` tables, or folders of runs whose weights are compared; None for nothing."""

    argv: list[str]
    wrong: set[str] = dataclasses.field(default_factory=set)
    same: tuple[Path, Path] | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class Place:
    """A case's folder and random numbers, and what it may copy from. site: `(url, files)` of the server."""

    def __init__(self, world: World, folder: Path, rng: random.Random, url: str, served: dict[str, bytes]) -> None:
        self.world, self.folder, self.rng, self.url, self.served = world, folder, rng, url, served
        self.canary = str(folder / "canary")

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

    def mutate(self, path: Path, tree: Callable[[random.Random, Any, str], tuple[bytes, set[str]]] | None = None) -> set[str]:
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


def _predict(run: Path | str, source: Path, out: Path, *more: str) -> list[str]:
    return ["predict", "--checkpoint", str(run), str(source), "--out", str(out), "--device", "cpu", *more]


def _condition(run: str) -> list[str]:
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
    elif name.endswith((".bgz", ".zst")):
        return place.copy(name)
    path.write_bytes(mutated)
    return path


def _input(place: Place, names: tuple[str, ...], of_text: bool = True) -> Path:
    """A mutated input: its bytes as they are, its text before it is packed, or something else in its place."""
    rng = place.rng
    name = rng.choice(names)
    kind = rng.random()
    if kind < 0.05:
        path = place.copy(name)
        m.of_path(rng, path, place.world.folder / "elsewhere.txt")
        return path
    plain = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst").removesuffix(".bgz")
    if of_text and kind < 0.6 and (place.world.data / plain).is_file():
        text = (place.world.data / plain).read_text(encoding="utf-8")
        if plain.endswith("jsonl") and rng.random() < 0.6:
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            mutated, _ = m.json_text(rng, json.loads(lines[at]), place.canary)
            return _repack(rng, place, name, "".join(lines[:at]).encode() + mutated + b"\n" + "".join(lines[at + 1 :]).encode())
        return _repack(rng, place, name, m.encoded(rng, m.of_lines(rng, text)))
    path = place.copy(name)
    path.write_bytes(m.of_bytes(rng, path.read_bytes()))
    if rng.random() < 0.05:
        path = path.rename(path.with_name(rng.choice(("é ü.", "=1+1.", "a,b.", "-x.", "a\nb.")) + path.name))
    return path


def fasta(place: Place) -> Case:
    rng = place.rng
    run = rng.choice(("dna_lm", "dna_labels"))
    if rng.random() < 0.01:
        path = place.folder / "bomb.fa.gz"
        path.symlink_to(place.world.data / "bomb.gz")
    else:
        path = _input(place, ("genome.fa", "genome.fa", "other.fa.gz", "genome.fa.bgz"))
    return Case(_predict(place.world.run(run), path, place.folder / "out.csv"), {path.name})


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
        path = _input(place, tuple(f"tone.{s}" for s in ("wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64")), False)
    return Case(_predict(place.world.run("audio"), path, place.folder / "out.csv", "--condition", "7"), {path.name})


def text(place: Place) -> Case:
    rng = place.rng
    run = rng.choice(("text", "pieces"))
    kind = rng.random()
    if kind < 0.015:
        suffix = rng.choice(("gz", "xz"))
        path = place.folder / f"bomb.{rng.choice(('txt', 'jsonl'))}.{suffix}"
        path.symlink_to(place.world.data / f"bomb.{suffix}")
    elif kind < 0.1:
        path = _odd_parquet(place)
    else:
        names = [f"{stem}{packed}" for stem in ("text.txt", "rows.jsonl") for packed in ("", "", ".gz", ".xz", ".zst")]
        path = _input(place, (*names, "rows.parquet"))
    return Case(_predict(place.world.run(run), path, place.folder / "out.csv"), {path.name})


def _odd_parquet(place: Place) -> Path:
    import pyarrow
    import pyarrow.parquet

    rng = place.rng
    column: list[Any] = rng.choice(([1, 2], [None, None], ["a", None], [["a"], []], [b"\xff"], [{"a": 1}], [], ["a\0"], [1.5]))
    table = pyarrow.table({rng.choice(("text", "text", "Text", "")): column, "id": list(range(len(column)))})
    path = place.folder / "odd.parquet"
    pyarrow.parquet.write_table(table, path)
    return path


def ecg(place: Place) -> Case:
    path = _input(place, ("strip.csv",))
    return Case(_predict(place.world.run("ecg"), path, place.folder / "out.csv"), {path.name})


def training_data(place: Place) -> Case:
    """Mutated files to train on."""
    rng = place.rng
    name = rng.choice(("dna_lm", "dna_labels", "audio", "text", "pieces"))
    key, given, wrong = "files", "", {"data."}
    if name in ("dna_lm", "dna_labels"):
        path = _input(place, ("genome.fa", "genome.fa.bgz", "other.fa.gz"))
        key, given = ("fasta", str([str(path)])) if name == "dna_lm" else (
            "species", json.dumps({"one": [str(path)], "two": [str(place.world.data / "other.fa.gz")]}))  # fmt: skip
    elif name == "audio":
        shutil.copytree(place.world.data / "clips", place.folder / "clips")
        path = rng.choice(sorted((place.folder / "clips").iterdir()))
        kind = rng.random()
        if kind < 0.2:
            path = path.rename(path.with_name(rng.choice(("7_me_9.wav", "x.wav", "._a.wav", "é_me_1.wav", "7_me_.wav"))))
        elif kind < 0.3:
            m.of_path(rng, path, place.world.folder / "elsewhere.txt")
        else:
            path.write_bytes(_lying_wav(rng, path.read_bytes()) if kind < 0.6 else m.of_bytes(rng, path.read_bytes()))
        given = str(place.folder / "clips")
        wrong |= {"clips"}
    elif name == "text":
        path = _input(place, ("text.txt", "text.txt.gz", "text.txt.xz"))
    else:
        path = _input(place, ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"))
    config = place.world.folder / "configs" / f"{name}.yaml"
    argv = ["fit", "--config", str(config), "--out", str(place.folder / "run"), f"--data.{key}", given or str(path)]
    return Case(argv, {path.name, *wrong})


def _use(place: Place, run: Path, name: str, wrong: set[str], *, exact: bool) -> Case:
    """predict, generate, test or validate with a run whose files were harmed."""
    rng, out = place.rng, place.folder / ("out.wav" if name == "audio" else "out.csv")
    command = rng.choice(("predict", "predict", "generate", "test", "validate")) if name in INPUTS else "test"
    if exact:
        command = "predict"
    if command == "predict":
        out = out.with_suffix(".csv")
        same = (out, place.world.expected(f"{name}.csv")) if exact else None
        return Case(_predict(run, place.world.data / INPUTS[name], out, *_condition(name)), wrong, same)
    if command == "generate":
        argv = ["generate", "--checkpoint", str(run), "--out", str(out), "-n", "4", "--device", "cpu"]
        return Case([*argv, *_condition(name), *(["--prompt", "ACGT"] if rng.random() < 0.3 else [])], wrong)
    return Case([command, "--checkpoint", str(run)], wrong)


def model_json(place: Place) -> Case:
    name = place.rng.choice(tuple(INPUTS))
    run = place.run(name)
    touched = place.mutate(run / "model" / "model.json", m.json_text)
    return _use(place, run, name, {"model.json", *touched}, exact=False)


def _lying_safetensors(rng: random.Random, data: bytes, canary: str) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    mutated, _ = m.json_text(rng, header, canary)
    length = len(mutated) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**63, size * 2))
    return struct.pack("<Q", length) + mutated + data[8 + size :]


def weights(place: Place) -> Case:
    """Harmed weights: refused, or the predictions are those of the unharmed ones."""
    rng = place.rng
    name = rng.choice(tuple(INPUTS))
    run = place.run(name)
    path = run / "model" / "model.safetensors"
    if rng.random() < 0.2:
        path.write_bytes(_lying_safetensors(rng, path.read_bytes(), place.canary))
    elif rng.random() < 0.5:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    else:
        place.mutate(path)
    return _use(place, run, name, {"model.safetensors"}, exact=True)


def tokenizer(place: Place) -> Case:
    run = place.run("pieces")
    path = run / "model" / "tokenizer.json"
    touched = place.mutate(path, m.json_text)
    return _use(place, run, "pieces", {"tokenizer.json", "tokenizer", *touched}, exact=False)


def run_config(place: Place) -> Case:
    """A run's harmed config.yaml."""
    name = place.rng.choice(tuple(configurations(place.world.data)))
    run = place.run(name)
    touched = place.mutate(run / "config.yaml", m.yaml_text)
    command = place.rng.choice(("test", "validate", "resume"))
    argv = [command, "--checkpoint", str(run)] if command != "resume" else [
        "fit", "--resume", str(run), "--trainer.max_steps", "2"]  # fmt: skip
    return Case(argv, {"config.yaml", *touched, *_leaves(touched)})


def _leaves(keys: set[str]) -> set[str]:
    return {key.rpartition(".")[2] for key in keys}


class _Call:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def _lying_checkpoint(rng: random.Random, path: Path, canary: str) -> None:
    import torch

    loaded = torch.load(path, weights_only=True)
    kind = rng.randrange(6)
    if kind <= 2:
        plain = {key: inner for key, inner in loaded.items() if key not in ("state_dict", "optimizer_states")}
        mutated, _ = m.of_tree(rng, plain, canary)
        loaded = {**mutated, **({} if rng.random() < 0.1 else {"state_dict": loaded["state_dict"]})}
        loaded |= {} if rng.random() < 0.1 else {"optimizer_states": torch.load(path, weights_only=True)["optimizer_states"]}
    elif kind == 3:
        tensors = loaded["state_dict"]
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        tensors[name] = rng.choice((tensor * float("nan"), tensor.flatten(), tensor.double(), tensor.to(torch.int8), None, 5,
                                    tensor.new_zeros(0), tensor * 1e30, tensor.to(torch.complex64)))  # fmt: skip
    elif kind == 4:
        mutated, _ = m.of_tree(rng, loaded["optimizer_states"], canary)
        loaded["optimizer_states"] = mutated
    else:
        loaded = rng.choice(([], 5, None, {}, "x"))
    torch.save(loaded, path)


def _calling_checkpoint(path: Path, canary: str) -> None:
    """The checkpoint's pickle is replaced by one that runs a command."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as target:
        for item in source.namelist():
            data = source.read(item)
            target.writestr(item, pickle.dumps(_Call(canary), 2) if item.endswith("data.pkl") else data)
    path.write_bytes(buffer.getvalue())


def checkpoint(place: Place) -> Case:
    """A harmed last.ckpt or best.ckpt on resume."""
    rng = place.rng
    name = rng.choice(("dna_lm", "dna_lm", "text", "audio", "pieces", "synthetic"))
    run = place.run(name)
    path = rng.choice(sorted((run / "checkpoints").glob("*.ckpt")))
    kind, flipped = rng.random(), False
    if kind < 0.35:
        _lying_checkpoint(rng, path, place.canary)
    elif kind < 0.4:
        _calling_checkpoint(path, place.canary)
    elif kind < 0.7:
        flipped = True
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    else:
        flipped = True
        place.mutate(path)
    wrong = {path.name, "trainer.max_steps"} if path.name == "last.ckpt" else {path.name}
    same = (run, place.world.expected(f"{name}-resumed")) if flipped else None
    return Case(["fit", "--resume", str(run), "--trainer.max_steps", "2"], wrong, same)


def records(place: Place) -> Case:
    """Harmed results.json and metrics.csv."""
    rng = place.rng
    name = rng.choice(("dna_lm", "text", "audio"))
    run = place.run(name)
    if rng.random() < 0.5:
        path = run / "results.json"
        place.mutate(path, m.json_text)
    else:
        path = run / "logs" / "version_0" / "metrics.csv"
        if rng.random() < 0.6:
            path.write_bytes(m.encoded(rng, m.of_lines(rng, path.read_text())))
        else:
            place.mutate(path)
    command = rng.choice(("test", "resume", "resume"))
    argv = ["test", "--checkpoint", str(run)] if command == "test" else [
        "fit", "--resume", str(run), "--trainer.max_steps", "2"]  # fmt: skip
    return Case(argv, {path.name})


def store(place: Place) -> Case:
    """A harmed token store: it is refused or built again, and training ends at the same weights."""
    rng = place.rng
    name = rng.choice(("dna_lm", "audio", "text", "pieces"))
    cache, run = place.cache(), place.run(name)
    folders = sorted((cache / "stores").glob({"dna_lm": "genome*", "audio": "clips*", "text": "corpus*", "pieces": "doc*"}[name]))
    path = rng.choice(folders) / rng.choice(("index.json", "tokens.bin"))
    if rng.random() < 0.1:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"not a folder")
    elif path.suffix == ".json" and rng.random() < 0.5:
        index = json.loads(path.read_text())
        mutated, _ = m.of_tree(rng, index, place.canary, lambda way: way[0] in ("records", "dtype", "meta"))
        path.write_text(json.dumps(mutated, default=str))
    else:
        place.mutate(path, m.json_text if path.suffix == ".json" else None)
    argv = ["fit", "--resume", str(run), "--trainer.max_steps", "2"]
    wrong = {path.name, path.parent.name}
    return Case(argv, wrong, (run, place.world.expected(f"{name}-resumed")), {"MAMBASEQ_CACHE": str(cache)})


def config(place: Place) -> Case:
    """A harmed configuration."""
    rng = place.rng
    name = rng.choice(tuple(configurations(place.world.data)))
    path = place.folder / "config.yaml"
    mutated, touched = m.yaml_text(rng, configurations(place.world.data)[name], place.canary)
    path.write_bytes(mutated)
    if rng.random() < 0.03:
        m.of_path(rng, path, place.world.folder / "elsewhere.txt")
    return Case(["fit", "--config", str(path), "--out", str(place.folder / "run")], {"config.yaml", *touched})


TRAINER_KEYS = (
    "accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs max_steps min_steps "
    "max_time limit_train_batches limit_val_batches limit_test_batches overfit_batches val_check_interval "
    "check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar "
    "enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic benchmark "
    "inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins sync_batchnorm "
    "reload_dataloaders_every_n_epochs default_root_dir"
).split()  # fmt: skip
KEYS = {
    "": ["seed", "metrics", "loader.batch_size", "loader.num_workers", "loader.pack", "checkpoint.every_n_steps",
         "checkpoint.monitor", "checkpoint.mode", "generation.temperature", "generation.top_p", "generation.top_k",
         "generation.max_new_tokens", "length_warmup.start", "length_warmup.steps_per_stage", "model.d_model",
         "model.tie_embeddings", "model.encoder.name", "model.backbone.name", "model.backbone.n_layers",
         "model.backbone.pattern", "model.backbone.norm_eps", "model.backbone.dropout", "model.backbone.chunk_length",
         "model.backbone.mlp", "model.backbone.checkpoint", "model.mixer.name", "model.mixer.d_state", "model.mixer.dt_rank",
         "model.mixer.expand", "model.mixer.d_conv", "model.mixer.backend", "model.mixer.lti", "model.mixers", "model.head.name",
         "model.head.scale", "model.head.n_outputs", "optimizer.lr", "optimizer.weight_decay", "optimizer.warmup_steps",
         "optimizer.beta1", "optimizer.beta2", "optimizer.schedule", "optimizer.min_lr_ratio", "config", "out", "resume", "help"],
    "dna_lm": ["data.fasta", "data.length", "data.test_records", "data.validation_records", "data.validation_fraction",
               "data.drop_n", "data.samples_per_epoch", "data.n_validation", "data.cache", "data.lowercase", "data.seed"],
    "dna_labels": ["data.species", "data.length", "data.test_records", "model.encoder.k", "model.encoder.stride"],
    "audio": ["data.files", "data.pattern", "data.condition", "data.split", "data.validation", "data.test", "data.length",
              "data.sample_rate", "data.resample", "data.channels", "data.validation_list"],
    "text": ["data.files", "data.validation_files", "data.validation_fraction", "data.field", "data.encoding",
             "data.tokenizer", "data.tokenizer_options", "data.length", "data.epoch_size"],
    "pieces": ["data.files", "data.unit", "data.streaming", "data.shuffle_windows", "data.tokenizer_options", "data.length"],
    "synthetic": ["data.length", "data.n_data", "data.vocab_size", "data.n_validation", "data.samples_per_epoch"],
}  # fmt: skip


def _as_argument(rng: random.Random, value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\0", "" if rng.random() < 0.9 else "\0")
    if value != value or value in (float("inf"), float("-inf")):
        return rng.choice((".nan", "nan", ".inf", "inf", "-.inf", "1e999"))
    try:
        return json.dumps(value)
    except (TypeError, RecursionError):
        return str(value)[:1000]


def _values(rng: random.Random, key: str, canary: str) -> Any:
    if rng.random() < 0.5:
        return m.value(rng, rng.choice((1, 8, 0.5, "mamba", [], True)), canary)
    if key.startswith("trainer."):
        return rng.choice(("auto", "cpu", "gpu", "ddp", "fsdp", "deepspeed", "bf16-true", "16-mixed", "64-true", "16-true", "simple",
                           "advanced", "norm", "value", 2, 4, 0.5, 1.0, 0, -1, True, False, None, "EarlyStopping", ["x"],
                           [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}],
                           [{"class_path": "BackboneFinetuning"}], {"class_path": "WandbLogger"}, "00:00:00:01"))  # fmt: skip
    return rng.choice((0, 1, 2, 3, 5, 16, 17, 64, 1000, -1, 0.1, 0.999, True, "mamba2", "s4d", "hyena", "rwkv4", "lssl", "h3", "s4"))


def overrides(place: Place) -> Case:
    """Harmed `--key value`, for fit, --resume and test."""
    rng = place.rng
    name = rng.choice([name for name in KEYS if name])
    chosen, wrong = [], set()
    for _ in range(rng.choice((1, 1, 1, 2))):
        pool = rng.choice((KEYS[""], KEYS[name], [f"trainer.{key}" for key in TRAINER_KEYS]))
        key = rng.choice(pool)
        wrong |= {key, key.rpartition(".")[2]}
        if rng.random() < 0.08:
            key = rng.choice((key + "s", key[:-1], key.upper(), key.replace(".", ".."), "", "trainer", "model", "data", key + ".x"))
            wrong |= {key, key.rpartition(".")[2]}
        given = _as_argument(rng, _values(rng, key, place.canary))
        chosen += [f"--{key}={given}"] if rng.random() < 0.4 else [f"--{key}", given]
    kind = rng.random()
    if kind < 0.7:
        base = place.world.folder / "configs" / f"{name}.yaml"
        return Case(["fit", "--config", str(base), "--out", str(place.folder / "run"), *chosen], wrong)
    run = place.run(name)
    if kind < 0.85:
        return Case(["fit", "--resume", str(run), "--trainer.max_steps", "2", *chosen], wrong)
    return Case(["test", "--checkpoint", str(run), *chosen], wrong)


def options(place: Place) -> Case:
    """Harmed options of every other command."""
    rng, canary = place.rng, place.canary
    command = rng.choice(("predict", "predict", "generate", "generate", "test", "list", "data"))
    name = rng.choice(tuple(INPUTS))
    run, given = place.world.run(name), lambda: _as_argument(rng, m.value(rng, rng.choice((3, "x", 0.5)), canary))
    if command == "list":
        return Case(["list", given()], {"kind"})
    if command == "data":
        action = rng.choice(("list", "info", "fetch", given()))
        name = given()
        argv = ["data", action, *([name] if action != "list" else [])]
        return Case([*argv, "--cache", str(place.folder / "cache")], {"name", "action", name[:40], "manifest"})
    if command == "test":
        target = given()
        return Case(["test", "--checkpoint", target], {"checkpoint", "run", target[:40]})
    out = place.folder / "out.csv"
    if command == "predict":
        argv = _predict(run, place.world.data / INPUTS[name], out, *_condition(name))
        keys = ["--window", "--batch-size", "--reader", "--condition", "--out", "--checkpoint", "--device", "INPUT"]
    else:
        argv = ["generate", "--checkpoint", str(run), "--out", str(out), "-n", "4", "--device", "cpu", *_condition(name)]
        keys = ["--prompt", "--prompt", "--condition", "--out", "-n", "--samples", "--temperature", "--top-k", "--top-p", "--seed",
                "--writer", "--device", "--checkpoint"]  # fmt: skip
    wrong = set()
    for _ in range(rng.choice((1, 1, 2))):
        key, value = rng.choice(keys), given()
        if key in ("--samples", "-n", "--window", "--batch-size") and rng.random() < 0.5:
            value = rng.choice(("0", "-1", "3", "nan", "2.5", "1e3", "0x10", str(2**63)))
        if key == "--out" and not value.startswith("/dev"):
            value = str(place.folder / value.lstrip("/")) if rng.random() < 0.8 and "\0" not in value else value
        argv += [value] if key == "INPUT" else [key, value]
        wrong |= {key, key.lstrip("-").lower(), value[:40], Path(value).name[:40] if "\0" not in value else ""}
        wrong |= {"max-new-tokens", "new tokens"} if key == "-n" else set()
    return Case(argv, wrong)


def prompts(place: Place) -> Case:
    """Harmed prompts, as files and as they are."""
    rng = place.rng
    name = rng.choice(("dna_lm", "audio", "text", "pieces"))
    out = place.folder / {"audio": "out.wav", "dna_lm": "out.fa"}.get(name, "out.txt")
    wrong = {"--prompt", "prompt"}
    if rng.random() < 0.6:
        names = {"dna_lm": ("genome.fa", "other.fa.gz"), "audio": ("tone.wav", "tone.flac", "tone.mp3"),
                 "text": ("text.txt", "rows.jsonl", "rows.parquet"), "pieces": ("rows.jsonl", "text.txt.gz")}[name]  # fmt: skip
        path = _input(place, names, name != "audio")
        prompt, wrong = str(path), {*wrong, path.name}
    else:
        prompt = _as_argument(rng, m.value(rng, rng.choice(("ACGTN", "To be", 5)), place.canary))
    argv = ["generate", "--checkpoint", str(place.world.run(name)), "--out", str(out), "-n", "3", "--device", "cpu"]
    return Case([*argv, "--prompt", prompt, *_condition(name)], wrong)


def _odd_archive(place: Place) -> bytes:
    """An archive with members that point elsewhere."""
    import tarfile

    rng = place.rng
    name = rng.choice(("../../up.txt", "/tmp/abs.txt", "a/../../b.txt", "a\\..\\b.txt", "x" * 300, "dev", "link", "a", "\ud7ff", ""))
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(buffer, "w") as packed:
            info = zipfile.ZipInfo(name)
            if name == "link":
                info.external_attr = 0o120777 << 16
            packed.writestr(info, "../../../elsewhere.txt")
            packed.writestr(rng.choice(("ok.txt", "a", "a/b", "link/x")), "ok")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
            member.linkname = rng.choice(("../../../elsewhere.txt", "/etc/passwd", name))
            member.mode = rng.choice((0o644, 0, 0o4777))
            tar.addfile(member, io.BytesIO(b""))
    return buffer.getvalue()


def fetch(place: Place) -> Case:
    """Harmed manifests, archives, answers and recorded checksums."""
    import hashlib

    rng, folder = place.rng, place.folder
    base = manifest(place.world.folder / "served", place.url)
    path, cache, wrong = folder / "set.yaml", folder / "cache", {"set.yaml"}
    kind = rng.random()
    if kind < 0.5:
        mutated, touched = m.yaml_text(rng, base, place.canary)
        path.write_bytes(mutated)
        wrong |= touched | {file["name"] for file in base["files"]}
        if rng.random() < 0.05:
            m.of_path(rng, path, place.world.folder / "elsewhere.txt")
    elif kind < 0.85:
        which = rng.randrange(2)
        name = Path(base["files"][which]["url"]).name
        data = _odd_archive(place) if rng.random() < 0.5 else m.of_bytes(rng, place.served[name])
        place.served["odd" + name] = data
        digest = hashlib.sha256(data).hexdigest()
        base["files"] = [{**base["files"][which], "url": f"{place.url}/odd{name}", "checksum": f"sha256:{digest}"}]
        base["files"][0]["size"] = len(data) if rng.random() < 0.7 else m.number(rng)
        if base["files"][0]["size"] != base["files"][0]["size"] or abs(base["files"][0]["size"]) > 2**70:
            del base["files"][0]["size"]
        wrong |= {base["files"][0]["name"], "size"}
        path.write_text(yaml.safe_dump(base))
    else:
        path.write_text(yaml.safe_dump(base))
        recorded = cache / "fetched" / "fuzzed" / "checksums.json"
        recorded.parent.mkdir(parents=True)
        mutated, _ = m.json_text(rng, {"plain.txt": "sha256:" + "0" * 64, "x": "md5:0"}, place.canary)
        recorded.write_bytes(mutated)
        if rng.random() < 0.3:
            (recorded.parent / rng.choice(("plain.txt", "set.tar.gz", ".plain.txt.part", "set"))).write_bytes(rng.randbytes(50))
        wrong |= {"checksums.json", "plain.txt", "set.tar.gz"}
    action = "fetch" if rng.random() < 0.9 else "info"
    return Case(["data", action, str(path), "--cache", str(cache)], wrong)


# how many of a hundred cases each target gets
TARGETS: dict[str, tuple[Callable[[Place], Case], int]] = {
    "fasta": (fasta, 9), "audio": (audio, 9), "text": (text, 9), "ecg": (ecg, 5), "training_data": (training_data, 4),
    "model_json": (model_json, 11), "weights": (weights, 8), "tokenizer": (tokenizer, 4), "run_config": (run_config, 6),
    "checkpoint": (checkpoint, 4), "records": (records, 2), "store": (store, 3), "config": (config, 8),
    "overrides": (overrides, 6), "options": (options, 5), "prompts": (prompts, 3), "fetch": (fetch, 4),
}  # fmt: skip


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
