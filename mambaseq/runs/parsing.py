"""From YAML and command-line overrides to a `RunConfig`.

The names in a configuration (`data.name`, `model.mixer.name`, ...) choose classes, whose typed `__init__` arguments are
the keys next to the name. So the names are read first, and a parser is built for them.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse

from mambaseq.backbones.patterns import mixer_names
from mambaseq.data.addresses import check_settings, redacted
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut_list, did_you_mean, paragraph, shown
from mambaseq.models.building import check_mixer_options
from mambaseq.plain import dump_yaml, flatten, parse_yaml
from mambaseq.resources import is_resource
from mambaseq.runs.config import OFFERED, SECTIONS, RunConfig
from mambaseq.runs.help import keys_text
from mambaseq.runs.naming import MODEL_PARTS, PROVIDED, inherited, near_key, resolve_config
from mambaseq.runs.parser import code_arguments, make_parser
from mambaseq.runs.settings import check_overrides, read_settings
from mambaseq.runs.trainer_classes import KEYS, TrainerClasses, init_parameters, make_classes
from mambaseq.runs.values import PATHS, check_values
from mambaseq.specs import arguments_of
from mambaseq.tasks.optimizer import OptimizerConfig, check_own_settings, not_of

# the kind of thing that a key names, as `mambaseq list` calls it
KINDS_OF = {"data": "datasets", **{f"model.{part}": f"{part}s" for part in MODEL_PARTS}}


def _override(argv: list[str], key: str) -> str | None:
    found = None
    for index, argument in enumerate(argv):
        if argument == f"--{key}" and index + 1 < len(argv):
            found = argv[index + 1]
        elif argument.startswith(f"--{key}="):
            found = argument.partition("=")[2]
    return found


def _written(raw: dict[str, Any], key: str) -> Any:
    value: Any = raw
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _setting(raw: dict[str, Any], argv: list[str], key: str) -> Any:
    text = _override(argv, key)
    if text is None:
        return _written(raw, key)
    try:
        return parse_yaml(text, f"--{key}")
    except UserError:
        return None  # the parser will tell


def _name(raw: dict[str, Any], argv: list[str], key: str, default: str | None) -> str:
    name = _override(argv, f"{key}.name") or _written(raw, f"{key}.name") or default
    if not isinstance(name, str):
        raise ConfigError(f"The configuration needs {key}.name. `mambaseq list {KINDS_OF[key]}` shows names.")
    return name


def _mixers(raw: dict[str, Any], argv: list[str], names: dict[str, str]) -> dict[str, str]:
    """The names of the mixers that the backbone has, each with its registered name: the model's own, or those of its
    pattern, and MLPs.

    Raises ConfigError for names that do not exist, and for an invalid pattern.
    """
    takes = arguments_of(catalog()["backbones"].get(names["backbone"], "model.backbone.name"))
    pattern: Any
    tiers: Any
    pattern, tiers, mlp = (
        _setting(raw, argv, f"model.backbone.{key}") if key in takes else default
        for key, default in (("pattern", None), ("tiers", None), ("mlp", False))
    )

    if not isinstance(tiers, list):
        tiers = None  # the parser will tell, where a unet's are wrong

    def registered(name: str) -> str:
        found = name if name == names["mixer"] else _setting(raw, argv, f"model.mixers.{name}.name")
        return found if isinstance(found, str) else name

    def kind_of(name: str) -> Any:
        where = "model.backbone.pattern" if tiers is None else "model.backbone.tiers"
        if registered(name) != name:
            where = f"model.mixers.{name}.name"
        return catalog()["mixers"].get(registered(name), "model.mixer.name" if name == names["mixer"] else where)

    found = mixer_names(pattern, names["mixer"], mlp if isinstance(mlp, bool) else None, kind_of, tiers)
    return {name: registered(name) for name in found}


def _refuse_code(raw: dict[str, Any], overrides: list[str], parts: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that takes a function, a class or an object. parts: the class behind each key."""
    given = [argument[2:].partition("=")[0].rstrip("+") for argument in overrides if argument.startswith("--")]
    for key, kind in parts.items():
        written = _written(raw, key)
        skip = (PROVIDED | OFFERED.keys()) & arguments_of(kind).keys() if key != "data" else set()
        for name, (accepted, _) in code_arguments(kind, key, frozenset(skip)).items():
            where = f"{key}.{name}"
            told = [other for other in given if other == where or other.startswith(f"{where}.")]
            if accepted is None and (told or (isinstance(written, dict) and name in written)):
                raise ConfigError(
                    f"{where} of {kind.__name__} takes code, which no file or option may name. Leave it out, or set it "
                    f"in Python."
                )


