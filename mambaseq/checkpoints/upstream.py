"""Conversion of names, in both directions: `state-spaces/mamba-*` and `mamba2-*` checkpoints, and transformers' Mamba,
Mamba2 (also Mamba-Codestral) and FalconMamba; Bamba is in `bamba`."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.backbones.residual import ResidualStack
from mambaseq.checkpoints import bamba
from mambaseq.checkpoints.export import assign_weights, weights
from mambaseq.checkpoints.forms import NotLoaded, no_form, one_for_all
from mambaseq.checkpoints.stored import REMEDY, REMEDY_OF_WEIGHTS, StoredWeights, check_quantised, promised
from mambaseq.domain import catalog
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import UserError, cut_list, shown
from mambaseq.heads.lm import LMHead
from mambaseq.limits import LAYERS, YAML_BYTES
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.mamba2 import GatedRMSNorm, Mamba2
from mambaseq.mixers.norm import RMSNorm
from mambaseq.models import SequenceModel, causal_lm

_FIXED = {
    "encoder.embedding.weight": "backbone.embedding.weight",
    "backbone.norm_f.weight": "backbone.norm_f.weight",
    "head.linear.weight": "lm_head.weight",
}


_OF_LAYER = re.compile(r"backbone\.layers\.(0|[1-9][0-9]*)\.(.+)")
_BOTH = {
    "norm.weight",
    "mixer.A_log",
    "mixer.D",
    "mixer.conv1d.weight",
    "mixer.in_proj.weight",
    "mixer.out_proj.weight",
}
_KINDS = {
    "Mamba-1": _BOTH | {"mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias"},
    "Mamba-2": _BOTH | {"mixer.dt_bias", "mixer.norm.weight"},
}
_OPTIONAL = {"mixer.conv1d.bias", "mixer.in_proj.bias", "mixer.out_proj.bias"}


def to_upstream(model: SequenceModel | Mapping[str, Tensor], *, transformers: bool = False) -> dict[str, Tensor]:
    """The weights of a model, or its tensors by name, under upstream's names (`transformers` calls the embedding
    `embeddings`). A tied head is written out.

    Raises UserError for what upstream's Mamba and Mamba-2 do not have: other mixers, encoders, heads and backbones,
    several kinds of layers, MLPs, shared mixers, conditions, and options that change the computation. Some of these
    options do not show in the tensors, so pass the model if you have it.
    """
    if isinstance(model, SequenceModel):
        if transformers and bamba.is_hybrid(model):
            bamba.described(model)
            return bamba.to_transformers(model, weights(model))
        _check_options(model, transformers)
        tensors: Mapping[str, Tensor] = weights(model)
    else:
        tensors = model
    _check_names(tensors)
    out = {_FIXED.get(name, name): tensor for name, tensor in tensors.items()}
    out.setdefault("lm_head.weight", out["backbone.embedding.weight"])
    if transformers:
        out["backbone.embeddings.weight"] = out.pop("backbone.embedding.weight")
    return out


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if found := _OF_LAYER.fullmatch(name):
            layers.setdefault(int(found[1]), set()).add(found[2])
        elif name not in _FIXED:
            raise no_form(f"it has {shown(name)}, which those do not have")
    if missing := [name for name in _FIXED if name not in tensors and name != "head.linear.weight"]:
        raise no_form(f"{shown(missing[0])} is missing")
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise no_form("its layers are not numbered from 0 on, or it has none")
    first = next((kind for kind, names in _KINDS.items() if names <= layers[0]), "Mamba-1")
    for number, names in sorted(layers.items()):
        if extra := sorted(names - _KINDS[first] - _OPTIONAL):
            raise no_form(f"layer {number} has {shown(extra[0])}, which a {first} layer has not")
        if missing := sorted(_KINDS[first] - names):
            raise no_form(f"layer {number} has no {shown(missing[0])}, which a {first} layer has")
        if names != layers[0]:
            raise no_form(f"layer {number} has other biases than layer 0")


def _check_options(model: SequenceModel, transformers: bool) -> None:
    """Refuse options that change the computation but do not show in names."""
    parts = {"encoder": TokenEncoder, "backbone": ResidualStack, "head": LMHead}
    for part, kind in parts.items():
        if type(found := getattr(model, part)) is not kind:
            raise no_form(f"its {part} is a {type(found).__name__}, not a {kind.__name__}")
    eps = {norm.eps or 0.0 for norm in model.backbone.modules() if isinstance(norm, RMSNorm | GatedRMSNorm)}
    if len(eps) > 1 or (not transformers and eps != {1e-5}):  # a setting in transformers; fixed upstream
        theirs = "one for all" if transformers else "1e-05"
        raise no_form(f"its norms have the epsilons {', '.join(map(str, sorted(eps)))}, but theirs is {theirs}")
    for number, mixer in enumerate(model.backbone.mixers()):
        if type(mixer) not in (Mamba, Mamba2):
            raise no_form(f"the mixer of layer {number} is a {type(mixer).__name__}")
        if isinstance(mixer, Mamba) and mixer.selective_norm_eps is not None and not transformers:
            raise no_form(f"layer {number} has norms of dt, B and C, which only Falcon Mamba in transformers has")
        if isinstance(mixer, Mamba2) and mixer.norm.norm_before_gate:
            raise no_form(f"layer {number} has norm_before_gate")


def described(model: SequenceModel) -> dict[str, Any]:
    """The settings of transformers' config.json for a model that `to_upstream` takes; of ids and dtype it says nothing.

    Raises UserError for other models, and for layers of one mixer with different sizes.
    """
    if bamba.is_hybrid(model):
        return bamba.described(model)
    _check_options(model, transformers=True)
    mixers = model.backbone.mixers()
    sizes = one_for_all([(number, _sizes(mixer)) for number, mixer in enumerate(mixers)])
    assert isinstance(model.encoder, TokenEncoder)
    kind = "Mamba2" if isinstance(mixers[0], Mamba2) else "FalconMamba" if "mixer_rms_eps" in sizes else "Mamba"
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": "falcon_mamba" if kind == "FalconMamba" else kind.lower(),
        "vocab_size": model.encoder.embedding.num_embeddings,
        "hidden_size": mixers[0].d_model,
        "num_hidden_layers": len(mixers),
        "layer_norm_epsilon": model.backbone.norm_f.eps or 0.0,  # type: ignore[union-attr]
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": model.tie_embeddings,
        **sizes,
    }


def _sizes(mixer: Mixer) -> dict[str, Any]:
    assert isinstance(mixer, Mamba | Mamba2)
    found = {
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.d_inner // mixer.d_model,
        "intermediate_size": mixer.d_inner,
        "use_bias": mixer.in_proj.bias is not None,
        "use_conv_bias": mixer.conv1d.bias is not None,
    }
    if isinstance(mixer, Mamba):
        norms = {} if mixer.selective_norm_eps is None else {"mixer_rms_eps": mixer.selective_norm_eps}
        return {**found, "time_step_rank": mixer.dt_rank, **norms}
    return {
        **found,
        "num_heads": mixer.n_heads,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.n_groups,
        "chunk_size": 256,
    }


def from_upstream(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's or transformers' names to ours. Of layers with MLPs, all of a layer's tensors go together."""
    if bamba.is_bamba(tensors):
        return bamba.from_transformers(tensors)
    ours = {theirs: mine for mine, theirs in _FIXED.items()}
    ours["backbone.embeddings.weight"] = "encoder.embedding.weight"
    if any(_WITH_MLP.fullmatch(name) for name in tensors):
        return dict(_of_two(ours.get(name, name), tensor) for name, tensor in tensors.items())
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


