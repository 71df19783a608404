"""mambaseq: one Mamba backbone for long sequences of any kind.

Importing this package imports nothing heavy; names are resolved when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambaseq.batch import Batch
    from mambaseq.domain import Domain
    from mambaseq.generation import generate
    from mambaseq.models import SequenceModel, build_model, causal_lm
    from mambaseq.runs.run import Run, fit, load
    from mambaseq.runs.sweep import sweep

__version__ = "0.1.0"

_LAZY = {
    "Batch": "mambaseq.batch",
    "Run": "mambaseq.runs.run",
    "fit": "mambaseq.runs.run",
    "load": "mambaseq.runs.run",
    "sweep": "mambaseq.runs.sweep",
    "Domain": "mambaseq.domain",
    "SequenceModel": "mambaseq.models",
    "build_model": "mambaseq.models",
    "causal_lm": "mambaseq.models",
    "generate": "mambaseq.generation",
}

__all__ = [
    "Batch",
    "Domain",
    "Run",
    "SequenceModel",
    "__version__",
    "build_model",
    "causal_lm",
    "fit",
    "generate",
    "load",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from mambaseq.importing import uncollected

        with uncollected():
            return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mambaseq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