def _without_former_parts(
    raw: dict[str, Any], argv: list[str], names: dict[str, str], classes: dict[str, Any], mixers: dict[str, str]
) -> str:
    """The YAML for the parser: the file's settings, changed where the command line names another class for a part. Then
    settings that the new class does not take are dropped, and those of mixers that the backbone no longer has. For
    another mixer all are dropped: an option of the same name (d_state) means something else, and mixers are compared at
    their defaults."""
    model = raw.get("model")
    options = _written(raw, "model.mixers")
    if isinstance(options, dict):
        former = {part: _name(raw, [], f"model.{part}", default) for part, default in MODEL_PARTS.items()}
        for name in options.keys() & set(_mixers(raw, [], former)) - {former["mixer"], *mixers}:
            del options[name]
        check_mixer_options(options, names["mixer"], [names["mixer"], *mixers])
        for name, own in options.items():
            if isinstance(own, dict) and own.get("name", name) != mixers.get(name, name):
                options[name] = {"name": mixers[name]}
    for part, default in {"data": None, **MODEL_PARTS}.items():
        holder = raw if part == "data" else model
        settings = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(settings, dict) and (former_name := settings.get("name", default)) != names[part]:
            left = settings.keys() - {"name"}
            dropped = sorted(left if part == "mixer" else left - arguments_of(classes[part]).keys())
            if dropped and part == "mixer":
                values = ", ".join(f"{key} {settings[key]}" for key in dropped)
                note = f"{names[part]} has its own defaults; {former_name}'s settings are dropped: {values}."
                print(note, file=sys.stderr)
            for key in dropped:
                del settings[key]
    _drop_of_former_optimizer(raw, argv)
    return dump_yaml(raw)


def _drop_of_former_optimizer(raw: dict[str, Any], argv: list[str]) -> None:
    """Where the command line names another optimizer, take those of the file's settings away that were for the former
    one, and say so. The rates and the schedule are for any."""
    settings, default = raw.get("optimizer"), OptimizerConfig()
    if not isinstance(settings, dict):
        return
    former, name = settings.get("name", default.name), _override(argv, "optimizer.name")
    if name is None or name == former:
        return
    dropped = sorted(settings.keys() & (not_of(name) | {"options"}))
    told = {key: settings.pop(key) for key in dropped}
    told = {key: value for key, value in told.items() if value != getattr(default, key)}
    if told:
        values = ", ".join(f"{key} {value}" for key, value in told.items())
        print(f"{name} is another optimizer; {former}'s settings are dropped: {values}.", file=sys.stderr)


def _absolute(value: Any, key: str, kind: Any) -> Any:
    """A setting of the data with relative paths made absolute, and patterns of files that exist, so that a run can be
    resumed from another folder. Paths are values that the class's annotation (`kind`) calls a Path, and those of
    `PATHS` and of mappings. Others may only look like a file's name (patterns for the names of records)."""
    if _has_path(kind):
        if isinstance(value, list | tuple):
            return type(value)(_absolute(inner, key, kind) for inner in value)
        if isinstance(value, dict):
            return {name: _absolute(inner, key, kind) for name, inner in value.items()}
        local = isinstance(value, str | Path) and str(value) and not re.match(r"\w[\w.-]+:", str(value))
        return str(Path.cwd() / value) if local else value
    if isinstance(value, dict):
        return {name: _absolute(inner, PATHS[0], None) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_absolute(inner, key, None) for inner in value)
    if not isinstance(value, str) or not value or not key.endswith(PATHS) or re.match(r"\w[\w.-]*:", value):
        return value
    there = os.path.lexists(value) or next(glob.iglob(value, recursive=True), None)  # noqa: PTH207 - as `data.files.expand`
    return str(Path.cwd() / value) if there else value


def _has_path(kind: Any) -> bool:
    """Whether a type is a path or contains one."""
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return True
    return kind is os.PathLike or any(_has_path(inner) for inner in get_args(kind))


def changed_model_settings(config: str, settings: dict[str, Any]) -> list[str]:
    """Keys under `model` whose values differ from a configuration's.

    Raises ConfigError when the configuration cannot be used.
    """

    former, new = flatten(parse_config(config, []).settings["model"], "model"), flatten(settings["model"], "model")
    return sorted(key for key in former.keys() | new.keys() if former.get(key) != new.get(key))


def _plain(value: Any) -> Any:
    return value.written if isinstance(value, TrainerClasses) else value


_EXPLAINED = 400  # characters of the parser's own message, which quotes the value

_UNKNOWN_KEY = (  # jsonargparse's wordings, across its versions
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Key ['\"](?P<key>[\w.]+)['\"] is not expected", re.IGNORECASE),
    re.compile(r"Unrecognized arguments?: --(?P<key>[\w.]+)", re.IGNORECASE),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"No action for key ['\"](?P<key>[\w.]+)['\"]", re.IGNORECASE),
)


