"""Folders of published models: what they hold, and what of it can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambaseq.checkpoints.stored import check_quantised, read_weights
from mambaseq.checkpoints.upstream import config_in
from mambaseq.errors import UserError, shown
from mambaseq.limits import YAML_BYTES
from mambaseq.plain import read_json
from mambaseq_dna.published.caduceus import read_caduceus
from mambaseq_dna.published.hyenadna import read_hyenadna
from mambaseq_dna.published.settings import REMEDY, Imported

_READERS = {"caduceus": read_caduceus, "hyenadna": read_hyenadna}
_LOADED = (
    "What can be imported are language models of DNA: Caduceus-Ph and Caduceus-PS, and HyenaDNA in its folders for "
    "transformers (-hf)"
)
_MAMBA = "A Mamba or Mamba-2 needs no import: fit --init-from FOLDER begins with it."
_LENGTH = 131_072  # of the longest published Caduceus, where no tokenizer_config.json says another

# what a config.json may hold: words in its model_type, classes or code, and what that is
_KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("stripedhyena", "striped_hyena", "evo2", "evo-1", "togethercomputer/evo"),
        "an Evo (StripedHyena: gated convolutions and attention over bytes)",
    ),
    (("dnabert", "mosaic"), "a DNABERT-2 (a Transformer with ALiBi over byte-pair tokens)"),
    (
        ("esm", "nucleotide"),
        "a Nucleotide Transformer or another ESM (a Transformer over words of 6 bases, or over proteins)",
    ),
    (("bert",), "a BERT (a Transformer; DNABERT and DNABERT-2 are such)"),
    (("gpn",), "a GPN (dilated convolutions or a Transformer)"),
    (("enformer", "borzoi"), "an Enformer or Borzoi (convolutions and a Transformer to tracks)"),
)


def read_published(folder: str | Path) -> Imported:
    """The model in a published folder: config.json, and model.safetensors or pytorch_model.bin, whole or in parts.

    Nothing is unpickled that could run code. Raises UserError that says what else the folder holds, and for files that
    are missing, damaged or do not fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)[:300]}. Give that of a downloaded model.")
    path = config_in(folder)
    config = _config(path)
    read = _READERS[_kind(config, path, folder)]
    source, tensors = read_weights(folder)
    buffers = (torch.int64, torch.bool)  # places and ids, which are no weights
    held = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in buffers}
    check_quantised(held, source, config.get("quantization_config"), path)
    found = read(config, path, tensors, source)
    if not found.length:
        found.length = _told_length(folder)
    return found


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, REMEDY, YAML_BYTES)


def _kind(config: dict[str, Any], path: Path, folder: Path) -> str:
    """Which reader a configuration is for. Raises UserError that names what it is, if for none."""
    kind = config.get("model_type")
    classes = config.get("architectures")
    code = config.get("auto_map")
    texts = [kind, *(classes if isinstance(classes, list) else []), *(code.values() if isinstance(code, dict) else [])]
    words = " ".join(str(text).lower() for text in [*texts, config.get("_name_or_path")] if text)[:4000]
    if isinstance(kind, str) and kind in _READERS:
        return kind
    layer = config.get("layer")
    if isinstance(layer, dict) and layer.get("_name_") == "hyena":
        raise UserError(
            f"{folder} holds a HyenaDNA in its first form (weights.ckpt, a pickle of the training), which is not read. "
            "Download the folder of the same name that ends with -hf."
        )
    if kind in ("mamba", "mamba2") or (kind is None and "ssm_cfg" in config):
        raise UserError(f"{folder} holds a Mamba. {_MAMBA} {_LOADED}.")
    for names, told in _KNOWN:
        if any(name in words for name in names):
            raise UserError(f"{folder} holds {told}, which no model of this project computes. {_LOADED}. {_MAMBA}")
    raise UserError(f"{path} describes a {shown(kind)} model, which is unknown here. {_LOADED}. {_MAMBA}")


def _told_length(folder: Path) -> int:
    """Tokens that a tokenizer_config.json says the model reads at once."""
    path = folder / "tokenizer_config.json"
    told = _config(path).get("model_max_length") if path.is_file() else None
    return told if type(told) is int and 1 < told <= 2**20 else _LENGTH
