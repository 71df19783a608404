"""Training checkpoints, as Lightning lays them out, are read without unpickling code, and without Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambaseq.checkpoints.parts import PARTS, Tensors, check_sums, put_together
from mambaseq.errors import UserError, shown

AVERAGE = "average"
"""The key of a checkpoint's averaged weights, by the model's names; these are exported."""

LORA = "lora"
"""The key of the settings of a checkpoint's adapters, `rank` and `alpha` among them."""

# the counters of Lightning's loops
_COUNTED = ("ready", "started", "processed", "completed", "_batches_that_stepped", "is_last_batch")


def _check_contents(contents: Any) -> None:
    """Raise TypeError or ValueError that names a part which is missing, or which no training run writes, so that later
    readers can rely on the parts."""
    if not isinstance(contents, dict):
        raise TypeError(f"it holds a {type(contents).__name__}")
    for key, kind in (("state_dict", dict), ("global_step", int)):
        if key not in contents:
            raise ValueError(f"it has no {key}")
        _check_kind(key, contents[key], kind)
    for name, tensor in contents["state_dict"].items():
        _check_kind(f"state_dict.{name}", tensor, torch.Tensor)
    for name, tensor in _kind_of(AVERAGE, contents.get(AVERAGE, {}), dict).items():
        _check_kind(f"{AVERAGE}.{name}", tensor, torch.Tensor)
    lora = _kind_of(LORA, contents.get(LORA, {}), dict)
    for name in ("rank", "alpha") if lora else ():
        _check_kind(f"{LORA}.{name}", lora.get(name), (int, float))
        if not 0 < lora[name] < 2**31:
            raise ValueError(f"its {LORA}.{name} is {shown(lora[name])}")
    for key in ("callbacks", "loops"):
        _check_kind(key, contents.get(key, {}), dict)
    for key in ("optimizer_states", "lr_schedulers"):
        _check_kind(key, contents.get(key, []), list)
    _check_counts("loops", contents.get("loops", {}))
    _check_counts("global_step", contents["global_step"])
    _check_counts("epoch", contents.get("epoch", 0))
    for number, optimizer in enumerate(contents.get("optimizer_states", [])):
        key = f"optimizer_states.{number}"
        _check_kind(key, optimizer, dict)
        _check_groups(f"{key}.param_groups", optimizer.get("param_groups", []))
        state = optimizer.get("state", {})
        _check_kind(f"{key}.state", state, dict)
        for parameter, values in state.items():
            _check_kind(f"{key}.state.{parameter}", values, dict)
            for name, value in values.items():
                _check_kind(f"{key}.state.{parameter}.{name}", value, (torch.Tensor, int, float, type(None)))


def _check_kind(key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"its {key[:200]} is a {type(value).__name__}")


def _kind_of(key: str, value: Any, kind: Any) -> Any:
    _check_kind(key, value, kind)
    return value


def _check_counts(key: str, value: Any) -> None:
    """Raise unless all counters are numbers of at least 0."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in _COUNTED and isinstance(inner, dict):
                raise TypeError(f"its {key[:200]}.{name} is a dict")
            if isinstance(inner, dict) or name in _COUNTED:
                _check_counts(f"{key}.{name}", inner)
    elif not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"its {key[:200]} is {shown(value)}")


def _check_groups(key: str, groups: Any) -> None:
    """Raise unless an optimizer's settings are numbers."""
    _check_kind(key, groups, list)
    for group in groups:
        _check_kind(key, group, dict)
        numbers = [group.get(name, 0.0) for name in ("lr", "initial_lr", "weight_decay", "eps")]
        for number in (*numbers, *group.get("betas", ())):
            _check_kind(key, number, (int, float, torch.Tensor))


def read_checkpoint(
    path: Path, map_location: Any = "cpu", tensors: Tensors = "all", mapped: bool = False
) -> dict[str, Any]:
    """The contents of a training checkpoint: tensors and plain values only.

    tensors: of one in parts, which are read (and then are on the CPU); of another one always all.
    mapped: tensors of the file itself stay on disk until they are used; copy what outlives the reading. For processes
        that each need a part of them.
    Raises UserError if it does not exist, is damaged (all that is read is compared with its checksums), holds anything
    else, or lacks what every checkpoint has.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}. Give the folder of a run (it holds checkpoints/last.ckpt).")
    try:
        contents = _contents(path, map_location, mapped)
        if isinstance(contents, dict) and PARTS in contents:
            try:
                contents = put_together(contents, path, tensors)
            except FileNotFoundError:  # where the run has just saved again, the file names other parts now
                contents = put_together(_contents(path, map_location, mapped), path, tensors)
        _check_contents(contents)
        return contents
    except Exception as error:
        text = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {text}). It is damaged or was not written "
            "by mambaseq; use another one, or start the run again in another folder."
        ) from error


def _contents(path: Path, map_location: Any, mapped: bool) -> Any:
    with path.open("rb") as file:
        check_sums(file)
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
