"""What a configuration can name, as far as the catalogue tells it: nothing heavy is imported, so that a wrong name is
told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.registry import Registry
from mambaseq.resources import find

PARTS = {"encoder": "tokens", "backbone": "residual", "mixer": "mamba", "head": "lm"}
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
    """Raise ConfigError for an override that nearly is an option or under a key of a
    configuration, and for a registered name that there is
    not. What only the named classes tell is for the parser of the configuration.

    source: the command, for the message. options: those of the command itself, which may have been meant.
    """
    for index, word in enumerate(overrides):
        key, given, text = word[2:].partition("=")
        if not word.startswith("--") or not key:
            continue
        if (top := key.partition(".")[0].rstrip("+")) not in TOP:
            near = did_you_mean(f"--{top[:80]}", [*options, *(f"--{name}" for name in TOP)])
            if near:  # otherwise the last word of a longer key may be meant, which the parser of all keys knows
                told = shown(word.partition("=")[0], 200)
                raise ConfigError(f"there is no key or option {told}.{near} `{source} --help` lists the keys.")
        kind = _NAMED.get(key)
        name = text if given else overrides[index + 1] if index + 1 < len(overrides) else ""
        if kind is not None and name and ":" not in name:
            catalog()[kind].entry(name, key)


_NAMED = {"data.name": "datasets", **{f"model.{part}.name": f"{part}s" for part in PARTS}}
