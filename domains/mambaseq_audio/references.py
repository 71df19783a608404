"""Real recordings of a data set, to be heard beside what a model makes: the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mambaseq.conditions import told
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.data.tokenizer import Tokenizer

LONGEST = 2**22  # samples of a recording: of 16 recordings 64 MiB
_LOOKED_AT = 256  # items among which those with different conditions are looked for


class Reference(NamedTuple):
    """A real recording. ids: `(length,)` integers. condition: of one sequence, or None. said: the same as `mambaseq
    generate` takes it; "" for none. number: how many of this condition come before it."""

    ids: np.ndarray
    condition: torch.Tensor | None
    said: str
    number: int

    @property
    def name(self) -> str:
        return title(self.said, self.number)


def title(said: str, number: int) -> str:
    """What a row of clips is called.

    >>> title("seven", 0), title("seven", 1), title("", 0)
    ('seven', 'seven, 2', 'sample 1')
    """
    if not said:
        return f"sample {number + 1}"
    return said if not number else f"{said}, {number + 1}"


def sound_of(data: SequenceData) -> tuple[int, int]:
    """Samples a second and channels of what data of sounds write."""
    options = data.writer_options()
    return int(options["sample_rate"]), int(options.get("channels", 1))


def signal_of(tokenizer: Tokenizer, ids: np.ndarray, channels: int) -> np.ndarray:
    """The sound of ids: `(length,)`, or `(length, channels)`, float32. Samples of several channels come in turn."""
    signal = np.asarray(tokenizer.decode(ids), dtype=np.float32)
    return signal if channels == 1 else signal[: len(signal) // channels * channels].reshape(-1, channels)


def references(data: SequenceData, count: int, items: Any = None, said: Sequence[str] = ()) -> list[Reference]:
    """At most so many recordings of a set, spread over it, with as many different conditions as there are; in the order
    of conditions. They depend on nothing but the data.

    items: the set; the validation set if None. said: only these conditions.
    """
    items = items if items is not None else next(iter(named_sets(data.validation()).values()))
    beginnings = getattr(items, "beginnings", None)
    places = [] if beginnings is None else beginnings()
    if len(places) < count:  # few long recordings: from anywhere in them
        places = list(range(len(items)))
    spread = np.unique(np.linspace(0, len(places) - 1, min(len(places), _LOOKED_AT)).astype(int))
    by_condition: dict[tuple[Any, ...], list[int]] = {}
    for number in spread.tolist():
        condition = items[places[number]].condition
        if said and said_of(data, condition) not in said:
            continue
        key = () if condition is None else tuple(condition.flatten().tolist())
        by_condition.setdefault(key, []).append(places[number])
    groups = [by_condition[key] for key in sorted(by_condition)]
    if len(groups) > count:
        groups = [groups[i] for i in np.linspace(0, len(groups) - 1, count).astype(int).tolist()]
    found: list[Reference] = []
    for group, wanted in zip(groups, _shares(count, len(groups)), strict=True):
        taken = np.unique(np.linspace(0, len(group) - 1, min(wanted, len(group))).astype(int))
        for number, place in enumerate(taken.tolist()):
            batch = items[group[place]]
            assert batch.targets is not None
            whole = getattr(items, "levels", None)  # what goes on after a piece
            ids = whole(group[place], LONGEST) if whole else batch.targets[0].numpy()[:LONGEST]
            found.append(Reference(ids, batch.condition, said_of(data, batch.condition), number))
    return found


def _shares(count: int, groups: int) -> list[int]:
    """A count in parts that differ by one at most."""
    return [count // groups + (i < count % groups) for i in range(groups)]


def said_of(data: SequenceData, condition: torch.Tensor | None) -> str:
    """A condition as `mambaseq generate --condition` takes it; "" for none."""
    if condition is None:
        return ""
    if condition.dim() == 2 and data.conditions:
        return told(data.conditions, condition[0].tolist())
    number = int(condition.flatten()[0])
    return data.condition_names[number] if number < len(data.condition_names) else str(number)
