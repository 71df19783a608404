"""What `predict` and `generate` share: the device, the condition, and readers and writers that fit the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError, did_you_mean


def condition_ids(loaded: LoadedModel, condition: str | None) -> list[int]:
    """Ids of comma-separated condition names (numbers where the model's conditions have no names).

    Raises ConfigError for unknown ones, or where one is needed.
    """
    count = loaded.card.spec["encoder"].get("n_conditions", 0)
    names = (loaded.card.condition_names or [str(number) for number in range(count)]) if count else []
    if condition is None:
        if names:
            raise ConfigError(f"This model is conditional; say on what with --condition: {', '.join(names)}.")
        return []
    chosen = [part.strip() for part in condition.split(",")]
    for part in chosen:
        if part not in names:
            known = ", ".join(names) or "none, it is not conditional"
            raise ConfigError(f"No condition is named {part!r}.{did_you_mean(part, names)} The model knows: {known}.")
    return [names.index(part) for part in chosen]


def fitting_options(
    kind: str, name: str, function: Callable[..., Any], options: dict[str, Any], own: bool
) -> dict[str, Any]:
    """What of the options saved with a model goes to its reader or writer.

    own: whether it is the model's own, which takes all of them; another one is given those that it knows.
    Raises ConfigError when it needs more.
    """
    parameters = inspect.signature(function).parameters
    if not own:
        options = {key: value for key, value in options.items() if key in parameters}
    needed = [
        key
        for key, parameter in list(parameters.items())[3 if kind == "writer" else 2 :]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in options
    ]
    if needed:
        raise ConfigError(
            f"The {kind} {name!r} needs {', '.join(needed)}, which this model was not saved with. Use its own {kind}."
        )
    return options