_WRONG_VALUE = re.compile(r"Parser key ['\"](?P<key>[\w.]+)['\"]: .*\b(?:Given|Got) value:\s*(?P<value>.*)$")
_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_KINDS = {"int": "whole number", "float": "finite number", "str": "text", "bool": "true or false", "dict": "mapping"}


def _choices(parser: jsonargparse.ArgumentParser, key: str, text: str) -> str:
    """What a key takes that takes certain values or plain types, and the text that is none of them; "" for any other
    key."""
    kind = next((getattr(action, "_typehint", None) for action in parser._actions if action.dest == key), None)
    values: list[Any] = []
    kinds, numbers = [], []
    for one in _members(kind):
        if get_origin(one) is Literal:
            values += [value for value in get_args(one) if str(value) not in map(str, values)]
        elif one is type(None):
            kinds.append("null")
        elif one in (int, float, str, bool):
            numbers += [one] * (one in (int, float))
            kinds.append(f"a {_KINDS[one.__name__]}" if one in (int, float) else _KINDS[one.__name__])
        else:
            return ""
    if not values and not kinds:
        return ""
    value: Any = text
    with contextlib.suppress(UserError):
        value = parse_yaml(text, key)
    if type(value) in numbers or (type(value) is int and float in numbers):  # what was written is another text
        value = text
    told = "null" if text == "None" else shown(value)  # the parser's word for it
    near = did_you_mean(text, map(str, values))
    takes = f"one of {cut_list([*values, *kinds], 40, 500)}" if values else " or ".join(kinds)
    return f"{key} must be {takes}; it is {told}.{near}"


def _members(kind: Any) -> list[Any]:
    """The types of a union, and of those in it; a type that is none, alone."""
    if get_origin(kind) in (Union, types.UnionType):
        return [one for inner in get_args(kind) for one in _members(inner)]
    return [kind]


def _explain(error: BaseException, parser: jsonargparse.ArgumentParser, source: str) -> ConfigError:
    whole = redacted(" ".join(str(error).split()))
    text, chosen = whole.rstrip("."), ""
    for pattern in _UNKNOWN_KEY:
        if (found := pattern.search(text)) is not None:
            parts = found.groupdict()
            key = ".".join(part for part in (parts.get("group"), parts["key"]) if part)
            known = vars(parser.get_defaults().as_flat())
            text, part = f"there is no key {shown(key)}", key.rpartition(".")[0]
            beside = not part or any(other.startswith(f"{part}.") for other in known)
            hint = near_key(key, known) if beside else did_you_mean(key, known)
            if (name := known.get(f"{part}.name")) is not None:  # a class's options
                keys = [other for other in known if other.startswith(f"{part}.") and other != f"{part}.name"]
                options = ", ".join(sorted(other.removeprefix(f"{part}.") for other in keys))
                hint = f"{near_key(key, keys)} {name} has {options or 'no options'}."
                chosen = f" --{part}.name {name}"
            break
    else:
        wrong = _WRONG_VALUE.search(whole)
        if wrong is not None and (told := _choices(parser, wrong["key"], wrong["value"])):
            return ConfigError(f"The configuration {source} cannot be used: {told}")
        text, hint = paragraph(_CLASS.sub(lambda found: _KINDS.get(found[1], found[1]), text), _EXPLAINED), ""
    return ConfigError(
        f"The configuration {source} cannot be used: {text}.{hint} `mambaseq fit --config {source}{chosen} "
        f"--help` lists the keys."
    )


