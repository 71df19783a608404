"""What a configuration can name, as far as the catalogue tells it: nothing heavy is imported, so that a wrong name is
told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.registry import Registry
from mambaseq.resources import find

MODEL_PARTS = {"encoder": "tokens", "backbone": "residual", "mixer": "mamba", "head": "lm"}
GROUPS = (
    *("data", "model", "loader", "optimizer", "finetune", "lora", "ema"),
    *("length_warmup", "checkpoint", "generation", "trainer"),
)
TOP = ("seed", "metrics", *GROUPS)


def resolve_config(name: str) -> Path:
    """The file of a registered configuration, or the path itself. Raises ConfigError when there is neither."""
    configs: Registry[Any] = catalog()["configs"]
    if name in configs:
        return find(configs.entry(name).target)
    path = Path(name)
    if path.is_file():
        return path
    known = [entry.name for entry in configs]
    raise ConfigError(
        f"No configuration is named {shown(name, 200)} and no file is there.{did_you_mean(name, known)} "
        f"`mambaseq list configs` shows what there is."
    )


def check_names(overrides: list[str], source: str, options: list[str]) -> None:
    """Raise ConfigError for a word that nearly is one of the command's options, for a key whose section nearly is one,
    and for a registered name that there is not. All others are for the parser of the configuration: it knows what the
    named classes take, and of which keys a word alone may be the end (`--devices`).

    source: the command, for the message. options: those of the command itself, with their dashes.
    """
    for index, word in enumerate(overrides):
        key, given, text = word[2:].partition("=")
        if not word.startswith("--") or not key or key in _OF_THE_PARSER:
            continue
        top, dot, _ = key.partition(".")
        if (top := top.rstrip("+")) not in TOP:
            known = [f"--{name}" for name in TOP] if dot else options
            if near := did_you_mean(f"--{top[:80]}", known, least=0.8):
                told = shown(word.partition("=")[0], 200)
                raise ConfigError(f"there is no key or option {told}.{near} `{source} --help` lists the keys.")
        kind = _NAMED.get(key)
        name = text if given else overrides[index + 1] if index + 1 < len(overrides) else ""
        if kind is not None and name and ":" not in name:
            catalog()[kind].entry(name, key)


_OF_THE_PARSER = ("help", "config", "print_config")
_NAMED = {"data.name": "datasets", **{f"model.{part}.name": f"{part}s" for part in MODEL_PARTS}}
