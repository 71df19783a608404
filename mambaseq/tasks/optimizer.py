"""AdamW and Muon with the groups that state-space parameters need, and warm-up with a decay."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Set
from typing import Any, Literal

import torch
from torch import nn

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.specs import check_options

# dynamics have no weight decay: pulling A_log, B, D or dt towards zero would change the learned memory
NO_DECAY = {"A", "A_log", "A_log_real", "A_imag", "B", "P", "log_dt", "D", "B_bias", "C_bias"}


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter: its whole name, or that of a module that contains it.

    >>> matches("backbone.layers.0.norm.weight", "backbone"), matches("head.linear.weight", "*.weight")
    (True, True)
    """
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


@dataclasses.dataclass
class OptimizerConfig:
    """The optimizer and its schedule.

    Args:
        name: adamw, muon (Muon for the matrices of the backbone's linear maps, AdamW for all else), or another one of
            `mambaseq list optimizers`.
        options: further arguments of such an optimizer, by name.
        lr: peak learning rate.
        weight_decay: of matrices; biases, norms, embeddings' conditions and the parameters of the state-space dynamics
            (A_log, D, dt_bias, ...) have none.
        beta1: AdamW: how much of its mean of gradients a step keeps.
        beta2: AdamW: how much of its mean of squared gradients a step keeps.
        eps: AdamW: added to the root of that mean before it divides.
        momentum: Muon: how much of its mean of gradients a step keeps.
        warmup_steps: optimizer steps in which the learning rate rises linearly to lr; 0 for none.
        schedule: how it falls after that, to min_lr_ratio * lr at the last step: cosine, linear, wsd (stays at lr and
            falls linearly over the last decay_share of all steps), or constant (stays at lr to the end).
        decay_share: share of all steps in which wsd lets the learning rate fall.
        min_lr_ratio: learning rate at the last step, as a share of lr.
    """

    name: str = "adamw"
    options: dict[str, bool | int | float | str | list[float] | None] = dataclasses.field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_share: float = 0.2
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name} must not be negative; it is {getattr(self, name)}.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must be at least 0 and below 1; it is {getattr(self, name)}.")
        for name in ("decay_share", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} must be between 0 and 1; it is {getattr(self, name)}.")


_ADAMW = {"beta1", "beta2", "eps"}
_TAKES = {"adamw": _ADAMW, "muon": {*_ADAMW, "momentum"}}  # Muon: AdamW for what is no matrix


def not_of(name: str) -> set[str]:
    """The keys of `OptimizerConfig` that are an optimizer's own, but not those of the optimizer of this name."""
    return {"options"}.union(*_TAKES.values()) - _TAKES.get(name, {"options"})


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    muon: bool = False,
    factors: Mapping[str, float] | None = None,
    frozen: Set[str] = frozenset(),
) -> list[dict]:
    """Groups of parameters, shared ones once: matrices with weight decay; without it vectors, biases, `NO_DECAY` and
    the parameters of modules that declare `has_weight_decay = False`.

    muon: put first a group for Muon, with the matrices of linear maps in hidden layers; not embeddings, heads,
        convolutions and what makes dt.
    factors: of the learning rate, by pattern (see `matches`); if several match, the longest counts. Each pattern has
        groups of its own, in the order of the patterns.
    frozen: names of parameters that have no gradient now, but may have later.
    """
    patterns = ["", *sorted(factors or {})]
    kinds = ["muon", "decay", "rest"] if muon else ["decay", "rest"]
    found: dict[tuple[str, str], dict[int, nn.Parameter]] = {(p, kind): {} for p in patterns for kind in kinds}
    for path, module in model.named_modules():
        decays = getattr(module, "has_weight_decay", True)
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            if (parameter.requires_grad or whole in frozen) and not any(id(parameter) in g for g in found.values()):
                kind = "decay" if decays and parameter.ndim >= 2 and name not in NO_DECAY else "rest"
                if muon and kind == "decay" and _is_hidden(path, module, name):
                    kind = "muon"
                pattern = max((p for p in patterns[1:] if matches(whole, p)), key=lambda p: (len(p), p), default="")
                found[pattern, kind][id(parameter)] = parameter
    return [
        {
            "params": list(parameters.values()),
            "weight_decay": 0.0 if kind == "rest" else weight_decay,
            "muon": kind == "muon",
            "factor": (factors or {}).get(pattern, 1.0),
        }
        for (pattern, kind), parameters in found.items()
    ]


