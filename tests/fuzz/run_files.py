"""Every file of a run, and the stores in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import mutations as m
from cases import Case, Place, condition, generated_as, predict
from world import INPUTS, configurations


def _use(place: Place, run: Path, name: str, wrong: set[str], *, exact: bool) -> Case:
    """predict, generate, test or validate with a run whose files were harmed."""
    rng, out = place.rng, place.folder / "out.csv"
    command = rng.choice(("predict", "predict", "generate", "test", "validate")) if name in INPUTS else "test"
    if exact:
        command = "predict"
    if command == "predict":
        same = (out, place.world.expected(f"{name}.csv")) if exact else None
        return Case(predict(run, place.world.data / INPUTS[name], out, *condition(name)), wrong, same)
    if command == "generate":
        out = place.folder / generated_as(name)
        argv = ["generate", "--checkpoint", str(run), "--out", str(out), "-n", "4", "--device", "cpu"]
        wrong = {*wrong, "--prompt", "--checkpoint", "model.json"}  # whatever else is wrong, some cannot generate
        return Case([*argv, *condition(name), *(["--prompt", "ACGT"] if rng.random() < 0.3 else [])], wrong)
    return Case([command, "--checkpoint", str(run)], wrong)


def model_json(place: Place) -> Case:
    name = place.one_of(*INPUTS)
    run = place.run(name)
    touched = place.mutate(run / "model" / "model.json", m.json_text)
    return _use(place, run, name, {"model.json", *touched}, exact=False)


def _lying_safetensors(rng: random.Random, data: bytes, canary: str) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    mutated, _ = m.json_text(rng, header, canary)
    length = len(mutated) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**63, size * 2))
    return struct.pack("<Q", length) + mutated + data[8 + size :]


def _sealed(run: Path) -> None:
    """Write the checksums of harmed files into model.json, as who harms them on purpose would."""
    path = run / "model" / "model.json"
    card = json.loads(path.read_text())
    for name in card["sha256"]:
        if (path.parent / name).is_file():
            card["sha256"][name] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(card))


def weights(place: Place) -> Case:
    """Harmed weights: refused, or the predictions are those of the unharmed ones."""
    rng = place.rng
    name = place.one_of(*INPUTS)
    run = place.run(name)
    path = run / "model" / "model.safetensors"
    kind = rng.random()
    if kind < 0.4:
        path.write_bytes(_lying_safetensors(rng, path.read_bytes(), place.canary))
    elif kind < 0.6:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    else:
        place.mutate(path)
    if sealed := rng.random() < 0.5:
        _sealed(run)
    return _use(place, run, name, {"model.safetensors"}, exact=not sealed)


def tokenizer(place: Place) -> Case:
    run = place.run("pieces")
    path = run / "model" / "tokenizer.json"
    touched = place.mutate(path, m.json_text)
    if sealed := place.rng.random() < 0.8:
        _sealed(run)
    return _use(place, run, "pieces", {"tokenizer.json", "tokenizer", *touched}, exact=not sealed)


def run_config(place: Place) -> Case:
    """A run's harmed config.yaml."""
    name = place.one_of(*place.world.names)
    run = place.run(name)
    touched = place.mutate(run / "config.yaml", m.yaml_text)
    command = place.rng.choice(("test", "validate", "resume"))
    argv = (
        [command, "--checkpoint", str(run)]
        if command != "resume"
        else ["fit", "--resume", str(run), "--trainer.max_steps", "2"]
    )
    keys = m.dotted(configurations(place.world.data)[name])
    return Case(argv, {"config.yaml", *touched, *_leaves(touched), *keys})


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
        loaded |= (
            {} if rng.random() < 0.1 else {"optimizer_states": torch.load(path, weights_only=True)["optimizer_states"]}
        )
    elif kind == 3:
        tensors = loaded["state_dict"]
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        tensors[name] = rng.choice(
            (
                tensor * float("nan"),
                tensor.flatten(),
                tensor.double(),
                tensor.to(torch.int8),
                None,
                5,
                tensor.new_zeros(0),
                tensor * 1e30,
                tensor.to(torch.complex64),
            )
        )
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
    name = place.one_of("dna_lm", "dna_lm", "text", "audio", "pieces", "synthetic")
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
    name = place.one_of("dna_lm", "text", "audio")
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
    argv = (
        ["test", "--checkpoint", str(run)]
        if command == "test"
        else ["fit", "--resume", str(run), "--trainer.max_steps", "2"]
    )
    return Case(argv, {path.name})


def _sealed_index(rng: random.Random, path: Path, canary: str) -> None:
    """A store's index that lies and has the checksum of what it says."""
    from mambaseq.data.store import _seal

    index = json.loads(path.read_text())
    del index["checksum"]
    mutated, _ = m.of_tree(rng, index, canary)
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # what cannot be sealed keeps its seal
        mutated["checksum"] = _seal(mutated)
    path.write_text(json.dumps(mutated, default=str))


def store(place: Place) -> Case:
    """A harmed token store: it is refused or built again, and training ends at the same weights."""
    rng = place.rng
    name = place.one_of("dna_lm", "audio", "text", "pieces")
    cache, run = place.cache(), place.run(name)
    label = {"dna_lm": "genome*", "audio": "clips*", "text": "corpus*", "pieces": "doc*"}[name]
    folder = rng.choice(sorted((cache / "stores").glob(label)))
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind, sealed = rng.random(), False
    if kind < 0.1:
        shutil.rmtree(folder)
        folder.write_bytes(b"not a folder")
    elif path.name == "index.json" and kind < 0.6:
        sealed = True
        _sealed_index(rng, path, place.canary)
    else:
        place.mutate(path, m.json_text if path.suffix == ".json" else None)
    argv = ["fit", "--resume", str(run), "--trainer.max_steps", "2"]
    same = None if sealed else (run, place.world.expected(f"{name}-resumed"))
    return Case(argv, {path.name, folder.name}, same, {"MAMBASEQ_CACHE": str(cache)})
