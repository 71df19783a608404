"""Guidance without a classifier (Ho, Salimans, arXiv:2207.12598): what a condition changes is made larger."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mambaseq.errors import ConfigError, shown
from mambaseq.generation.decoder import Decoder

_LARGEST = 100
_Draw = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def check_guidance(guidance: object) -> None:
    """Raise ConfigError unless guidance is a finite number from 0 to 100."""
    number = isinstance(guidance, int | float) and not isinstance(guidance, bool) and math.isfinite(guidance)
    if not number or not 0 <= guidance <= _LARGEST:  # type: ignore[operator]
        raise ConfigError(f"guidance must be a number from 0 to {_LARGEST}, not {shown(guidance)}; 1 is none.")


class Guided:
    """Steps of a model that is told its condition, and of the same model that is not: what the head tells of both,
    `(batch, 2, ...)`."""

    def __init__(self, told: Decoder, untold: Decoder) -> None:
        self.told, self.untold = told, untold

    def step(self, token: Tensor) -> Tensor:
        """See `Decoder.step`."""
        return torch.stack([self.told.step(token), self.untold.step(token)], 1)


def drawn(draw: _Draw, both: Tensor, pick: Callable[[Tensor], Tensor], guidance: float) -> Tensor:
    """The next tokens by a head's `draw`, from what it tells under a condition and without it, `(batch, 2, ...)`: of
    each pair of logits `untold + guidance * (told - untold)` is picked from."""

    def pick_for_both(logits: Tensor) -> Tensor:
        told, untold = logits.chunk(2)
        return pick(untold + guidance * (told - untold)).repeat(2)

    return draw(torch.cat(both.unbind(1)), pick_for_both)[: len(both)]
