"""AdamW with the groups that state-space parameters need, and warm-up with a decay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from mambaseq.errors import ConfigError, shown

# dynamics are never pulled towards zero: decay of A_log, B, D or dt would change the memory that was learned
NO_DECAY = {"A", "A_log", "A_log_real", "A_imag", "B", "P", "log_dt", "D"}


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    lr: peak learning rate. weight_decay: of matrices; biases, norms, embeddings' conditions and the parameters of the
        state-space dynamics (A_log, D, dt_bias, ...) have none. beta1, beta2, eps: AdamW's.
    warmup_steps: linear warm-up. schedule: what follows, to min_lr_ratio * lr at the last step ("constant": nothing).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name} must not be negative; it is {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must be at least 0 and below 1; it is {getattr(self, name)}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optimizer.min_lr_ratio must be between 0 and 1; it is {self.min_lr_ratio}.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; vectors, biases, `NO_DECAY` and the parameters of modules that declare
    `has_weight_decay = False` without. Shared ones count once."""
    decay: dict[int, nn.Parameter] = {}
    rest: dict[int, nn.Parameter] = {}
    for module in model.modules():
        decays = getattr(module, "has_weight_decay", True)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                group = decay if decays and parameter.ndim >= 2 and name not in NO_DECAY else rest
                group[id(parameter)] = parameter
    return [
        {"params": list(decay.values()), "weight_decay": weight_decay},
        {"params": list(rest.values()), "weight_decay": 0.0},
    ]


def learning_rate_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """Of the peak learning rate, at each of `total_steps` optimizer steps."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape

    return factor


class _Schedule(torch.optim.lr_scheduler.LambdaLR):
    """Leaves parameter groups alone that the optimizer was given later, by callbacks that thaw layers and have learning
    rates of their own for them."""

    def get_lr(self) -> list[float | torch.Tensor]:
        later = self.optimizer.param_groups[len(self.base_lrs) :]
        return [*super().get_lr(), *(group["lr"] for group in later)]


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, total_steps: float, *, capturable: bool = False
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer and its schedule over `total_steps` optimizer steps.

    capturable: on CUDA, its step is one kernel that can be captured in a CUDA graph; learning rates are tensors then.
    Raises ConfigError when there is no last step (`inf`) for the schedule to end at.
    """
    if math.isinf(total_steps) and config.schedule != "constant":
        raise ConfigError(
            f"The schedule {shown(config.schedule)} ends at the last step, and this run has none. Set "
            f"trainer.max_steps or trainer.max_epochs, or optimizer.schedule to constant."
        )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=torch.tensor(config.lr, device=next(model.parameters()).device) if capturable else config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        capturable=capturable,
        fused=True if capturable else None,
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # it would warn of the steps before a capture
    factor = learning_rate_factor(config, total_steps)
    return optimizer, _Schedule(optimizer, factor)


def reapply(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, config: OptimizerConfig
) -> tuple[float, float]:
    """Give an optimizer of `make_optimizer` that was restored from a checkpoint the settings of `config`, which a
    checkpoint overwrites with its own; moments stay. Parameter groups that others added are left alone.

    Returns the learning rate of the next step, as the checkpoint had it and as it is now.
    """
    before = float(optimizer.param_groups[0]["lr"])
    for number, group in enumerate(optimizer.param_groups[: len(schedule.lr_lambdas)]):
        # amsgrad, maximize and others too: a checkpoint does not say how it is trained
        group |= {key: value for key, value in optimizer.defaults.items() if key != "lr"}
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps
        group["weight_decay"] = 0.0 if number else config.weight_decay  # the first group is what decays
        schedule.base_lrs[number] = group["initial_lr"] = config.lr
        now = config.lr * schedule.lr_lambdas[number](schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(now)
        else:
            group["lr"] = now
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return before, float(optimizer.param_groups[0]["lr"])
