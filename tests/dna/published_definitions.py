"""Published models of DNA with random weights, and their outputs by their definitions, written down once more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
WIDTH, STATES = 16, 3
# their character tokenizer: special tokens 0 to 6, then the bases
IDS = {letter: 7 + place for place, letter in enumerate("ACGTN")}
MASK = 3
PAIRED = [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
# ours for each of theirs: bases first, the mask token last where there is one
MASKED = [5, 6, 7, 15, 8, 9, 10, 0, 1, 2, 3, 4, 11, 12, 13, 14]
CAUSAL = [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 12, 13, 14, 15]


def some(*shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape)


def mamba_weights(stem: str, bias: bool) -> Weights:
    inner, rank = 2 * WIDTH, 1
    found = {
        "A_log": some(inner, STATES),
        "D": some(inner),
        "in_proj.weight": some(2 * inner, WIDTH),
        "conv1d.weight": some(inner, 1, 4),
        "conv1d.bias": some(inner),
        "x_proj.weight": some(rank + 2 * STATES, inner),
        "dt_proj.weight": some(inner, rank),
        "dt_proj.bias": some(inner),
        "out_proj.weight": some(WIDTH, inner),
    }
    if bias:
        found |= {"in_proj.bias": some(2 * inner), "out_proj.bias": some(WIDTH)}
    return {f"{stem}{name}": tensor for name, tensor in found.items()}


def caduceus(**options: Any) -> tuple[dict[str, Any], Weights]:
    """A config.json and random weights in its names."""
    config = {
        "model_type": "caduceus",
        "architectures": ["CaduceusForMaskedLM"],
        "d_model": WIDTH,
        "n_layer": 2,
        "vocab_size": 16,
        "pad_vocab_size_multiple": 8,
        "ssm_cfg": {"d_state": STATES, "dt_rank": "auto", "dt_min": 1e-3, "use_fast_path": True, "bias": False},
        "rms_norm": True,
        "fused_add_norm": False,
        "residual_in_fp32": False,
        "norm_epsilon": 1e-5,
        "bidirectional": True,
        "bidirectional_strategy": "add",
        "bidirectional_weight_tie": True,
        "rcps": False,
        **options,
    }
    strands, stem = config["rcps"], "caduceus.backbone."
    # ordered as text, as JSON has it: in the published code the buffer beside the weights is what counts
    config["complement_map"] = {str(i): PAIRED[i] for i in sorted(range(16), key=str)} if strands else None
    table, map_ = some(16, WIDTH), torch.tensor(PAIRED)
    words = f"{stem}embeddings.word_embeddings."
    weights: Weights = {f"{words}embedding.weight" if strands else f"{words}weight": table}
    weights["lm_head.lm_head.weight" if strands else "lm_head.weight"] = table
    if strands:
        weights |= {f"{words}complement_map": map_, "lm_head.complement_map": map_}
    within = "submodule." if strands and not config["fused_add_norm"] else ""
    norms = [f"{stem}layers.{i}.norm.{within}" for i in range(config["n_layer"])] + [f"{stem}norm_f.{within}"]
    for norm in norms:
        weights[f"{norm}weight"] = 1 + some(WIDTH)
        if not config["rms_norm"]:
            weights[f"{norm}bias"] = some(WIDTH)
    for number in range(config["n_layer"]):
        mixer = f"{stem}layers.{number}.mixer.{'submodule.' if strands else ''}"
        weights |= mamba_weights(f"{mixer}mamba_fwd.", config["ssm_cfg"]["bias"])
        if config["bidirectional"]:
            weights |= mamba_weights(f"{mixer}mamba_rev.", config["ssm_cfg"]["bias"])
        if config["bidirectional"] and config["bidirectional_weight_tie"]:
            for name in [n for n in weights if n.startswith(f"{mixer}mamba_rev.") and "_proj." in n]:
                if "in_proj" in name or "out_proj" in name:
                    weights[name] = weights[name.replace("mamba_rev", "mamba_fwd")]
    return config, weights


def mamba(weights: Weights, stem: str, x: Tensor) -> Tensor:
    """Mamba-1 (arXiv:2312.00752, algorithm 2) step by step."""
    w = {name.removeprefix(stem): tensor for name, tensor in weights.items() if name.startswith(stem)}
    x, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, -1)
    length = x.shape[1]
    x = F.conv1d(x.transpose(1, 2), w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=x.shape[-1])
    x = F.silu(x[..., :length]).transpose(1, 2)
    dt, B, C = F.linear(x, w["x_proj.weight"]).split([1, STATES, STATES], -1)
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    state, A = torch.zeros(*x.shape[::2], STATES), -w["A_log"].exp()
    ys = []
    for t in range(length):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + x * w["D"]) * F.silu(z)
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


def caduceus_by_definition(config: dict[str, Any], weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the hidden states before the head, `(batch, length, d_model)` or two halves of that."""
    strands, fused, stem = config["rcps"], config["fused_add_norm"], "caduceus.backbone."
    within = "submodule." if strands and not fused else ""

    def norm(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{stem}{name}.{within}weight"]
        if config["rms_norm"]:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return F.layer_norm(x, (WIDTH,), weight, weights[f"{stem}{name}.{within}bias"])

    def mixer(number: int, x: Tensor) -> Tensor:
        inner = f"{stem}layers.{number}.mixer.{'submodule.' if strands else ''}mamba_"
        y = mamba(weights, f"{inner}fwd.", x)
        if not config["bidirectional"]:
            return y
        other = mamba(weights, f"{inner}rev.", x.flip(1)).flip(1)
        return y + other if config["bidirectional_strategy"] == "add" else y * other

    def turned(x: Tensor) -> Tensor:
        return x.flip(1, 2)

    words = f"{stem}embeddings.word_embeddings."
    if not strands:
        table = weights[f"{words}weight"]
        x, stream = table[ids], torch.zeros(())
        for number in range(config["n_layer"]):
            stream = stream + x
            x = mixer(number, norm(f"layers.{number}.norm", stream))
        hidden = norm("norm_f", stream + x)
        return F.linear(hidden, weights["lm_head.weight"]), hidden
    table = weights[f"{words}embedding.weight"]
    partner = torch.tensor(PAIRED)
    one, two = table[ids], turned(table[partner[ids.flip(1)]])
    stream_one, stream_two = torch.zeros(()), torch.zeros(())
    for number in range(config["n_layer"]):
        stream_one, stream_two = stream_one + one, stream_two + two
        if fused:  # the published code takes each half for the other here
            stream_one, stream_two = stream_two, stream_one
        name = f"layers.{number}.norm"
        one = mixer(number, norm(name, stream_one))
        two = turned(mixer(number, norm(name, turned(stream_two))))
    one, two = norm("norm_f", stream_one + one), turned(norm("norm_f", turned(stream_two + two)))
    head = weights["lm_head.lm_head.weight"]
    return F.linear(one, head) + F.linear(two.flip(-1), head[partner]), torch.cat([one, two], -1)


def hyenadna(**options: Any) -> tuple[dict[str, Any], Weights]:
    config = {
        "model_type": "hyenadna",
        "architectures": ["HyenaDNAForCausalLM"],
        "activation_freq": 10,
        "d_inner": 24,
        "d_model": WIDTH,
        "emb_dim": 5,
        "embed_dropout": 0.1,
        "filter_order": 6,
        "hyena_order": 2,
        "layer_norm_epsilon": 1e-5,
        "max_seq_len": 34,
        "n_layer": 2,
        "num_inner_mlps": 2,
        "pad_vocab_size_multiple": 8,
        "short_filter_order": 3,
        "tie_word_embeddings": False,
        "train_freq": True,
        "use_bias": True,
        "vocab_size": 12,
        **options,
    }
    length, inner = config["max_seq_len"], config["d_inner"]
    weights = {
        "hyena.backbone.embeddings.word_embeddings.weight": some(16, WIDTH),
        "hyena.backbone.ln_f.weight": 1 + some(WIDTH),
        "hyena.backbone.ln_f.bias": some(WIDTH),
        "lm_head.weight": some(16, WIDTH),
    }
    for number in range(config["n_layer"]):
        layer: Weights = {
            "mixer.short_filter.weight": some(3 * WIDTH, 1, 3),
            "mixer.short_filter.bias": some(3 * WIDTH),
            "mixer.filter_fn.bias": some(WIDTH),
            "mixer.filter_fn.pos_emb.z": some(1, length, 5),
            "mixer.filter_fn.pos_emb.t": torch.linspace(0, 1, length)[None, :, None],
            "mixer.filter_fn.modulation.deltas": torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, WIDTH)[
                None, None
            ],
            "mixer.filter_fn.implicit_filter.6.weight": some(WIDTH, 6),
        }
        for name, rows, columns in (
            ("mixer.in_proj", 3 * WIDTH, WIDTH),
            ("mixer.out_proj", WIDTH, WIDTH),
            ("mlp.fc1", inner, WIDTH),
            ("mlp.fc2", WIDTH, inner),
            ("mixer.filter_fn.implicit_filter.0", 6, 5),
            ("mixer.filter_fn.implicit_filter.2", 6, 6),
            ("mixer.filter_fn.implicit_filter.4", 6, 6),
        ):
            layer |= {f"{name}.weight": some(rows, columns), f"{name}.bias": some(rows)}
        for name in ("norm1", "norm2"):
            layer |= {f"{name}.weight": 1 + some(WIDTH), f"{name}.bias": some(WIDTH)}
        frequency = 10 + some(1, 6)
        if config["train_freq"]:
            layer |= {f"mixer.filter_fn.implicit_filter.{place}.freq": frequency for place in (1, 3, 5)}
        weights |= {f"hyena.backbone.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return config, weights


def hyenadna_by_definition(config: dict[str, Any], weights: Weights, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the residual stream after each layer, then its norm."""
    x, stem, length = weights["hyena.backbone.embeddings.word_embeddings.weight"][ids], "hyena.backbone.", ids.shape[1]
    streams = []
    for number in range(config["n_layer"]):
        prefix = f"{stem}layers.{number}."
        w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        y = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"])
        y = F.linear(y, w["mixer.in_proj.weight"], w["mixer.in_proj.bias"]).transpose(1, 2)
        y = F.conv1d(y, w["mixer.short_filter.weight"], w["mixer.short_filter.bias"], padding=2, groups=3 * WIDTH)
        gate, other, v = y[..., :length].split(WIDTH, 1)
        h = w["mixer.filter_fn.pos_emb.z"][0, :length]
        for place in (0, 2, 4):
            inner = f"mixer.filter_fn.implicit_filter.{place}"
            frequency = w.get(f"mixer.filter_fn.implicit_filter.{place + 1}.freq", torch.tensor(10.0))
            h = (frequency * F.linear(h, w[f"{inner}.weight"], w[f"{inner}.bias"])).sin()
        h = F.linear(h, w["mixer.filter_fn.implicit_filter.6.weight"])
        time, rates = w["mixer.filter_fn.pos_emb.t"][0, :length], w["mixer.filter_fn.modulation.deltas"][0]
        h = (h * ((-time * rates.abs()).exp() + 0.05)).t()
        v = v * other
        sums = [(v[..., : t + 1] * h[:, : t + 1].flip(1)).sum(-1) for t in range(length)]
        v = torch.stack(sums, -1) + v * w["mixer.filter_fn.bias"][:, None]
        x = x + F.linear((v * gate).transpose(1, 2), w["mixer.out_proj.weight"], w["mixer.out_proj.bias"])
        y = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"])
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
        x = x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        streams.append(x)
    x = F.layer_norm(x, (WIDTH,), weights[f"{stem}ln_f.weight"], weights[f"{stem}ln_f.bias"])
    return F.linear(x, weights["lm_head.weight"]), [*streams, x]


def write(folder: Path, config: dict[str, Any], weights: Weights, shared: bool = True) -> Path:
    """A folder as published. shared: with tensors that are one under all of their names (pytorch_model.bin); otherwise
    each once, in model.safetensors, as transformers saves them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shared:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    once: dict[int, str] = {}
    for name, tensor in weights.items():
        once.setdefault(tensor.data_ptr(), name)
    save_file({name: weights[name] for name in once.values()}, folder / "model.safetensors", {"format": "pt"})
    return folder
