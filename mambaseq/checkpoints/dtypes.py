"""The dtypes that a model's weights can be asked for in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mambaseq.arguments import DTYPES as NAMES
from mambaseq.errors import ConfigError, shown
from mambaseq.models import SequenceModel

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}


def dtype_of(name: str | None, others: tuple[str, ...] = ()) -> torch.dtype | None:
    """The dtype of a name in `DTYPES`; None for None and for one of `others`. Raises ConfigError for another name."""
    if name is None or name in others:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype must be {', '.join((*others, *DTYPES))}, not {shown(name)}.")
    return DTYPES[name]


def staying(model: SequenceModel) -> set[int]:
    """The ids of the parameters that a 16-bit dtype of the model leaves in float32: of modules that are marked
    `stays_float32`, systems that do not change with time, whose frequencies and decays are few and are multiplied by
    the whole length."""
    marked = (module for module in model.modules() if getattr(module, "stays_float32", False))
    return {id(parameter) for module in marked for parameter in module.parameters()}


def cast_(model: SequenceModel, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> None:
    """Turn parameters into a dtype, or into those under their names, in place; float64 becomes float32, and what has no
    name here stays. Tied ones stay tied. States accumulate in float32 whatever the parameters are.

    For one dtype what is `staying` is left out.
    """
    kept = staying(model) if isinstance(dtypes, torch.dtype) else set()
    for name, parameter in model.named_parameters():
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name)
        if id(parameter) in kept:
            continue
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if dtype == torch.float64 else dtype)
