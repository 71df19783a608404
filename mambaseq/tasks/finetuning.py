"""Which parts of a model are trained, when, and how fast."""

from __future__ import annotations

import dataclasses
import math

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.tasks.optimizer import matches


@dataclasses.dataclass
class FinetuneConfig:
    """Training that starts from given weights.

    A pattern is a parameter's name, or that of a module for all parameters in it (backbone, encoder.embedding,
    "backbone.layers.*.norm").

    Args:
        init_from: a run, the model folder of one, or that of a published Mamba or Mamba-2 (config.json and weights), to
            take the weights from, by name; a head or an encoder that does not fit is initialised. Empty for none.
        other_tokenizer: begin although ids mean something else to the tokenizer of init_from: rows of ids that mean the
            same in both are taken, others initialised. Without it such a source is refused.
        freeze: patterns of parameters that are not trained, such as "encoder" or "backbone.layers.0".
        unfreeze: pattern to the optimizer step at which frozen parameters begin to be trained.
        lr_of: pattern to a factor of the learning rate; where several match, the longest pattern counts.
    """

    init_from: str = ""
    other_tokenizer: bool = False
    freeze: list[str] = dataclasses.field(default_factory=list)
    unfreeze: dict[str, int] = dataclasses.field(default_factory=dict)
    lr_of: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, factor in self.lr_of.items():
            if not 0 <= factor < math.inf:
                raise ConfigError(f"finetune.lr_of.{pattern[:80]} must be at least 0; it is {factor}.")
        for pattern, step in self.unfreeze.items():
            if step < 0:
                raise ConfigError(f"finetune.unfreeze.{pattern[:80]} must be a step, at least 0; it is {step}.")
        if self.unfreeze and not self.freeze:
            raise ConfigError("finetune.unfreeze needs finetune.freeze, which is empty. Leave it out.")

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError for a pattern that matches nothing, one that freezes adapters, and if nothing is left to
        train."""
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.freeze if any(".lora_" in name for name in names) else ():
            if met := [name for name in names if name.startswith("backbone.") and matches(name, pattern)]:
                raise ConfigError(
                    f"finetune.freeze: {shown(pattern)} names {cut_list(met, 3)}, but with lora.rank the backbone is "
                    "frozen except for its adapters. Leave the pattern out."
                )
        frozen = self.frozen(model, 0)
        for key, patterns, among in (
            ("freeze", self.freeze, names),
            ("unfreeze", self.unfreeze, [n for n in names if any(matches(n, pattern) for pattern in self.freeze)]),
            ("lr_of", self.lr_of, names),
        ):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in among):
                    known = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in among))
                    raise ConfigError(
                        f"finetune.{key}: no parameter {'that is frozen ' if key == 'unfreeze' else ''}is named "
                        f"{shown(pattern)}, or in a module of that name. There are {cut_list(known)}."
                    )
        if frozen and len(frozen) == len(names):
            raise ConfigError("finetune.freeze leaves nothing to train. Freeze less, such as the backbone alone.")

    def frozen(self, model: nn.Module, step: float) -> frozenset[str]:
        """Names of the parameters that are frozen in an optimizer step."""
        thawed = [pattern for pattern, since in self.unfreeze.items() if since <= step]
        return frozenset(
            name
            for name, _ in model.named_parameters()
            if any(matches(name, pattern) for pattern in self.freeze)
            and not any(matches(name, pattern) for pattern in thawed)
        )


class Freezing(lightning.Callback):
    """Keeps parameters unchanged, bit for bit, until their step: without a gradient no optimizer moves, decays or
    counts them. What is frozen depends only on the step, so a resumed run continues exactly.

    With several processes, each must take part in the sum of all gradients, so temporarily frozen parameters lose
    theirs just before the step.

    model: a `SequenceModel`, whose parameters the patterns of `config` name.
    """

    def __init__(self, model: nn.Module, config: FinetuneConfig) -> None:
        self.model, self.config = model, config
        self._kept: list[nn.Parameter] = []

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """Raise ConfigError for parameters that are to be trained later where a strategy shards those trained at the
        start."""
        if self.config.unfreeze and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                "finetune.unfreeze works on one device and under trainer.strategy ddp, but not under the one that is "
                "set, which shards what is trained at the start. Leave finetune.unfreeze out, or set trainer.strategy "
                "to ddp."
            )

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.check_strategy(trainer)
        self._freeze(math.inf if isinstance(trainer.strategy, DDPStrategy) else trainer.global_step)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, DDPStrategy):
            frozen = self.config.frozen(self.model, trainer.global_step)
            self._kept = [p for name, p in self.model.named_parameters() if name in frozen]
        else:
            self._freeze(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for parameter in self._kept:
            parameter.grad = None

    def _freeze(self, step: float) -> None:
        frozen = self.config.frozen(self.model, step)
        for name, parameter in self.model.named_parameters():
            if any(matches(name, pattern) for pattern in self.config.freeze):
                parameter.requires_grad_(name not in frozen)
