"""Names of `state-spaces/mamba-*` and `mamba2-*` checkpoints and of transformers' Mamba and Mamba2, to ours and back,
one to one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.checkpoints.export import load_weights, read_safetensors
from mambaseq.errors import ConfigError, UserError
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


# what a Mamba-2's ssm_cfg calls otherwise, what does not change what it computes, and what only one value is known of
_RENAMED = {"headdim": "head_dim", "ngroups": "n_groups"}
_WITHOUT_EFFECT = ("chunk_size", "conv_init", "use_mem_eff_path", "sequence_parallel")
_ONLY = {"activation": "swish", "rmsnorm": True, "D_has_hdim": False, "d_ssm": None}


def options_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `causal_lm` from a `config.json` of either house.

    Raises UserError for an architecture that is neither Mamba-1 nor Mamba-2, KeyError for a setting that is missing.
    """
    return _of_transformers(config) if "hidden_size" in config else _of_state_spaces(config)


def _of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type", "mamba")
    if kind not in ("mamba", "mamba2"):
        raise UserError(f"The checkpoint is a {kind!r} model; only 'mamba' and 'mamba2' can be loaded.")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"The checkpoint's activation (hidden_act) is {activation!r}; only 'silu' can be loaded.")
    options = {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "expand": config["expand"],
        "conv_bias": config["use_conv_bias"],
        "bias": config["use_bias"],
        "norm_eps": config["layer_norm_epsilon"],
        "tie_embeddings": config.get("tie_word_embeddings", kind == "mamba"),
    }
    if kind == "mamba":
        return {**options, "dt_rank": config["time_step_rank"]}
    _check_dt_limit("time_step_limit", config.get("time_step_limit"))
    own = {"head_dim": config["head_dim"], "n_groups": config["n_groups"], "eps": config["layer_norm_epsilon"]}
    return {"mixer": "mamba2", **options, **own}


def _of_state_spaces(config: dict[str, Any]) -> dict[str, Any]:
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2") or config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise UserError("The checkpoint is not a pure Mamba-1 or Mamba-2 model; only those can be loaded.")
    multiple = config.get("pad_vocab_size_multiple", 8)
    options = {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "d_model": config["d_model"],
        "n_layers": config["n_layer"],
        "tie_embeddings": config.get("tie_embeddings", True),
    }
    if layer == "Mamba1":
        return {**options, **ssm}
    _check_dt_limit("dt_limit", ssm.pop("dt_limit", None))
    for key, known in _ONLY.items():
        if (value := ssm.pop(key, known)) != known:
            raise UserError(f"The checkpoint's ssm_cfg has {key} {value!r}; only {known!r} can be loaded.")
    ssm = {_RENAMED.get(key, key): value for key, value in ssm.items() if key not in _WITHOUT_EFFECT}
    return {"mixer": "mamba2", **options, "d_state": 128, "head_dim": 64, **ssm}


def _check_dt_limit(key: str, limit: Any) -> None:
    """transformers writes an infinite number as `{"__float__": "Infinity"}`."""
    if limit is None:
        return
    low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in limit)
    if low > 0 or high < math.inf:
        raise UserError(
            f"The checkpoint's step sizes are held between {low} and {high} ({key}); only those without limit can be "
            "loaded."
        )


def load_upstream(folder: str | Path) -> SequenceModel:
    """A language model from a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

    The `.bin` is read without unpickling code. Raises UserError when files are missing, damaged or do not fit.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"There is no config.json in {folder}. Download the checkpoint's whole folder.")
    model = _from_config(config_path)
    source = folder / "model.safetensors"
    if source.is_file():
        tensors = read_safetensors(source)
    else:
        source = folder / "pytorch_model.bin"
        if not source.is_file():
            raise UserError(f"There is neither model.safetensors nor pytorch_model.bin in {folder}.")
        tensors = _read_bin(source)
    load_weights(model, from_upstream(tensors), source)
    return model.eval()


def _from_config(path: Path) -> SequenceModel:
    remedy = "Download it again, from the same place as the weights."
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a model's configuration: it holds no settings. {remedy}")
        return causal_lm(**options_from_config(config))
    except KeyError as error:
        raise UserError(f"{path} has no {error}, which a Mamba's configuration needs. {remedy}") from error
    except ConfigError as error:
        raise UserError(f"{path} describes no model that can be built. {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} is not a Mamba's configuration ({' '.join(str(error).split())}). {remedy}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    remedy = "Download it again, or take the checkpoint's model.safetensors."
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on where the file was cut
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"The weights in {path} cannot be read ({type(error).__name__}: {first}): the file is damaged or holds "
            f"more than tensors. {remedy}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds no mapping of names to tensors. {remedy}")
    return tensors
