"""A configuration's file: found, read, and checked for what must not reach the parser of its values.

That parser, jsonargparse, imports what looks like a class and reads other files that a value names. A file that
somebody else may have written must be able to do neither.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mambaseq.errors import ConfigError, UserError, cut, did_you_mean, shown
from mambaseq.runs.naming import GROUPS, MODEL_PARTS, TOP, laid_over, read_layers, takes_away
from mambaseq.runs.trainer_classes import KEYS, names_class


def read_settings(path: Path) -> dict[str, Any]:
    """The contents of a configuration's file, over those of its bases (see `read_layers`). Raises ConfigError that
    names the file, and the line or key, if one of them is no configuration."""
    try:
        layers = read_layers(path)
    except UserError as error:
        raise ConfigError(str(error)) from error
    raw: dict[str, Any] = {}
    for file, settings in layers:
        _check(settings, file, raw)
        raw = laid_over(raw, settings)
    return raw


def _check(raw: dict[str, Any], path: Path, under: dict[str, Any]) -> None:
    """under: what the bases have, which alone can be taken away."""
    for key, value in raw.items():
        if key not in TOP:
            known = (*TOP, "base")
            raise ConfigError(
                f"{path}: there is no key {shown(key)}.{did_you_mean(key[:80], known)} Known: {', '.join(known)}."
            )
        if key in GROUPS:
            _require_settings(value, key, path, under.get(key))
    model, below = raw.get("model") or {}, under.get("model") or {}
    for part in (*MODEL_PARTS, "mixers"):
        if part in model:
            _require_settings(model[part], f"model.{part}", path, below.get(part))
    below = below.get("mixers") or {}
    for name, options in (model.get("mixers") or {}).items():
        _require_settings(options, f"model.mixers.{name[:80]}", path, below.get(name))
    _refuse_classes({key: value for key, value in raw.items() if key != "trainer"}, "", str(path))
    trainer = raw.get("trainer") or {}
    _refuse_classes({key: value for key, value in trainer.items() if key not in KEYS}, "trainer", str(path))


def _require_settings(value: Any, key: str, path: Path, below: Any) -> None:
    if not isinstance(value, dict) and not takes_away(value, key, below):
        raise ConfigError(
            f"{path}: {key} must hold settings ({key}.KEY), not {shown(value)}. Leave it out for its defaults."
        )


def _refuse_classes(value: Any, key: str, source: str) -> None:
    """Raise ConfigError for what jsonargparse would import as a class, whatever the type of the key."""
    if (where := names_class(value, key, source)) is not None:
        raise ConfigError(f"{source}: {cut(where, 200)} names a class; only keys of trainer can ({', '.join(KEYS)}).")


def check_overrides(overrides: list[str]) -> None:
    """Raise ConfigError for overrides that would read another file, or name a class."""
    for index, argument in enumerate(overrides):
        if not argument.startswith("--"):
            continue
        key, given, text = argument[2:].partition("=")
        if not given:
            text = overrides[index + 1] if index + 1 < len(overrides) else ""
        if key == "config":
            raise ConfigError("--config cannot be given here: the run has its own configuration. Override single keys.")
        if key in (*GROUPS, "model.mixers", *(f"model.{part}" for part in MODEL_PARTS)) or re.fullmatch(
            r"model\.mixers\.[^.]+", key
        ):
            raise ConfigError(f"--{key} holds several settings. Give them one by one: --{key}.KEY VALUE.")
        if (owner := ".".join(key.split(".")[:2])) in {f"trainer.{name}" for name in KEYS}:
            if key.rstrip("+") != owner:
                raise ConfigError(
                    f"--{key[:200]} cannot be given alone. Give the whole value: --{owner} '{{class_path: NAME, "
                    f"init_args: {{...}}}}'."
                )
        else:
            _refuse_classes(text, key, "the command line")
