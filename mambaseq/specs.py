"""Checks of a model's plain description before a model is made from it: it may come from somebody else's file."""

from __future__ import annotations

import collections.abc
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean, shown
from mambaseq.limits import LAYERS, PARAMETERS

PARTS = ("encoder", "backbone", "mixer", "head")

# options that do not change what a model's weights mean: how it is computed, and how training is regularized
NOT_IN_WEIGHTS = {
    "backend",
    "checkpoint",
    "chunk_length",
    "class_weights",
    "condition_dropout",
    "context_parallel",
    "context_states",
    "cuda_graph",
    "dropout",
    "focal_gamma",
    "label_smoothing",
    "positive_weights",
}

# what the data says of itself
_AT_LEAST = {"vocab_size": 1, "n_codes": 1, "n_channels": 1, "n_classes": 1, "n_conditions": 0, "n_outputs": 1}


def check_spec(spec: Any) -> None:
    """Raise ConfigError that names the key, unless a description has all parts, each with a name, and only finite
    numbers."""
    if not isinstance(spec, dict):
        raise ConfigError(f"A model's description (spec) consists of names and values, not {shown(spec)}.")
    if unknown := spec.keys() - {"d_model", "tie_embeddings", "mixers", *PARTS}:
        raise ConfigError(f"A model's description has no {cut_list(sorted(map(str, unknown)))}.")
    for key in ("d_model", *PARTS):
        if key not in spec:
            raise ConfigError(f"The model's description has no {key}; it is incomplete.")
    if not fits(spec["d_model"], int) or spec["d_model"] < 1:
        raise ConfigError(f"d_model must be a whole number of at least 1, not {shown(spec['d_model'])}.")
    if not fits(spec.get("tie_embeddings", False), bool):
        raise ConfigError(f"tie_embeddings must be true or false, not {shown(spec['tie_embeddings'])}.")
    for part in PARTS:
        if not isinstance(spec[part], dict):
            raise ConfigError(f"{part} must hold settings, {{name: ..., ...}}, not {shown(spec[part])}.")
        if not isinstance(spec[part].get("name"), str):
            raise ConfigError(f"{part}.name must be a name, not {shown(spec[part].get('name'))}.")
    others = spec.get("mixers") or {}
    if not isinstance(others, dict) or not all(isinstance(options, dict) for options in others.values()):
        raise ConfigError(f"mixers must hold the settings of mixers by their names, not {shown(others)}.")
    for name, options in others.items():
        if not isinstance(options.get("name", ""), str):
            raise ConfigError(f"mixers.{cut(name)}.name must be a mixer's name, not {shown(options['name'])}.")
    _check_finite(spec, "")


