"""Classes under `trainer:` (callbacks, loggers, ...): which may be named, and how they are made from plain values.

A configuration may be somebody else's, so names are looked up before anything is imported: Lightning's own classes by
their public names, and, below what `--allow-import` allows, classes of the right kind. jsonargparse, which reads
everything else, would import whatever a value names; it never sees these.
"""

from __future__ import annotations

import datetime
import enum
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
from jsonargparse.typing import register_type

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.plain import parse_yaml
from mambaseq.registry import import_allowed, is_allowed
from mambaseq.specs import arguments_and_owners, takes_others

PYTORCH = "lightning.pytorch"
# how Lightning and Python say that a package is not there
_ABSENT = re.compile(r"Requirement '([\w.-]+)[^']*' not met|No module named '([\w.-]+)'")


class Key(NamedTuple):
    """A key of `trainer`: the base classes (`"module:Class"`), the packages of Lightning whose public names are known,
    whether there may be several, and the plain types that are also allowed."""

    wanted: tuple[str, ...]
    packages: tuple[str, ...]
    several: bool
    plain: tuple[type, ...]


KEYS = {
    "callbacks": Key((f"{PYTORCH}.callbacks:Callback",), (f"{PYTORCH}.callbacks",), True, ()),
    "logger": Key((f"{PYTORCH}.loggers:Logger",), (f"{PYTORCH}.loggers",), True, (bool,)),
    "plugins": Key(
        (
            f"{PYTORCH}.plugins:Precision",
            f"{PYTORCH}.plugins:CheckpointIO",
            f"{PYTORCH}.plugins:LayerSync",
            f"{PYTORCH}.plugins.environments:ClusterEnvironment",
        ),
        (
            f"{PYTORCH}.plugins",
            f"{PYTORCH}.plugins.environments",
            f"{PYTORCH}.plugins.io",
            f"{PYTORCH}.plugins.precision",
            f"{PYTORCH}.plugins.layer_sync",
        ),
        True,
        (),
    ),
    "strategy": Key((f"{PYTORCH}.strategies:Strategy",), (f"{PYTORCH}.strategies",), False, (str,)),
    "profiler": Key((f"{PYTORCH}.profilers:Profiler",), (f"{PYTORCH}.profilers",), False, (str,)),
    "accelerator": Key((f"{PYTORCH}.accelerators:Accelerator",), (f"{PYTORCH}.accelerators",), False, (str,)),
}

# names of ours, beside Lightning's or in their place
_DDP = "mambaseq.tasks.replicated:Replicated"
_OURS = {
    "profiler": {"parts": "mambaseq.tasks.parts:StepParts"},
    "strategy": {"fsdp2": "mambaseq.tasks.sharding:FullySharded", "ddp": _DDP, "DDPStrategy": _DDP},
}

# strategies of Lightning that leave to a run's plugin how checkpoints are written
_LEAVE_IT = ("Strategy", "XLAStrategy")

_COPIES = re.compile("_(spawn|fork|notebook)")  # strategies that `trainer.make_trainer` refuses


class TrainerClasses:
    """The value of such a key as written: plain values, with `class_path` and `init_args` where a class is named."""

    def __init__(self, written: Any) -> None:
        self.written = written


# jsonargparse passes values of this type on: text (of the command line) is read as YAML, nothing more
register_type(
    TrainerClasses,
    serializer=lambda value: value.written,
    deserializer=lambda value: TrainerClasses(
        parse_yaml(value, "its value") if isinstance(value, str) else _plain_values(value)
    ),
    deserializer_exceptions=(ValueError, TypeError, UserError),
)


