"""What decoding needs of a model, and of its logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.heads.base import Head
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel

PENALTIES = "repetition_penalty and presence_penalty are"  # for `check_one_pick`


class NotFinite(UserError):
    """A model whose logits are not finite numbers."""


def continues(model: SequenceModel, what: Literal["tokens", "values"]) -> bool:
    """Whether a model's outputs can continue sequences of tokens, or of values."""
    head = model.head
    says = getattr(head, "continues", None)
    if says is None:  # a plugin's
        says = "values" if getattr(head, "learns", None) == "values" else "tokens"
    return bool(model.backbone.causal and head.per_token and says == what)


def draws_once(model: SequenceModel) -> bool:
    """Whether its head picks one token for a position, by all logits."""
    return getattr(type(model.head), "draw", Head.draw) is Head.draw


def check_one_pick(model: SequenceModel, what: str) -> None:
    """Raise ConfigError for a model whose head picks several times for a position. what: what cannot be had then."""
    if not draws_once(model):
        raise ConfigError(
            f"{what} for heads that pick one token a position, and {type(model.head).__name__} picks parts of it. "
            "Leave it out."
        )


def check_read(model: SequenceModel, state: list[Any], told: Tensor, n: int) -> None:
    """Raise ConfigError unless state and logits can be those after n prompts."""
    rows = {tensor.shape[0] for layer in state for tensor in layer.tensors().values()} | {told.shape[0]}
    if rows != {n} or (draws_once(model) and told.ndim != 2):
        raise ConfigError(
            f"read must be the state after the {n} prompts and the logits of their last position, (batch, vocabulary), "
            f"as (output.state, output.logits[:, -1]) of model(ids, return_state=True); the logits are "
            f"{tuple(told.shape)}, and there are {shown(sorted(rows))} rows."
        )


def check_state_dtype(model: SequenceModel, dtype: torch.dtype, guidance: float) -> None:
    """Raise ConfigError unless the model's states can be kept in this type between steps, with this guidance."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"state_dtype must be torch.float32 or torch.bfloat16, not {shown(dtype)}.")
    layers = [layer for layer in model.init_state(1) if isinstance(layer, State)]
    if not any(getattr(layer, name).dtype == torch.float32 for layer in layers for name in layer.accumulated):
        raise ConfigError(
            "state_dtype is for models with real states of mamba, mamba2, mamba3, gated_delta, kda or gla; this one "
            "has none. Leave it out."
        )
    if guidance != 1:
        raise ConfigError("state_dtype does not go with guidance. Leave one of them out.")


def check_finite(peak: Tensor) -> None:
    """Raise NotFinite unless all of `peak` (any shape) are finite numbers; waits for a GPU."""
    if not peak.isfinite().all():
        raise not_finite()


def not_finite() -> NotFinite:
    """The error for a model whose logits are not finite numbers."""
    return NotFinite(
        "The model's prediction is not a finite number: its training diverged, its weights are damaged or its "
        "computation overflows. Use an earlier checkpoint, or train again with a lower learning rate."
    )