def _defaults(parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """What each key of a configuration has when nobody sets it; the data has no name then."""
    values = {action.dest: _plain(action.default) for action in parser._actions}
    names = {"data.name": None, **{f"model.{part}.name": name for part, name in MODEL_PARTS.items()}}
    return {whole: leaf for key, value in (values | names).items() for whole, leaf in flatten(value, key).items()}


def _names(config: str, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The contents of a configuration's file, the names given in it and in the overrides, and the names of all mixers,
    each with its registered name.

    Raises ConfigError for a configuration that cannot be read, or names that do not exist.
    """
    raw = read_settings(resolve_config(config))
    check_overrides(overrides)
    names = {"data": _name(raw, overrides, "data", None)}
    names |= {part: _name(raw, overrides, f"model.{part}", default) for part, default in MODEL_PARTS.items()}
    return raw, names, _mixers(raw, overrides, names)


def _without(mixers: dict[str, str], own: str) -> dict[str, str]:
    """All but the model's own."""
    return {name: registered for name, registered in mixers.items() if name != own}


def keys_of(config: str, overrides: list[str]) -> list[str]:
    """All keys that can be set in a configuration: those of its parts' classes, sections and the trainer.

    Raises ConfigError for a configuration that cannot be read, or names that do not exist.
    """
    _, names, mixers = _names(config, overrides)
    parser, _ = make_parser(names, _without(mixers, names["mixer"]))
    return sorted({action.dest for action in parser._actions} - {"help", "config", "print_config"})


def explained(config: str, overrides: list[str]) -> str:
    """The help text of all keys: what each is, its type and default. Raises ConfigError like `keys_of`."""
    _, names, mixers = _names(config, overrides)
    others = _without(mixers, names["mixer"])
    parser, _ = make_parser(names, others, own=True)
    found = {
        "data": ("datasets", names["data"]),
        **{f"model.{part}": (f"{part}s", names[part]) for part in MODEL_PARTS},
    }
    found |= {f"model.mixers.{name}": ("mixers", registered) for name, registered in others.items()}
    titles = {}
    for key, (kind, name) in found.items():
        registry = catalog()[kind]
        titles[key] = f" ({name}){f': {registry.entry(name).summary}' if name in registry else ''}"
    return keys_text(parser, titles)


def parse_config(config: str, overrides: list[str]) -> RunConfig:
    """Read a configuration (registered name or YAML file) and `--key value` overrides.

    Raises ConfigError for unknown names and keys (with the nearest known one) and for values of a wrong type or out of
    range.
    """
    raw, names, all_mixers = _names(config, overrides)
    own = [argument for argument in overrides if argument.startswith("--model.mixer.")]
    own = [text for text in own if not text.startswith("--model.mixer.name")]
    if own and names["mixer"] not in all_mixers:
        raise ConfigError(
            f"{own[0].partition('=')[0]} is an option of {names['mixer']}, which model.backbone.pattern does not name. "
            f"Options of its mixers are --model.mixers.NAME.OPTION: {', '.join(all_mixers)}."
        )
    mixers = _without(all_mixers, names["mixer"])
    named = [
        argument.partition("=")[0].split(".")[2] for argument in overrides if argument.startswith("--model.mixers.")
    ]
    check_mixer_options(named, names["mixer"], [names["mixer"], *mixers])
    given = _override(overrides, "seed") or raw.get("seed")
    seed: int | None = None
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # the parser will tell
        seed = int(given) if given else None
    prints = any(argument.startswith("--print_config") for argument in overrides)  # the parser notes it in itself
    parser, classes = make_parser(names, mixers, seed, own=prints)
    _refuse_code(
        raw,
        overrides,
        {
            "data": classes["data"],
            **{f"model.{part}": classes[part] for part in MODEL_PARTS},
            **{f"model.mixers.{name}": catalog()["mixers"].get(registered) for name, registered in mixers.items()},
        },
    )
    try:
        parsed = parser.parse_args(
            ["--config", _without_former_parts(raw, overrides, names, classes, mixers), *overrides]
        )
        parsed.pop("config")
        classes_written = {key: _plain(parsed["trainer"].get(key)) for key in KEYS}
        check_settings({**parsed.as_dict(), "trainer": {**parsed["trainer"].as_dict(), **classes_written}})
        annotated, _ = init_parameters(classes["data"])
        for key, value in vars(parsed["data"]).items():
            if key != "name":
                parsed["data"][key] = _absolute(value, key, annotated.get(key))
        made = {key: make_classes(key, value) for key, value in classes_written.items()}
        check_values(parser, parsed, lambda key: _override(overrides, key) or _written(raw, key))
        if parsed["finetune"]["init_from"]:
            source = parsed["finetune"]["init_from"]
            if not is_resource(source):  # which is found anew on another machine
                parsed["finetune"]["init_from"] = str(Path.cwd() / source)
    except (jsonargparse.ArgumentError, SystemExit, ValueError, TypeError, KeyError) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise  # --print_config has printed
        raise _explain(error, parser, config) from error
    settings = parsed.as_dict()
    trainer = {**settings.pop("trainer"), **made}
    if not 0 <= settings["seed"] < 2**32:
        raise ConfigError(f"seed must be at least 0 and below 2**32; it is {settings['seed']}.")
    for section, kind in SECTIONS.items():
        try:
            kind(**settings[section])  # each checks its values
        except TypeError as error:
            given = ", ".join(f"{section}.{key} {shown(value)}" for key, value in settings[section].items())
            raise ConfigError(f"A value under {section} has the wrong type: {given}.") from error
    catalog()["optimizers"].get(settings["optimizer"]["name"], "optimizer.name")
    check_own_settings(OptimizerConfig(**settings["optimizer"]))
    for name in settings["metrics"]:
        catalog()["metrics"].get(name, "metrics")
    # nulls are kept, since a missing key reads back as its default; values are not checked again (positional:
    # jsonargparse renamed the arguments)
    text = parser.dump(parsed, "parser_mode", False, False, True)
    return RunConfig(settings, trainer, classes, text, lambda: _defaults(parser), lambda: inherited(config, overrides))