def _is_hidden(path: str, module: nn.Module, name: str) -> bool:
    """Whether a parameter is the matrix of a linear map in a hidden layer."""
    steps = path.split(".")
    outer = steps[0] in ("encoder", "head") or "dt_proj" in steps
    return isinstance(module, nn.Linear) and name == "weight" and not outer


def learning_rate_factor(config: OptimizerConfig, total_steps: float) -> Callable[[float], float]:
    """The factor of the peak learning rate at each of `total_steps` optimizer steps."""

    def factor(step: float) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        begins: float = config.warmup_steps
        if config.schedule == "wsd":
            begins = max(begins, total_steps * (1 - config.decay_share))
        done = min(1.0, max(0.0, (step - begins) / max(1, total_steps - begins)))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape

    return factor


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the groups that say so, AdamW for the others: one optimizer, one state.

    Muon's steps are scaled so that their root mean square is that of AdamW's ("match_rms_adamw", arXiv:2502.16982):
    so both have the same learning rate and weight decay.

    Raises ConfigError if there is nothing for Muon.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float) -> None:
        muon = [group for group in groups if group["muon"] and group["params"]]
        if not muon:
            raise ConfigError(
                "optimizer.name is 'muon', which is for the matrices of linear maps in the backbone, but this model "
                "trains none. Choose 'adamw'."
            )
        rest = [group for group in groups if not group["muon"]]
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(muon, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], self._parts[1].defaults)
        self._wire()

    def _wire(self) -> None:
        """Make both parts work on this optimizer's groups and state."""
        for part, is_muon in zip(self._parts, (True, False), strict=True):
            part.param_groups = [group for group in self.param_groups if group.get("muon", False) == is_muon]
            part.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._wire()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._wire()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """Leaves parameter groups alone that were added to the optimizer later, by callbacks that thaw layers with learning
    rates of their own.

    settings: of each group when it was made; a checkpoint overwrites those in the optimizer (see `reapply`).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["factor"]
        super().__init__(optimizer, factor)
        self.settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]

    def get_lr(self) -> list[float | torch.Tensor]:
        later = self.optimizer.param_groups[len(self.base_lrs) :]
        return [*super().get_lr(), *(group["lr"] for group in later)]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["settings"]
        return state


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    total_steps: float,
    *,
    capturable: bool = False,
    fused: bool = False,
    factors: Mapping[str, float] | None = None,
    frozen: Set[str] = frozenset(),
) -> tuple[torch.optim.Optimizer, Schedule]:
    """The optimizer and its schedule over `total_steps` optimizer steps.

    capturable: on CUDA, make the step one kernel that a CUDA graph can capture; learning rates are then tensors.
    fused: make AdamW's step one kernel, which reads and writes everything once, without memory of its own. Complex
    parameters have no such kernel, and are stepped as usual with all others.
    factors, frozen: see `parameter_groups`.
    Raises ConfigError if the schedule has no last step to end at (`inf`), for settings of another optimizer, and for
    Muon if its step must be captured, or there is nothing for it.
    """
    if math.isinf(total_steps) and config.schedule != "constant":
        raise ConfigError(
            f"The schedule {shown(config.schedule)} ends at the last step, but this run has none. Set "
            "trainer.max_steps or trainer.max_epochs, or optimizer.schedule to constant."
        )
    muon = config.name == "muon"
    if capturable and config.name != "adamw":
        raise ConfigError(
            f"optimizer.name is {shown(config.name)}, whose step cannot be captured in a CUDA graph. Use 'adamw'."
        )
    check_own_settings(config)
    groups = parameter_groups(model, config.weight_decay, muon=muon, factors=factors, frozen=frozen)
    betas = (config.beta1, config.beta2)
    optimizer: torch.optim.Optimizer
    if muon:
        optimizer = MuonAdamW(groups, config.lr, betas, config.eps, config.momentum)
    elif config.name != "adamw":
        optimizer = _registered(config, groups)
    else:
        optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(config.lr, device=next(model.parameters()).device) if capturable else config.lr,
            betas=betas,
            eps=config.eps,
            capturable=capturable,
            fused=True if capturable or (fused and all(p.is_floating_point() for p in model.parameters())) else None,
        )
        optimizer._warned_capturable_if_run_uncaptured = True  # it would warn about the steps before a capture
        # a fused one would unscale gradients of fp16 within its step, but they are counted and clipped before it
        optimizer._step_supports_amp_scaling = False
    return optimizer, Schedule(optimizer, learning_rate_factor(config, total_steps))


def check_own_settings(config: OptimizerConfig) -> None:
    """Raise ConfigError for what the optimizer would not use, options and keys of others, and for options that a
    domain's does not take."""
    if config.options and config.name in _TAKES:
        raise ConfigError(
            f"optimizer.options are for other optimizers than adamw and muon, but optimizer.name is {config.name}. "
            "Leave them out: the options of these two are keys of optimizer itself (beta1, eps, momentum, ...)."
        )
    unset = OptimizerConfig()
    for key in sorted(not_of(config.name)):
        if (value := getattr(config, key)) != getattr(unset, key):
            has = "options" if config.name not in _TAKES else cut_list(sorted(_TAKES[config.name]))
            those = " or ".join(name for name, keys in _TAKES.items() if key in keys) or "an optimizer with options"
            raise ConfigError(
                f"optimizer.{key} is {value}, which {config.name} does not use. Leave it out, or choose {those} "
                f"(optimizer.name); what {config.name} takes is under optimizer's {has}."
            )
    if config.name not in _TAKES:
        kind = catalog()["optimizers"].get(config.name, "optimizer.name")
        check_options("optimizer", config.name, kind, {"lr": config.lr, **config.options}, given=1)


