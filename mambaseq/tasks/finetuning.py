"""What of a model is trained, when, and how fast."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class FinetuneConfig:
    """Training that begins from something.

    init_from: a run, or the model folder of one, whose weights a run begins with, by name; a head or an encoder that
        does not fit stays as it is initialised. "": nothing.
    """

    init_from: str = ""
