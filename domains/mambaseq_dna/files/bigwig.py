"""bigWig files, by pyBigWig (an extra)."""

from __future__ import annotations

import importlib
from typing import Any

from mambaseq.errors import UserError


def pybigwig() -> Any:
    """The module pyBigWig, with NumPy. Raises UserError that says what to install."""
    try:
        module = importlib.import_module("pyBigWig")
    except ImportError as error:
        raise UserError("bigWig files need pyBigWig, which is not installed: pip install 'mambaseq[dna]'.") from error
    if not getattr(module, "numpy", 0):
        raise UserError("This pyBigWig was built without NumPy. Install its wheel: pip install --force pyBigWig.")
    return module