def _registered(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of a domain. Raises ConfigError if it cannot be made."""
    kind = catalog()["optimizers"].get(config.name, "optimizer.name")
    # some optimizers refuse groups without a weight
    groups = [group for group in groups if group["params"]]
    try:
        return kind(groups, lr=config.lr, **config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The optimizer {shown(config.name)} cannot be made ({' '.join(str(error).split())[:300].rstrip('.')}). "
            f"Change optimizer.lr or optimizer.options."
        ) from error


def _place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move counts of steps to where an AdamW of these settings has them: a fused one, or one that can be captured, on
    the parameters' device in float32, others on the CPU."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), torch.Tensor):
                of_kernel = group["fused"] or group["capturable"]
                state["step"] = step.to(parameter.device, torch.float32) if of_kernel else step.cpu()


_OF_GROUPS = {"weight_decay", "muon", "factor", "initial_lr"}  # what `parameter_groups` and a schedule say


def reapply(optimizer: torch.optim.Optimizer, schedule: Schedule) -> tuple[float, float]:
    """Set an optimizer that was restored from a checkpoint back to the settings from `make_optimizer`, which the
    checkpoint has overwritten; moments stay, and of an optimizer that is not ours what it keeps in its groups (it may
    count there). Parameter groups that others added are left alone.

    Returns the first group's learning rate of the next step, in the checkpoint and now.
    """
    before = float(optimizer.param_groups[0]["lr"])
    ours = type(optimizer) in (torch.optim.AdamW, MuonAdamW)
    for number, (group, settings) in enumerate(zip(optimizer.param_groups, schedule.settings, strict=False)):
        # amsgrad, maximize and others too: a checkpoint does not decide how to train
        group |= settings if ours else {key: settings[key] for key in _OF_GROUPS & settings.keys()}
        base = schedule.base_lrs[number] = settings["initial_lr"]
        now = base * schedule.lr_lambdas[number](schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(now)
        else:
            group["lr"] = now
    if isinstance(optimizer, MuonAdamW):
        optimizer._wire()
    elif ours:
        _place_steps(optimizer)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return before, float(optimizer.param_groups[0]["lr"])
