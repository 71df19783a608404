"""A model of ours as a folder that transformers loads: config.json, generation_config.json, weights and tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambaseq.atomic import atomic_folder, json_text
from mambaseq.checkpoints.dtypes import cast_, dtype_of
from mambaseq.checkpoints.export import LoadedModel
from mambaseq.checkpoints.forms import no_form
from mambaseq.checkpoints.published import GENERATION
from mambaseq.checkpoints.upstream import described, to_upstream
from mambaseq.errors import UserError, shown

_SHARD = 5 * 10**9  # bytes of a file of weights, as transformers cuts them


def save_transformers(
    loaded: LoadedModel, out: str | Path, *, dtype: str | None = None, shard_bytes: int = _SHARD
) -> list[str]:
    """Write a language model of ours in the form of transformers. Returns notes on what could not go along.

    dtype: of the weights, a name in `DTYPES`; otherwise that of the model's file. shard_bytes: the most bytes of one
    file of weights; larger models are written in parts, with an index.

    The model's weights take that dtype. Raises UserError for what transformers has no class for (see `to_upstream`),
    and for a folder that is there and not empty.
    """
    out = Path(out)
    asked = dtype_of(dtype)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already, and would be overwritten. Give another --out, or remove it.")
    model = loaded.model
    if loaded.card.task not in (None, "next_token"):
        raise no_form(f"it was trained for {shown(loaded.card.task)}, not to predict the next token")
    cast_(model, asked or _stored(loaded.source))
    config, tensors = described(model), to_upstream(model, transformers=True)
    if model.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    name = str(next(one for key, one in tensors.items() if _EMBEDDING.search(key)).dtype).removeprefix("torch.")
    notes = []
    with atomic_folder(out) as folder:
        ids = None if loaded.tokenizer is None else loaded.tokenizer.save_for_transformers(folder)
        if ids is None:
            own = loaded.card.tokenizer
            why = "the model has none" if own is None else f"transformers cannot read {shown(own['name'])}"
            notes.append(f"no tokenizer is written, since {why}: give it ids")
        marks: dict[str, Any] = {f"{mark}_token_id": (ids or {}).get(mark) for mark in ("bos", "eos")}
        marks["pad_token_id"] = marks["eos_token_id"]
        _write_json(folder / "config.json", {**config, **marks, "dtype": name, "torch_dtype": name})
        _write_json(folder / GENERATION, {**_generation(loaded.card.generation), **marks})
        _write_weights(folder, tensors, shard_bytes)
    return notes


_EMBEDDING = re.compile(r"\.embed(dings|_tokens)\.weight")


def _stored(source: Path) -> dict[str, torch.dtype]:
    """The dtypes of the weights in a file; of a training checkpoint none, which is fp32."""
    if source.suffix != ".safetensors":
        return {}
    try:
        with safe_open(source, framework="pt") as file:
            names = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"The weights in {source} cannot be read: {error}. Copy or export the model again.") from error
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    return {name: known[dtype] for name, dtype in names.items() if dtype in known}


def _generation(defaults: dict[str, Any]) -> dict[str, Any]:
    """Defaults of `mambaseq generate` in transformers' words; without any, transformers takes the likeliest tokens."""
    found: dict[str, Any] = {}
    if defaults.get("max_new_tokens"):
        found["max_new_tokens"] = defaults["max_new_tokens"]
    drawn: dict[str, Any] = {key: defaults[key] for key in ("temperature", "top_k", "top_p") if key in defaults}
    if drawn and drawn.get("temperature") != 0:
        found |= {"do_sample": True, "top_k": 0, **drawn}  # there 50 is top_k's default
    return found


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json_text(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: dict[str, Tensor], limit: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
