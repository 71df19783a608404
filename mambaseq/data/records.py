"""What readers hand to `predict`."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One named sequence: token ids `(length,)`, or a continuous signal `(length, channels)` float32.

    description: what the file says about it beyond the name (the rest of a FASTA header).
    """

    name: str
    ids: np.ndarray | None = None
    signal: np.ndarray | None = None
    description: str = ""

    def __len__(self) -> int:
        values = self.ids if self.ids is not None else self.signal
        return 0 if values is None else len(values)
