"""Files that ship with a package, found in a checkout and in an installed wheel alike; and where files are cached."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from mambaseq.errors import ConfigError

_PACKAGE = Path(__file__).parent


def share() -> Path:
    """The folder that holds `configs/` and `data/`: the checkout's root, or `_share` inside the wheel."""
    installed = _PACKAGE / "_share"
    return installed if installed.is_dir() else _PACKAGE.parent


def find(resource: str) -> Path:
    """The path of `"package:relative/path"`; `mambaseq:` looks in the shared folder (configs, data).

    Raises ConfigError when the package or the file does not exist.
    """
    package, separator, relative = resource.partition(":")
    if not separator:
        raise ConfigError(f"{resource!r} is not a resource; write package:relative/path.")
    if package == "mambaseq":
        root = share()
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(f"The resource {resource!r} is in a package that is not installed: {package!r}.")
        root = Path(spec.origin).parent
    path = root / relative
    if not path.exists():
        raise ConfigError(f"The resource {resource!r} does not exist; it was looked for at {path}.")
    return path


def cache_dir(override: str | Path | None = None) -> Path:
    """The cache folder: `override`, else the variable MAMBASEQ_CACHE, else the platform's
    (`~/.cache/mambaseq`)."""
    if override is not None:
        return Path(override).expanduser()
    if variable := os.environ.get("MAMBASEQ_CACHE"):
        return Path(variable).expanduser()
    import pooch

    return Path(pooch.os_cache("mambaseq"))
