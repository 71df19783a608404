"""Keys of settings as a user writes them, with dots: which there are, and another value for one."""

from __future__ import annotations

import copy
from typing import Any


def written(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a configuration with another value for a key."""
    changed = copy.deepcopy(raw)
    *sections, last = key.split(".")
    holder = changed
    for section in sections:
        if not isinstance(holder.get(section), dict):
            holder[section] = {}
        holder = holder[section]
    holder[last] = value
    return changed


def flat(value: Any, key: str = "") -> list[str]:
    """The keys of all settings, those of sections as well."""
    inner = value.items() if isinstance(value, dict) else ()
    return ([key] if key else []) + [
        name for step, below in inner for name in flat(below, f"{key}.{step}" if key else str(step))
    ]