def _check_finite(value: Any, key: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, not {value}.")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in pairs:
        _check_finite(inner, key if isinstance(value, list | tuple) else f"{key}.{name}".lstrip("."))


def arguments_of(part: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a class or a function, by name; see `arguments_and_owners`."""
    if not isinstance(part, type):
        return dict(inspect.signature(part).parameters)
    return {name: parameter for name, (parameter, _) in arguments_and_owners(part).items()}


def arguments_and_owners(kind: type) -> dict[str, tuple[inspect.Parameter, type]]:
    """The arguments of a class by name, each with the class that declares it. An `__init__` with `**options` hands them
    on: the arguments of the class that it stands on count as well."""
    found: dict[str, tuple[inspect.Parameter, type]] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        try:
            own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        except (TypeError, ValueError):  # one in C
            break
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, (parameter, base))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return found


def takes_others(part: Any) -> bool:
    """Whether a class or a function takes arguments by any name."""
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(part).parameters.values())


def check_options(kind: str, name: str, part: Any, options: Mapping[str, Any], given: int) -> None:
    """Raise ConfigError for options that a part does not take, that it needs but does not get, or whose type differs
    from its signature.

    kind, name: of the part, for messages. given: how many of its first arguments it gets in another way.
    """
    parameters = arguments_of(part)
    takes = list(parameters)[given:]
    open_ended = takes_others(part)
    hints = _hints(part)
    for key, value in options.items():
        if key not in takes and not open_ended:
            raise ConfigError(
                f"The {kind} {shown(name)} has no option {shown(key)}.{did_you_mean(key[:80], takes)} It has: "
                f"{cut_list(takes)}."
            )
        if key in hints and key in takes and not fits(value, hints[key]):
            wanted = str(getattr(hints[key], "__name__", hints[key]) if isinstance(hints[key], type) else hints[key])
            raise ConfigError(
                f"The {kind} {shown(name)} takes {wanted.replace('typing.', '')} for {key}, not {shown(value)}."
            )
        if key in _AT_LEAST and isinstance(value, int) and value < _AT_LEAST[key]:
            raise ConfigError(f"The {kind} {shown(name)} needs {key} of at least {_AT_LEAST[key]}, not {shown(value)}.")
    for key in takes:
        parameter = parameters[key]
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)  # of a function
        if key not in options and parameter.default is parameter.empty and not variable:
            raise ConfigError(f"The {kind} {shown(name)} needs {key}, which is not given.")


def _hints(part: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(getattr(part, "__init__") if isinstance(part, type) else part)  # noqa: B009 - of a class
    except Exception:  # names that exist only for type checkers: the part's own code will refuse what it cannot use
        return {}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value has a type. Types that plain values cannot have are left to whoever uses them.

    >>> fits(1, float), fits(True, int), fits([1, "a"], list[int])
    (True, False, False)
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == known and type(value) is type(known) for known in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if annotation is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if annotation is str:
        return isinstance(value, str)
    base = annotation if origin is None else origin
    if base in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        if not isinstance(value, list | tuple):
            return False
        if base is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(inner, arguments[0]) for inner in value) if arguments else True
    if base in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            return False
        return all(fits(inner, arguments[1]) for inner in value.values()) if len(arguments) == 2 else True
    return True


def registered(name: str, mixers: Mapping[str, Mapping[str, Any]]) -> str:
    """The registered name of a mixer that a pattern names: its own, or that under `name` in its settings (`mixers`)."""
    found: str = mixers.get(name, {}).get("name", name)
    return found


def check_layers(count: int) -> None:
    """Raise UserError if a backbone has more mixers than `limits.LAYERS`."""
    LAYERS.check(count, "The model's backbone (n_layers, pattern)")


def largest_setting(spec: Mapping[str, Any], part_of: Callable[[str, str], Any]) -> str:
    """The number in a description that is furthest above its default, for a message: "model.mixer.d_conv 4,000".

    part_of: kind and name to the class with the defaults; settings without one are compared with 100.
    """
    found = [("model.d_model", spec["d_model"], 1.0)]
    options = [(f"model.{part}", part, spec[part]["name"], spec[part]) for part in PARTS]
    others = spec.get("mixers") or {}
    options += [(f"model.mixers.{name}", "mixer", registered(name, others), one) for name, one in others.items()]
    for key, kind, name, given in options:
        parameters = arguments_of(part_of(kind, name))
        for option, value in given.items():
            parameter = parameters.get(option)
            usual = _largest(None if parameter is None else parameter.default)
            found.append((f"{key}.{option}", _largest(value), usual))
    key, value, _ = max(found, key=lambda one: one[1] / max(one[2], 100.0))
    return f"{cut(key)} {value:,.0f}"


def _largest(value: Any) -> float:
    values = value if isinstance(value, list | tuple) else [value]
    return max((float(one) for one in values if isinstance(one, int)), default=0.0)


def check_size(parameters: int, needed: int, largest: str, what: str = "The model") -> None:
    """Raise UserError for more parameters than `limits.PARAMETERS`, or more bytes than this machine's memory.

    largest: the setting that causes most of them, for the message. what: has them.
    """
    PARAMETERS.check(parameters, f"{what} ({largest}; d_model, and the options of its parts)")
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    if needed > there:
        raise ConfigError(
            f"{what}'s weights need {needed / 2**30:,.0f} GiB, but this machine has {there / 2**30:,.0f} GiB of "
            f"memory. Make {largest} smaller (or d_model, n_layers, the vocabulary), or use a larger machine."
        )