_WITH_MLP = re.compile(r"backbone\.layers\.\d+\.(norm2|mlp)\..+")


def _of_two(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Of a layer of state-spaces that has an MLP, which is two of ours; the gate's rows come first here."""
    layer = _OF_LAYER.fullmatch(name)
    if layer is None:
        return name, tensor
    part, _, rest = layer[2].partition(".")
    number = 2 * int(layer[1]) + (part in ("norm2", "mlp"))
    if part == "mlp":
        rest = rest.replace("fc1.", "in_proj.").replace("fc2.", "out_proj.")
        if rest.startswith("in_proj."):
            tensor = tensor.roll(len(tensor) // 2, 0)
    return f"backbone.layers.{number}.{_PARTS.get(part, part)}.{rest}", tensor


_PARTS = {"norm2": "norm", "mlp": "mixer"}
_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}
# ssm_cfg of Mamba-2 and -3: other names, options without an effect on the result, and options with one supported value
_RENAMED = {"headdim": "head_dim", "ngroups": "n_groups", "is_outproj_norm": "out_norm"}
_WITHOUT_EFFECT = (
    *("chunk_size", "conv_init", "use_mem_eff_path", "sequence_parallel", "fuse_pregate_headwise_norm", "dropout"),
)
_ONLY = {"activation": "swish", "rmsnorm": True, "D_has_hdim": False, "d_ssm": None}


def options_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `causal_lm` from a `config.json` of upstream or transformers.

    Raises UserError for an architecture that is none of Mamba-1 to -3 and for a setting of the wrong type,
    KeyError for one that is missing.
    """
    _check_kind(config.get("model_type"))
    _check_types(config)
    return _of_transformers(config) if "hidden_size" in config else _of_state_spaces(config)


_WHOLE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "expand", "head_dim", "n_groups"),
    *("d_model", "n_layer", "pad_vocab_size_multiple", "d_state", "d_conv", "headdim", "ngroups", "mimo_rank"),
    *bamba.WHOLE,
)
_BOOLEAN = (
    "use_conv_bias",
    "use_bias",
    "tie_word_embeddings",
    "tie_embeddings",
    "conv_bias",
    "bias",
    "is_mimo",
    "is_outproj_norm",
    *bamba.BOOLEAN,
)
_LARGEST = 2**31 - 1
_LOADED = ("mamba", "mamba2", "falcon_mamba", "bamba")
_HYBRIDS = {
    "jamba": "a hybrid of Mamba, attention and mixtures of experts",
    "zamba": "a hybrid whose layers share one attention on concatenated inputs",
    "zamba2": "a hybrid whose layers share attention on concatenated inputs with adapters",
    "nemotron_h": "a hybrid with MLPs of squared ReLU and layers of its own order",
    "granitemoehybrid": "a hybrid with multipliers and mixtures of experts",
    "falcon_h1": "a hybrid that runs Mamba-2 and attention side by side",
}


def _check_kind(kind: Any) -> None:
    """Raise UserError for a model that is neither, and say which commands of domains import others."""
    if kind is None or kind in _LOADED:
        return
    others = [f"mambaseq {entry.name}" for entry in catalog()["commands"] if entry.name.endswith("/import")]
    told = f" Others are imported by: {cut_list(others)}." if others else ""
    what = _HYBRIDS.get(kind) if isinstance(kind, str) else None
    raise NotLoaded(
        f"The checkpoint is a {shown(kind)} model{f', {what}' if what else ''}; only "
        f"{cut_list(map(shown, _LOADED))} can be loaded.{told}"
    )


def _check_types(config: dict[str, Any]) -> None:
    ssm = config.get("ssm_cfg")
    if not isinstance(ssm, dict | None):
        raise UserError(f"ssm_cfg must hold settings, not {shown(ssm)}.")
    for key, value in [*config.items(), *(ssm or {}).items()]:
        if key in bamba.DERIVED and value in (None, "auto"):
            continue
        if key in _WHOLE and not (type(value) is int and 0 < value <= _LARGEST):
            raise UserError(f"{key} must be a whole number from 1 to {_LARGEST:,}, not {shown(value)}.")
        if key == "d_intermediate" and not (type(value) is int and 0 <= value <= _LARGEST):
            raise UserError(f"{key} must be a whole number from 0 to {_LARGEST:,}, not {shown(value)}.")
        if key in _BOOLEAN and type(value) is not bool:
            raise UserError(f"{key} must be true or false, not {shown(value)}.")
        if (
            key in ("time_step_rank", "dt_rank")
            and value != "auto"
            and not (type(value) is int and 0 < value <= _LARGEST)
        ):
            raise UserError(f'{key} must be "auto" or a whole number of at least 1, not {shown(value)}.')
        if key in ("layer_norm_epsilon", "mixer_rms_eps", "rms_norm_eps") and not (
            type(value) in (int, float) and 0 <= value < 1
        ):
            raise UserError(f"{key} must be a number from 0 to 1, not {shown(value)}.")
    LAYERS.check(config.get("num_hidden_layers", config.get("n_layer", 1)), "The configuration")


def _of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type", "mamba")
    if kind == "bamba":
        _check_dt_limit("time_step_limit", config.get("time_step_limit"))
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise NotLoaded(f"The checkpoint's activation (hidden_act) is {shown(activation)}; only 'silu' can be loaded.")
    if kind == "bamba":
        return bamba.options_of(config)
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
        "tie_embeddings": config.get("tie_word_embeddings", kind != "mamba2"),
    }
    if kind != "mamba2":
        norms = {"selective_norm_eps": config.get("mixer_rms_eps", 1e-6)} if kind == "falcon_mamba" else {}
        return {**options, "dt_rank": config["time_step_rank"], **norms}
    _check_dt_limit("time_step_limit", config.get("time_step_limit"))
    own = {"head_dim": config["head_dim"], "n_groups": config["n_groups"], "eps": config["layer_norm_epsilon"]}
    return {"mixer": "mamba2", **options, **own}


def _of_state_spaces(config: dict[str, Any]) -> dict[str, Any]:
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    others = {} if layer in _LAYERS else {"ssm_cfg.layer": layer}
    others |= {key: config[key] for key in ("attn_layer_idx",) if config.get(key)}
    if others:
        told = cut_list(f"{key} {shown(value)}" for key, value in others.items())
        raise NotLoaded(
            f"The checkpoint is not a pure Mamba-1, Mamba-2 or Mamba-3 model ({told}); of those of state-spaces only "
            "these can be loaded, with MLPs between them or without."
        )
    multiple = config.get("pad_vocab_size_multiple", 8)
    options = {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "d_model": config["d_model"],
        "n_layers": config["n_layer"],
        "tie_embeddings": config.get("tie_embeddings", True),
    }
    if inner := config.get("d_intermediate"):
        options |= {"mlp": True, "mixers": {"mlp": {"hidden": -(-inner // 128) * 128}}}  # as theirs rounds it
    if layer == "Mamba1":
        return {**options, **ssm}
    options |= {"mixer": _LAYERS[layer], "d_state": 128, "head_dim": 64}
    if layer == "Mamba2":
        _check_dt_limit("dt_limit", ssm.pop("dt_limit", None))
        for key, known in _ONLY.items():
            if (value := ssm.pop(key, known)) != known:
                raise NotLoaded(
                    f"The checkpoint's ssm_cfg has {key} {shown(value)}; only {shown(known)} can be loaded."
                )
    else:  # language models of it came after the rate of decay had changed: none has `softplus_rate`
        rank = ssm.pop("mimo_rank", 4)
        options["rank"] = rank if ssm.pop("is_mimo", False) else None
    ssm = {_RENAMED.get(key, key): value for key, value in ssm.items() if key not in _WITHOUT_EFFECT}
    return {**options, **ssm}


def _check_dt_limit(key: str, limit: Any) -> None:
    """transformers writes an infinite number as `{"__float__": "Infinity"}`."""
    if limit is None:
        return
    low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in limit)
    if low > 0 or high < math.inf:
        raise NotLoaded(
            f"The checkpoint limits its step sizes to {low} to {high} ({key}); only unlimited ones can be loaded."
        )


def load_upstream(folder: str | Path, *, keep_dtype: bool = False, dtype: torch.dtype = torch.float32) -> SequenceModel:
    """A language model from a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or the parts of
    one of them that an index lists (`model.safetensors.index.json`).

    keep_dtype: each parameter in its dtype in the file (float64 becomes float32). dtype: otherwise, that of all. Layers
    are read one by one into the memory that they keep, which is all that the model is given.
    Raises UserError if files are missing, damaged or do not fit.
    """
    folder = Path(folder)
    config_path = config_in(folder)
    options, quantisation = _options(config_path)
    stored = StoredWeights(folder)
    check_quantised(
        stored.described, stored.source, quantisation, config_path
    )  # packed ones are fewer, and fit nothing
    with torch.device("meta"):  # without memory: the configuration may ask for far more than the weights have
        model = _made(config_path, options)
    asked, found = model.n_parameters(), sum(tensor.numel() for tensor in stored.described.values())
    if asked > 2 * found + 2**20:
        raise UserError(
            f"{config_path} describes a model of {asked:,} parameters, but {stored.source} has {found:,}. {REMEDY}"
        )
    hybrid = bamba.is_bamba(stored.described)
    ours = functools.partial(bamba.from_transformers, source=stored.source) if hybrid else from_upstream
    try:
        described = ours(stored.described)
    except UserError:
        _check_parts(stored)
        raise
    if model.state_dict().keys() - described.keys():
        _check_parts(stored)
    groups: dict[str, list[str]] = {}
    for name in stored.described:
        layer = _LAYER_NUMBER.search(name)
        groups.setdefault(layer[1] if layer else name, []).append(name)
    parts = (ours(stored.read(names)) for names in groups.values())
    assign_weights(model, described, parts, stored.source, "keep" if keep_dtype else dtype, remedy=REMEDY_OF_WEIGHTS)
    return model.eval()


def _check_parts(stored: StoredWeights) -> None:
    """Raise UserError that names the part, if one lacks a tensor that it has by the index."""
    for name, part in promised(stored.source).items():
        if name not in stored.described:
            raise UserError(
                f"{part} has no tensor {shown(name)}, although {stored.source.name} says so. {REMEDY_OF_WEIGHTS}"
            )


_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def config_in(folder: Path) -> Path:
    """The configuration of a published model. Raises UserError if there is none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no config.json in {folder}. Download the checkpoint's whole folder.")
    return folder / "config.json"


def _options(path: Path) -> tuple[dict[str, Any], Any]:
    """The arguments of `causal_lm` in a configuration file, and its `quantization_config`, None where it has none."""
    try:
        YAML_BYTES.check(path.stat().st_size, str(path))
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError("It holds no settings.")
        return options_from_config(config), config.get("quantization_config")
    except KeyError as error:
        raise UserError(f"{path} has no {error}, which a Mamba's configuration needs. {REMEDY}") from error
    except NotLoaded as error:
        raise NotLoaded(f"{path} cannot be used. {error}") from error
    except UserError as error:
        raise UserError(f"{path} cannot be used. {error} {REMEDY}") from error
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _not_one(path, error) from error


def _made(path: Path, options: dict[str, Any]) -> SequenceModel:
    try:
        return causal_lm(**options)
    except UserError as error:
        raise UserError(f"{path} does not describe a model that can be built. {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _not_one(path, error) from error


def _not_one(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a Mamba's configuration ({' '.join(str(error).split())[:200]}). {REMEDY}")
