"""Weights with low-rank adapters (LoRA) under `peft`'s names: splitting and merging them, and writing an adapter as
`peft` does. None of this needs `peft`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.errors import UserError

FOLDER = "adapter"
"""The adapter's file next to a model's weights, if it is kept apart."""

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """A model's tensors without adapters, by the model's own names, and for each adapted weight the two factors `(rank,
    in)` and `(out, rank)` whose scaled product is added to it.

    Raises UserError for a factor without the other one, or without the weight.
    """
    base = {name.replace(_BASE, "."): tensor for name, tensor in tensors.items() if ".lora_" not in name}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors:
        if name.endswith(_A):
            path = name.removesuffix(_A)
            if f"{path}{_B}" not in tensors or f"{path}.weight" not in base:
                raise UserError(f"The adapter of {path[:200]} is incomplete. Copy or export the model again.")
            factors[f"{path}.weight"] = tensors[name], tensors[f"{path}{_B}"]
    return base, factors


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A model's tensors with their adapters merged into the weights. scale: alpha / rank."""
    base, factors = split(tensors)
    for name, (down, up) in factors.items():
        base[name] = added(base[name], down, up, scale)
    return base


def added(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A weight `(out, in)` with the factors `(rank, in)` and `(out, rank)` of its adapter merged into it."""
    return weight + scale * (up @ down)


def save_adapter(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], settings: Mapping[str, Any]) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it. settings: `rank`, `alpha`, `dropout`."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{path}.lora_A.weight": down.contiguous(), f"{path}.lora_B.weight": up.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "target_modules": sorted(name.removesuffix(".weight") for name in factors),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json_text(described, indent=2) + "\n", encoding="utf-8")


def saved_factors(
    adapter: Mapping[str, Tensor], described: Mapping[str, Tensor], source: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a saved adapter, as `split` gives them. described: the tensors of the model without it, whose
    values are not read.

    Raises UserError that names the file, for an adapter that does not fit.
    """
    ours = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter.items()}
    named = {name.replace(".lora_A.weight", _A).replace(".lora_B.weight", _B): t for name, t in ours.items()}
    try:
        base, factors = split({**described, **named})
        if more := sorted(base.keys() - described.keys()):
            raise UserError(f"The model has no {more[0][:200]}. Copy or export the model again.")
        for name, (down, up) in factors.items():
            if (up.to("meta") @ down.to("meta")).shape != base[name].shape:
                raise UserError(f"That of {name[:200]} has another shape. Copy or export the model again.")
    except (UserError, RuntimeError) as error:
        raise UserError(f"The adapter in {source} does not fit the model: {str(error)[:300]}") from error
    return factors
