"""Bamba, a hybrid of Mamba-2 and attention with gated MLPs (IBM, Princeton, CMU and UIUC), in the form of transformers.

A layer there is two of ours: a mixer, and the MLP behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.backbones.residual import ResidualStack
from mambaseq.checkpoints.forms import NotLoaded, no_form, one_for_all
from mambaseq.checkpoints.stored import REMEDY_OF_WEIGHTS
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import UserError, shown
from mambaseq.mixers.attention import Attention
from mambaseq.mixers.mamba2 import GatedRMSNorm, Mamba2
from mambaseq.mixers.mlp import MLP
from mambaseq.mixers.norm import RMSNorm
from mambaseq.models import SequenceModel

WHOLE = (
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "mamba_n_heads", "mamba_d_head"),
    *("mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand"),
)
"""Keys of a config.json whose values are whole numbers above 0."""
DERIVED = ("mamba_d_head", "num_key_value_heads")
"""Those of them that may be left to others: "auto" or null."""
BOOLEAN = ("mamba_conv_bias", "mamba_proj_bias", "attention_bias", "mlp_bias")

_TURNED = 0.5  # share of a head's features, the only one that transformers' class has

_FIXED = {
    "encoder.embedding.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.final_layernorm.weight",
    "head.linear.weight": "lm_head.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(.+)")
_OURS = re.compile(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.+)")
# maps that are one of ours, by the map that has the first rows, and their parts
_JOINED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
_RENAMED = {"o_proj": "out_proj", "down_proj": "out_proj", "q_proj": "in_proj", "gate_proj": "in_proj"}


def is_bamba(names: Mapping[str, Any]) -> bool:
    """Whether tensors by name are those of transformers' class."""
    return _FIXED["encoder.embedding.weight"] in names


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `causal_lm` from a config.json. Raises KeyError for a missing key, UserError for a value that is
    not computed here."""
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    attention = config.get("attn_layer_indices") or []
    if not isinstance(attention, list) or not all(type(one) is int and 0 <= one < layers for one in attention):
        raise UserError(f"attn_layer_indices must be numbers of the {layers} layers, not {shown(attention)}.")
    heads, head_dim = config["mamba_n_heads"], config.get("mamba_d_head", "auto")
    if head_dim not in ("auto", None) and head_dim * heads != config["mamba_expand"] * width:
        raise UserError("mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size.")
    mixers: dict[str, dict[str, Any]] = {
        "mlp": {"hidden": config["intermediate_size"], "bias": config.get("mlp_bias", False)}
    }
    if attention:
        mixers["attention"] = _attention_options(config)
    return {
        "vocab_size": config["vocab_size"],
        "d_model": width,
        "n_layers": layers,
        "pattern": ["attention" if number in attention else "mamba2" for number in range(layers)],
        "mlp": True,
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "mixer": "mamba2",
        "d_state": config["mamba_d_state"],
        "d_conv": config["mamba_d_conv"],
        "expand": config["mamba_expand"],
        "head_dim": config["mamba_expand"] * width // heads,
        "n_groups": config["mamba_n_groups"],
        "conv_bias": config.get("mamba_conv_bias", True),
        "bias": config.get("mamba_proj_bias", False),
        "eps": config["rms_norm_eps"],
        "mixers": mixers,
    }


def _attention_options(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise NotLoaded(
            f"The checkpoint's rotary positions (rope_parameters, rope_scaling) are {shown(rope)}; only those of the "
            f"type 'default' can be loaded{'' if not isinstance(rope, dict) else f', not {shown(kind)}'}."
        )
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", _TURNED))
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{key} must be a number above 0, not {shown(value)}.")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rope_theta": float(theta),
        "rope_dims": int(head_dim * share),
        "bias": config.get("attention_bias", False),
    }


def from_transformers(tensors: Mapping[str, Tensor], source: Path | None = None) -> dict[str, Tensor]:
    """Tensors by transformers' names to ours; maps that are one here are joined. Raises UserError where a part of one
    is missing, which names `source`, the file or the index of the weights."""
    fixed = {theirs: mine for mine, theirs in _FIXED.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found[fixed.get(name, name)] = tensor
            continue
        number, part, rest = 2 * int(layer[1]), layer[2], layer[3]
        if part in ("input_layernorm", "pre_ff_layernorm"):
            found[f"backbone.layers.{number + (part != 'input_layernorm')}.norm.{rest}"] = tensor
        elif part == "mamba":
            found[f"backbone.layers.{number}.mixer.{rest}"] = tensor
        elif part in ("self_attn", "feed_forward"):
            module, _, kind = rest.partition(".")
            place = f"backbone.layers.{number + (part == 'feed_forward')}.mixer"
            if module in _JOINED:
                others = [name.replace(f".{module}.", f".{other}.") for other in _JOINED[module]]
                if missing := [other for other in others if other not in tensors]:
                    where = "" if source is None else f" in {source}"
                    raise UserError(
                        f"The weights{where} have {shown(name)}, but no {shown(missing[0])}. {REMEDY_OF_WEIGHTS}"
                    )
                tensor = torch.cat([tensors[other] for other in others])
            elif any(module in joined for joined in _JOINED.values()):
                continue  # joined above
            found[f"{place}.{_RENAMED.get(module, module)}.{kind}"] = tensor
        else:
            found[name] = tensor  # told as one that is not in the model
    return found


def is_hybrid(model: SequenceModel) -> bool:
    """Whether a model is a stack of mixers with an MLP behind each, which only Bamba's form can hold."""
    backbone = model.backbone
    return type(backbone) is ResidualStack and any(isinstance(one, MLP | Attention) for one in backbone.mixers())


