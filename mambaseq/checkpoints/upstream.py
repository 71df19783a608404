"""Names of `state-spaces/mamba-*` checkpoints and of transformers' Mamba, to ours and back, one to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.checkpoints.export import load_weights, read_safetensors
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, causal_lm

_FIXED = {
    "encoder.embedding.weight": "backbone.embedding.weight",
    "backbone.norm_f.weight": "backbone.norm_f.weight",
    "head.linear.weight": "lm_head.weight",
}


def to_upstream(tensors: dict[str, Tensor], *, transformers: bool = False) -> dict[str, Tensor]:
    """Our names to upstream's (`transformers` calls the embedding `embeddings`). A tied head is written out."""
    out = {_FIXED.get(name, name): tensor for name, tensor in tensors.items()}
    out.setdefault("lm_head.weight", out["backbone.embedding.weight"])
    if transformers:
        out["backbone.embeddings.weight"] = out.pop("backbone.embedding.weight")
    return out


def from_upstream(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's names (either house's) to ours."""
    ours = {theirs: mine for mine, theirs in _FIXED.items()}
    ours["backbone.embeddings.weight"] = "encoder.embedding.weight"
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def options_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `causal_lm` from a `config.json` of either house.

    Raises UserError for an architecture that is not Mamba-1.
    """
    if "hidden_size" in config:  # transformers
        if config.get("model_type", "mamba") != "mamba":
            raise UserError(f"The checkpoint is a {config['model_type']!r} model; only 'mamba' can be loaded.")
        return {
            "vocab_size": config["vocab_size"],
            "d_model": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel"],
            "expand": config["expand"],
            "dt_rank": config["time_step_rank"],
            "conv_bias": config["use_conv_bias"],
            "bias": config["use_bias"],
            "norm_eps": config["layer_norm_epsilon"],
        }
    ssm = dict(config.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1" or config.get("attn_layer_idx"):
        raise UserError("The checkpoint is not a pure Mamba-1 model; only those can be loaded.")
    multiple = config.get("pad_vocab_size_multiple", 8)
    return {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "d_model": config["d_model"],
        "n_layers": config["n_layer"],
        **ssm,
    }


def load_upstream(folder: str | Path) -> SequenceModel:
    """A language model from a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

    The `.bin` is read without unpickling code. Raises UserError when files are missing or do not fit.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"There is no config.json in {folder}. Download the checkpoint's whole folder.")
    model = causal_lm(**options_from_config(json.loads(config_path.read_text(encoding="utf-8"))))
    source = folder / "model.safetensors"
    if source.is_file():
        tensors = read_safetensors(source)
    else:
        source = folder / "pytorch_model.bin"
        if not source.is_file():
            raise UserError(f"There is neither model.safetensors nor pytorch_model.bin in {folder}.")
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    load_weights(model, from_upstream(tensors), source)
    return model.eval()
