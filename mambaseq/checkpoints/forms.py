"""What the forms of other houses have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mambaseq.errors import UserError

T = TypeVar("T")


class NotLoaded(UserError):
    """A published model of a kind that is not loaded. Its files are whole: to download them again is no remedy."""


def no_form(problem: str) -> UserError:
    """The error for a model that other houses have no class for."""
    return UserError(
        f"This model cannot be written as a published Mamba or Mamba-2: {problem}. Those are language models over "
        "tokens with one kind of layer, mamba or mamba2 as published, or hybrids as Bamba's (mamba2 and attention, "
        "each with an mlp). Others are shared as the folder of a run or its model/, which `mambaseq generate "
        "--checkpoint` and mambaseq.checkpoints.load_model read."
    )


def one_for_all(values: Sequence[tuple[int, T]]) -> T:
    """The value of all layers. values: the number of a layer and its value. Raises UserError if they differ."""
    for number, value in values:
        if value != values[0][1]:
            raise no_form(f"layer {number} has other sizes than layer {values[0][0]}")
    return values[0][1]
