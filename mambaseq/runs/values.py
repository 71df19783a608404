"""Checks of values that types alone do not refuse, for all keys, and the minimum of some keys."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import jsonargparse

from mambaseq.errors import ConfigError, shown
from mambaseq.specs import fits

# endings of the names of a dataset's arguments that are paths
PATHS = ("files", "file", "list", "folder", "fasta")

LARGEST = 2**63
"""No number of a run is this large: counters have 64 bits."""
_LARGE = {"optimizer.lr"}  # a run that diverges reports it at its first step

_LEAST: dict[str, float] = {  # for keys that Lightning does not check, or refuses without naming
    "trainer.num_nodes": 1,
    "trainer.fast_dev_run": 0,
    "trainer.max_epochs": -1,
    "trainer.min_epochs": 0,
    "trainer.max_steps": -1,
    "trainer.min_steps": 0,
    "trainer.limit_train_batches": 0,
    "trainer.limit_val_batches": 0,
    "trainer.limit_test_batches": 0,
    "trainer.limit_predict_batches": 0,
    "trainer.overfit_batches": 0,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.num_sanity_val_steps": -1,
    "trainer.log_every_n_steps": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.reload_dataloaders_every_n_epochs": 0,
}
_SHARES = ("dropout", "label_smoothing")  # for parts of a model: at least 0 and below 1

_STEPS = (".dt_min", ".dt_max", ".dt_init_floor")  # also for mixers that do not read it


def whole_first(hint: Any) -> Any:
    """A type with int before float, if it has both. jsonargparse takes the first that fits, and 1 (one batch) would
    become 1.0 (all batches). The annotation alone does not decide the order: `typing` caches unions, and may return
    Union[float, int] of another module for Union[int, float]."""
    choices = list(get_args(hint))
    if get_origin(hint) not in (Union, types.UnionType) or not {int, float} <= set(choices):
        return hint
    if (place := choices.index(float)) < choices.index(int):
        choices.remove(int)
        choices.insert(place, int)
    return Union[tuple(choices)]  # noqa: UP007 - of types that are computed


def check_values(
    parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace, written: Callable[[str], Any]
) -> None:
    """Raise ConfigError that names the key, for values that are surely mistakes: null where there must be a value (the
    parser lets it pass, because a null in a file reads as a key left out), a number that is not finite, is negative
    where it cannot be, or has more than 64 bits, true or 1:30 for a number, text with a NUL, the empty path.

    written: gives the value of a key as it is written, before the parser may have made a number of it.
    """
    for action in parser._actions:
        hint, key = getattr(action, "_typehint", None), action.dest
        if hint is None:
            continue
        value = parsed.get(key)
        nullable = action.default is None or type(None) in get_args(hint) or hint is Any
        if (value is None or getattr(value, "written", value) is None) and not nullable:
            raise ConfigError(f"{key} is null; leave it out for its default, {shown(action.default)}.")
        if isinstance(value, bool) and not fits(value, hint):
            raise ConfigError(f"{key} is {str(value).lower()}, which it cannot be. Give a number or text.")
        if isinstance(value, int | float) and isinstance(text := written(key), str) and ":" in text:
            # a number to the base 60 in the parser's YAML
            raise ConfigError(f"{key} must be a number, not {shown(text)}.")
        _check(key, value)


def _check(key: str, value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{key} contains a NUL character: {shown(value)}. Remove it.")
        if not value and key.startswith("data.") and key.endswith(PATHS):
            raise ConfigError(f"{key} is empty. Name a file, or leave it out.")
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        _check_number(key, value)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check(f"{key}.{str(name)[:80]}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check(key, inner)


def _check_number(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, not {value}.")
    if abs(value) >= LARGEST and key not in _LARGE:
        raise ConfigError(f"{key} must be a number below 2^63, not {shown(value)}.")
    if key in _LEAST and value < _LEAST[key]:
        raise ConfigError(f"{key} must be at least {_LEAST[key]}, not {value}.")
    if key.startswith("model.") and key.endswith(_STEPS) and value <= 0:
        raise ConfigError(f"{key} must be above 0, not {value}.")
    if key.startswith("model.") and key.endswith("eps") and value < 0:
        raise ConfigError(f"{key} must not be negative; it is {value}.")
    if key.startswith("model.") and key.rpartition(".")[2] in _SHARES and not 0 <= value < 1:
        raise ConfigError(f"{key} must be at least 0 and below 1, not {value}.")
