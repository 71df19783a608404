"""The parser of a configuration: its keys are the typed `__init__` arguments of the classes that it names."""

from __future__ import annotations

import argparse
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import jsonargparse

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.runs.config import OFFERED, SECTIONS
from mambaseq.runs.help import OF_CLASSES
from mambaseq.runs.naming import MODEL_PARTS, PROVIDED
from mambaseq.runs.trainer_classes import KEYS, TrainerClasses, plain_type
from mambaseq.runs.values import whole_first
from mambaseq.specs import arguments_of

TRAINER_DEFAULTS: dict[str, Any] = {
    "trainer.max_steps": 1000,
    "trainer.gradient_clip_val": 1.0,
    "trainer.log_every_n_steps": 10,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
    "trainer.use_distributed_sampler": False,
}


@functools.lru_cache(maxsize=256)
def code_arguments(kind: Any, key: str, skip: frozenset[str]) -> dict[str, tuple[Any, str]]:
    """The arguments of a class that may be functions, classes or objects, each with the part of its type that values in
    a file can have (None if there is none) and its help. They are kept from jsonargparse, which would import what is
    written for them."""
    probe = jsonargparse.ArgumentParser(exit_on_error=False)
    probe.add_class_arguments(kind, key, instantiate=False, skip=set(skip))
    found: dict[str, tuple[Any, str]] = {}
    for action in probe._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and action.dest.startswith(f"{key}.") and plain_type(hint) != hint:
            name, _, inner = action.dest.removeprefix(f"{key}.").partition(".")
            found[name] = (None if inner else plain_type(hint), action.help or "")
    return found


def add_plain(parser: jsonargparse.ArgumentParser, kind: Any, key: str, skip: set[str]) -> None:
    """Add to the parser, as `--key.ARGUMENT`, those arguments of a class that can be plain values.

    Raises ConfigError for a class that cannot be made without code.
    """
    code = code_arguments(kind, key, frozenset(skip))
    if arguments_of(kind).keys() - skip - code.keys():
        parser.add_class_arguments(kind, key, instantiate=False, skip=skip | code.keys())
    for name, (accepted, told) in code.items():
        parameter = arguments_of(kind).get(name)
        default = None if parameter is None else parameter.default
        required = default is inspect.Parameter.empty
        if accepted is not None and not callable(default):
            parser.add_argument(f"--{key}.{name}", type=accepted, default=None if required else default, help=told)
        elif required:
            raise ConfigError(
                f"{key}: {kind.__name__} cannot be made: its {name} takes code, which a configuration cannot name."
            )


def make_parser(
    names: dict[str, str],
    mixers: Mapping[str, str] | None = None,
    seed: int | None = None,
    *,
    own: bool = False,
) -> tuple[jsonargparse.ArgumentParser, dict[str, Any]]:
    """The parser for the classes behind these names, and the classes. Parsers are kept, since making one takes as long
    as parsing with it.

    mixers: names of the backbone's further mixers, each with its registered name. One named by an import path is made
        with its defaults, since the path's dots would be steps of a key.
    seed: the default of data.seed, if the data has one.
    own: for a caller who changes the parser.
    """
    registries = catalog()
    classes = {"data": registries["datasets"].get(names["data"], "data.name")}
    classes |= {part: registries[f"{part}s"].get(names[part], f"model.{part}.name") for part in MODEL_PARTS}
    further = tuple((name, of, registries["mixers"].get(of)) for name, of in (mixers or {}).items())
    make = _new_parser if own else _kept_parser
    return make(tuple((names[key], classes[key]) for key in ("data", *MODEL_PARTS)), further, seed), classes


def _new_parser(
    named: tuple[tuple[str, Any], ...], mixers: tuple[tuple[str, str, Any], ...], seed: int | None
) -> jsonargparse.ArgumentParser:
    """named: the name and the class of the data and of each of the model's parts, in the order of `MODEL_PARTS`.
    mixers: the name, the registered name and the class of each further one."""
    import lightning

    (data, data_class), *parts = named
    parser = jsonargparse.ArgumentParser(prog="mambaseq fit", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order, dropout and data.seed")
    parser.add_argument("--metrics", type=list[str], default=[], help="names of metrics (`mambaseq list metrics`)")
    parser.add_argument("--data.name", type=str, default=data, help="the dataset (`mambaseq list datasets`)")
    add_plain(parser, data_class, "data", set())
    parser.add_argument("--model.d_model", type=int, default=128, help="width of the residual stream")
    parser.add_argument("--model.tie_embeddings", type=bool, default=False, help="share embedding and output weights")
    for part, (name, kind) in zip(MODEL_PARTS, parts, strict=True):
        told = f"the {part} (`mambaseq list {part}s`)"
        parser.add_argument(f"--model.{part}.name", type=str, default=name, help=told)
        skip = (PROVIDED | OFFERED.keys()) & arguments_of(kind).keys()
        if skip != arguments_of(kind).keys():
            add_plain(parser, kind, f"model.{part}", skip)
        for name in OFFERED.keys() & skip:
            accepted, told = OFFERED[name]
            parser.add_argument(f"--model.{part}.{name}", type=accepted, default=None, help=told)
    for name, registered, kind in mixers:
        skip = PROVIDED & arguments_of(kind).keys()
        if "." in name:
            continue
        if registered != name:
            told = "the mixer that the pattern calls so (`mambaseq list mixers`)"
            parser.add_argument(f"--model.mixers.{name}.name", type=str, default=registered, help=told)
        if skip != arguments_of(kind).keys():
            add_plain(parser, kind, f"model.mixers.{name}", skip)
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section, instantiate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer's own docstrings and annotations
        parser.add_class_arguments(lightning.Trainer, "trainer", instantiate=False, fail_untyped=False, skip=set(KEYS))
    for key in KEYS:
        default = inspect.signature(lightning.Trainer).parameters[key].default
        parser.add_argument(
            f"--trainer.{key}",
            type=TrainerClasses,
            default=default,
            help=f"{OF_CLASSES[key]} by class_path and init_args",
        )
    for action in parser._actions:
        if (hint := getattr(action, "_typehint", None)) is not None:
            setattr(action, "_typehint", whole_first(hint))  # noqa: B010 - an attribute that argparse does not know
    parser.set_defaults(TRAINER_DEFAULTS)
    if seed is not None and any(action.dest == "data.seed" for action in parser._actions):
        parser.set_defaults({"data.seed": seed})
    return parser


_kept_parser = functools.lru_cache(maxsize=32)(_new_parser)
