"""Low-rank adapters (LoRA, arXiv:2106.09685) beside the linear maps of a model, by `peft`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import lightning
from torch import nn

from mambaseq.checkpoints.lightning_io import LORA
from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.models import SequenceModel
from mambaseq.tasks.optimizer import matches


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) beside the backbone's linear maps.

    They and the head are trained; all else stays as finetune.init_from has it. Needs peft: pip install
    'mambaseq[finetune]'.

    Args:
        rank: rank of the two matrices of each adapter; 0 is off.
        alpha: what an adapter adds is scaled by alpha / rank.
        dropout: probability with which an input of an adapter is dropped in training.
        targets: patterns of the linear maps that get an adapter, such as "*.in_proj"; all of the backbone's when empty.
        export: merged adds the adapters to the exported weights; kept writes them beside these, as peft reads them.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=list)
    export: Literal["merged", "kept"] = "merged"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank must be at least 0; it is {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha must be above 0; it is {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be at least 0 and below 1; it is {self.dropout}.")


class AdapterRecord(lightning.Callback):
    """Describes the adapters in each checkpoint, so that they can be merged into the weights."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[LORA] = dataclasses.asdict(self.config)


def add_adapters(model: SequenceModel, config: LoraConfig) -> None:
    """Add adapters, which start with no effect, to a model's linear maps, and freeze encoder and backbone.

    Raises ConfigError if `peft` is missing, and for a pattern that matches no linear map of the backbone.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora.rank is {config.rank}, which needs the package peft, but that cannot be imported "
            f"({str(error)[:100]}). Install it: pip install 'mambaseq[finetune]'."
        ) from error
    known = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("backbone.")]
    for pattern in config.targets:
        if not any(matches(name, pattern) for name in known):
            raise ConfigError(
                f"lora.targets: no linear map of the backbone is named {shown(pattern)}, or in a module of that name. "
                f"There are {cut_list(known)}."
            )
    targets = [name for name in known if not config.targets or any(matches(name, p) for p in config.targets)]
    if not targets:
        raise ConfigError("lora.rank is set, but the backbone has no linear map that could have an adapter.")
    owners: dict[int, str] = {}
    for name in targets:
        weight = id(model.get_submodule(name).weight)
        if weight in owners:
            raise ConfigError(
                f"lora: {owners[weight]} and {name} have one weight (tie_projections), which adapters would part. "
                "Set model.backbone.tie_projections to false (finetune.init_from gives both the same values), or name "
                "other maps with lora.targets."
            )
        owners[weight] = name
    trained = {id(p) for p in model.head.parameters()} - {id(p) for p in model.encoder.parameters()}
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or id(parameter) in trained)