def _plain_values(value: Any) -> Any:
    if isinstance(value, jsonargparse.Namespace):
        return value.as_dict()
    return [_plain_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def make_classes(key: str, value: Any) -> Any:
    """What `lightning.Trainer` takes for `trainer.key`, made from what is written there.

    Raises ConfigError that names the key, for classes that may not be named, are of the wrong kind or cannot be made.
    """
    known, where = KEYS[key], f"trainer.{key}"
    if value is None or (isinstance(value, bool) and bool in known.plain):
        return value
    if isinstance(value, list):
        if not known.several:
            raise ConfigError(f"{where} takes one value, not a list.")
        return [_make(key, inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    return _make(key, value, where)


def _make(key: str, value: Any, where: str) -> Any:
    known = KEYS[key]
    if isinstance(value, str) and str in known.plain and not _names_class(key, value):
        _check_short(key, value, where)
        return value  # Lightning's own short names, such as ddp, which it looks up itself
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise ConfigError(
            f"{where} must name a class, as {{class_path: NAME, init_args: {{...}}}}, not {shown(value)}. Known: "
            f"{cut_list(_known(key), most=40)}."
        )
    if more := spec.keys() - {"class_path", "init_args"}:
        raise ConfigError(
            f"{where} has {cut_list(sorted(more))} besides class_path and init_args, the only keys it has."
        )
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"{where}.init_args must be names and values, not {shown(arguments)}.")
    kind = _resolve(key, spec["class_path"], where)
    if key == "strategy":
        _check_checkpoints(kind, where)
    checked = _check_arguments(kind, arguments, where)
    try:
        return kind(**checked)
    except Exception as error:  # a class may refuse its settings with any error
        if isinstance(error, ImportError) and (found := _ABSENT.search(str(error))) is not None:
            package = found[1] or found[2].partition(".")[0]
            raise ConfigError(
                f"{where}: {kind.__name__} needs the package {package}, which is not installed or is too old. Install "
                f"it: pip install -U {package}."
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where}: {kind.__name__} cannot be made ({type(error).__name__}: {reason}).") from error


def _check_short(key: str, name: str, where: str) -> None:
    """Raise ConfigError for a short name that Lightning does not know, whose own message lacks our names, and for that
    of a strategy whose checkpoints are not those of a run."""
    if key == "profiler":
        known = ["simple", "advanced", "pytorch", "xla"]
    elif key == "strategy":
        registry = importlib.import_module(f"{PYTORCH}.strategies").StrategyRegistry
        if name in registry:
            _check_checkpoints(registry[name]["strategy"], where)
        known = ["auto", *(one for one in registry if not _is_foreign(registry[one]["strategy"]))]
    else:
        return
    if (name.lower() if key == "profiler" else name) not in known:
        known = list(dict.fromkeys([*_OURS[key], *known]))
        known = [name for name in known if not name.endswith("Strategy") and not _COPIES.search(name)]
        raise ConfigError(
            f"{where}: there is no {key} {shown(name, 200)}.{did_you_mean(name[:80], known)} Known: "
            f"{cut_list(known, most=40)}; or a class, as {{class_path: NAME, init_args: {{...}}}}."
        )


def _is_foreign(strategy: type) -> bool:
    """Whether a strategy has Lightning write checkpoints in a form that is not ours (FSDP, DeepSpeed)."""
    writer = next(base for base in strategy.__mro__ if "save_checkpoint" in vars(base))
    return writer.__module__.startswith("lightning.") and writer.__name__ not in _LEAVE_IT


def _check_checkpoints(strategy: type, where: str) -> None:
    if _is_foreign(strategy):
        raise ConfigError(
            f"{where}: {strategy.__name__} writes checkpoints in a form of its own, from which a run could not be "
            "resumed or exported. Use trainer.strategy fsdp2, which shards weights too, also on CPUs."
        )


def _names_class(key: str, text: str) -> bool:
    return "." in text or ":" in text or text in _OURS.get(key, {}) or text in _public(key)


def _public(key: str) -> dict[str, str]:
    """The classes of Lightning that a key may name: each public name, and the package that it is in."""
    known = KEYS[key]
    bases = tuple(_load(wanted) for wanted in known.wanted)
    found: dict[str, str] = {}
    for package in known.packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", None) or vars(module):
            kind = getattr(module, name, None)
            if isinstance(kind, type) and issubclass(kind, bases) and kind.__module__.startswith("lightning."):
                found.setdefault(name, package)
    return found


def _registered(key: str) -> list[str]:
    """The names that domains have registered for a key."""
    return [entry.name for entry in catalog()[key]] if key == "callbacks" else []


def _known(key: str) -> list[str]:
    """The names of classes that a value of a key can have, for messages."""
    public: list[str] = sorted(_public(key))
    if key == "strategy":
        module = importlib.import_module(f"{PYTORCH}.strategies")
        public = [name for name in public if not _is_foreign(getattr(module, name))]
    return list(dict.fromkeys([*_registered(key), *_OURS.get(key, {}), *public]))


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _resolve(key: str, path: str, where: str) -> Any:
    """The class for a short name, its path in Lightning, a registered name, or an allowed import path."""
    if path in _OURS.get(key, {}):
        return _load(_OURS[key][path])
    if path in _registered(key):
        return catalog()[key].get(path, where)
    public = _public(key)
    module, _, name = path.replace(":", ".").rpartition(".")
    if name in public:
        kind = getattr(importlib.import_module(public[name]), name)
        # the public path, and the module that defines it
        if module in ("", public[name], kind.__module__, *KEYS[key].packages):
            ours = _OURS.get(key, {}).get(name)
            return kind if ours is None else _load(ours)
    if not module or not is_allowed(module):
        remedy = f" If you trust the package: --allow-import {module.partition('.')[0]}" if module else ""
        known = _known(key)
        nor = ", nor registered" if _registered(key) else ""
        raise ConfigError(
            f"{where}: {shown(path, 200)} is not one of Lightning's classes for it{nor}, "
            f"and nothing is imported because a file names it.{did_you_mean(name[:80], known)} Known: "
            f"{cut_list(known, most=40)}.{remedy}"
        )
    wanted = KEYS[key].wanted
    for index, base in enumerate(wanted):
        try:
            return import_allowed(f"{module}:{name}", f"class of trainer.{key}", base, where)
        except ConfigError:
            if index == len(wanted) - 1:
                raise
    return None


def _check_arguments(kind: type, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments, checked against the types that the class declares. Raises ConfigError for unknown arguments, wrong
    types, and arguments that no plain value can be: functions and classes are not looked up by name."""
    parameters, open_ended = init_parameters(kind)
    checked: dict[str, Any] = {}
    for name, value in arguments.items():
        place = f"{where}.init_args.{name[:80]}"
        if names_class(value, place, "trainer") is not None:
            raise ConfigError(f"{place} names a class inside another one's arguments; those must be plain values.")
        if name not in parameters:
            if not open_ended:
                raise ConfigError(
                    f"{place}: {kind.__name__} has no such argument.{did_you_mean(name[:80], parameters)} It has: "
                    f"{cut_list(parameters)}."
                )
            checked[name] = value
            continue
        accepted = plain_type(parameters[name])
        if accepted is None:
            if value is not None:
                raise ConfigError(
                    f"{place} takes code, which a configuration cannot give. Leave it out, or write a class of your "
                    "own (see --allow-import) that sets it."
                )
            continue
        checked[name] = value if _is_open(accepted) else _checked(accepted, value, place)
    return checked


def _checked(accepted: Any, value: Any, place: str) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=accepted)
    try:
        return parser.parse_object({"value": value})["value"]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{place} cannot be {shown(value)}: {reason}.") from error


def _is_open(accepted: Any) -> bool:
    """Whether a type accepts anything somewhere in it: jsonargparse would make a class of what looks like one there."""
    return accepted is Any or any(_is_open(inner) for inner in typing.get_args(accepted))


def names_class(value: Any, key: str, source: str) -> str | None:
    """The key, at or below `key`, whose value, or text in it, names a class (`class_path`); None if there is none.

    source: what messages call the file. Raises ConfigError for text that looks like quoted YAML but is not.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            where = f"{key}.{name}" if key else str(name)
            if name == "class_path":
                return where
            if (found := names_class(inner, where, source)) is not None:
                return found
    elif isinstance(value, list):
        return next((found for inner in value if (found := names_class(inner, key, source)) is not None), None)
    elif isinstance(value, str) and "class_path" in value:
        return key
    elif isinstance(value, str) and '"' in value and "\\" in value:
        # jsonargparse reads text as YAML again, where "cl\u0061ss_path" is class_path
        try:
            read = parse_yaml(value, f"{source}: the text of {cut(key, 200)}")
        except UserError as error:
            raise ConfigError(str(error)) from error
        return names_class(read, key, source) if read != value else None
    return None


def init_parameters(kind: Any) -> tuple[dict[str, Any], bool]:
    """The annotations of a class's arguments (Parameter.empty without one, a string where it cannot be evaluated), with
    those of its bases where it passes on `**kwargs`; and whether it takes any others."""
    owned = arguments_and_owners(kind).items()
    found = {name: _evaluated(parameter.annotation, base.__module__) for name, (parameter, base) in owned}
    return found, takes_others(kind)


def _evaluated(annotation: Any, module: str) -> Any:
    holder = type("holder", (), {"__annotations__": {"value": annotation}})
    try:
        return typing.get_type_hints(holder, vars(sys.modules[module]) if module in sys.modules else None)["value"]
    except Exception:  # names that exist only for type checkers
        return str(annotation)


_LEAVES = (bool, int, float, str, type(None), Path, os.PathLike, datetime.timedelta)
_CONTAINERS = (list, tuple, dict, set, Iterable, Mapping, typing.get_origin(typing.Sequence[int]))


def plain_type(annotation: Any) -> Any:
    """The part of a type that values in a file can have without naming code; None if there is none.

    >>> plain_type(int | typing.Callable[[], int])
    <class 'int'>
    """
    if annotation is inspect.Parameter.empty or annotation is Any or isinstance(annotation, str):
        return Any
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        left = [kept for inner in arguments if (kept := plain_type(inner)) is not None]
        if left == [type(None)]:
            return None
        return typing.Union[tuple(left)] if left else None  # noqa: UP007 - of a tuple
    if origin is Literal:
        return annotation
    if origin is typing.Annotated:
        return annotation if plain_type(arguments[0]) is not None else None
    if annotation in _LEAVES or (isinstance(annotation, type) and issubclass(annotation, enum.Enum)):
        return Path if annotation is os.PathLike else annotation
    if (annotation if origin is None else origin) in _CONTAINERS:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return annotation if all(plain_type(argument) == argument for argument in inner) else None
    return None