def described(model: SequenceModel) -> dict[str, Any]:
    """The settings of transformers' config.json. Raises UserError for a model that is none."""
    mixers = model.backbone.mixers()
    if type(model.encoder) is not TokenEncoder or model.encoder.condition is not None:
        raise no_form("its encoder reads more than tokens")
    if len(set(mixers)) < len(mixers):
        raise no_form("some of its layers share a mixer")
    for number, mixer in enumerate(mixers):
        kinds = (MLP,) if number % 2 else (Mamba2, Attention)
        if type(mixer) not in kinds:
            wanted = "an MLP" if number % 2 else "mamba2 or attention"
            raise no_form(f"the mixer of layer {number} is a {type(mixer).__name__}, not {wanted}")
        if isinstance(mixer, Attention):
            _check_attention(number, mixer)
        if isinstance(mixer, MLP) and mixer.activation != "swiglu":
            raise no_form(f"layer {number} has the activation {mixer.activation}, not swiglu")
        if isinstance(mixer, Mamba2) and mixer.norm.norm_before_gate:
            raise no_form(f"layer {number} has norm_before_gate")
    norms = [norm for norm in model.backbone.modules() if isinstance(norm, RMSNorm | GatedRMSNorm)]
    eps = one_for_all([(0, norm.eps or 0.0) for norm in norms])
    places = range(len(mixers) // 2)
    found: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}  # where nothing attends
    for kind, sizes in ((Mamba2, _mamba2), (Attention, _attention), (MLP, _mlp)):
        of_kind = [(number, sizes(mixer)) for number, mixer in enumerate(mixers) if type(mixer) is kind]
        if of_kind:
            found |= one_for_all(of_kind)
        elif kind is Mamba2:
            raise no_form("it has no layer of mamba2")
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        "vocab_size": model.encoder.embedding.num_embeddings,
        "hidden_size": model.backbone.d_model,
        "num_hidden_layers": len(places),
        "attn_layer_indices": [place for place in places if isinstance(mixers[2 * place], Attention)],
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "num_logits_to_keep": 1,
        "tie_word_embeddings": model.tie_embeddings,
        **found,
    }


def _check_attention(number: int, mixer: Attention) -> None:
    half = 2 * mixer.rope_dims == mixer.head_dim
    if not mixer.rope or not half:
        told = f"{mixer.rope_dims} of {mixer.head_dim} features" if mixer.rope else "none"
        raise no_form(f"attention in layer {number} turns {told}, and Bamba's half of them")
    for name, other in (
        ("qk_norm", mixer.q_norm is not None),
        ("a window", mixer.window is not None),
        ("a head_dim that is not d_model / n_heads", mixer.head_dim * mixer.n_heads != mixer.d_model),
    ):
        if other:
            raise no_form(f"attention in layer {number} has {name}")


def _mamba2(mixer: Any) -> dict[str, Any]:
    return {
        "mamba_n_heads": mixer.n_heads,
        "mamba_d_head": mixer.head_dim,
        "mamba_n_groups": mixer.n_groups,
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": mixer.d_inner // mixer.d_model,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": mixer.conv1d.bias is not None,
        "mamba_proj_bias": mixer.in_proj.bias is not None,
    }


def _attention(mixer: Any) -> dict[str, Any]:
    theta = float(mixer.rope_theta)
    return {
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "attention_bias": mixer.in_proj.bias is not None,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": _TURNED},
    }


def _mlp(mixer: Any) -> dict[str, Any]:
    return {"intermediate_size": mixer.hidden, "mlp_bias": mixer.in_proj.bias is not None}


def to_transformers(model: SequenceModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model that `described` takes, by our names, under those of transformers."""
    mixers = model.backbone.mixers()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _OURS.fullmatch(name)
        if layer is None:
            found[_FIXED[name]] = tensor
            continue
        number, mixer = int(layer[1]), mixers[int(layer[1])]
        place = f"model.layers.{number // 2}"
        if layer[2] == "norm":
            found[f"{place}.{'pre_ff' if number % 2 else 'input'}_layernorm.{layer[3]}"] = tensor
        elif isinstance(mixer, Mamba2):
            found[f"{place}.mamba.{layer[3]}"] = tensor
        else:
            part, (out, first), sizes = "feed_forward", ("down_proj", "gate_proj"), [tensor.shape[0] // 2] * 2
            if isinstance(mixer, Attention):
                part, (out, first) = "self_attn", ("o_proj", "q_proj")
                sizes = [mixer.head_dim * heads for heads in (mixer.n_heads, mixer.n_kv_heads, mixer.n_kv_heads)]
            module, _, kind = layer[3].partition(".")
            if module == "out_proj":
                found[f"{place}.{part}.{out}.{kind}"] = tensor
            else:
                parts = zip(_JOINED[first], tensor.split(sizes), strict=True)
                found |= {f"{place}.{part}.{one}.{kind}": rows.contiguous() for one, rows in parts}
    return found
