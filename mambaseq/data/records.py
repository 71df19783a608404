"""What readers hand to `predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One named sequence: token ids `(length,)`, or a continuous signal `(length, channels)` float32.

    description: what the file says about it beyond the name (the rest of a FASTA header).
    source: the file that it is in, where a reader was given a folder.
    scored: `(length,)` bool, which tokens count in a likelihood; None for all. A reader leaves out those that training
        never asks for (N of a genome): a model has learned nothing about them.
    fields: values of other columns of the row that it is, by their names. A reader of tables takes an option `fields`,
        the names that are asked for, and gives those.
    condition: the id of its condition, for conditional models. `predict` and `generate` set it; readers do not.
    """

    name: str
    ids: np.ndarray | None = None
    signal: np.ndarray | None = None
    description: str = ""
    scored: np.ndarray | None = None
    source: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    condition: int | None = None

    def __len__(self) -> int:
        values = self.ids if self.ids is not None else self.signal
        return 0 if values is None else len(values)
