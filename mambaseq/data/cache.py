"""Where derived and fetched data are kept, and how a data file is named in a configuration."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import Any

from mambaseq import resources
from mambaseq.errors import ConfigError, DataError
from mambaseq.resources import cache_dir

HASHED_UP_TO = 64 * 2**20


def locate(name: str | Path) -> list[Path]:
    """The files that a name in a configuration stands for, sorted.

    name: a path, which may hold `*` and `?`; `mambaseq:data/...` for a file that ships with the project (or
        `package:...` for any package's); `fetched:NAME/...` for one that `mambaseq data fetch NAME` brought, in the
        folder of the variable MAMBASEQ_CACHE or else the platform's cache folder.
    Raises DataError when there is no such file.
    """
    text = str(name)
    scheme, separator, relative = text.partition(":")
    remedy = "Check the path; it is relative to the folder that the command runs in."
    if separator and scheme == "fetched":
        pattern = cache_dir() / "fetched" / relative
        remedy = (
            f"Run `mambaseq data fetch {relative.partition('/')[0]}` first; if that was done with --cache FOLDER, set "
            f"the variable MAMBASEQ_CACHE to that folder."
        )
    elif separator and scheme.isidentifier() and not Path(text).exists():
        folder, _, last = relative.rpartition("/")
        try:
            pattern = resources.find(f"{scheme}:{folder}") / last
        except ConfigError as error:
            raise DataError(str(error)) from error
        remedy = "Check the name of the resource."
    else:
        pattern = Path(text).expanduser()
    if pattern.is_file():
        return [pattern]
    found = sorted(Path(path) for path in glob.glob(str(pattern)) if Path(path).is_file())  # noqa: PTH207
    if not found:
        raise DataError(f"There is no data file {text!r} (looked for at {pattern}). {remedy}")
    return found


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells whether a source file has changed: its name and size, and a sha256 of up to 64 MiB, else its
    mtime.

    Hashing a large file at every start would cost more than reading it is worth.
    """
    status = path.stat()
    found: dict[str, Any] = {"name": path.name, "size": status.st_size}
    if status.st_size <= HASHED_UP_TO:
        with path.open("rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        found["mtime_ns"] = status.st_mtime_ns
    return found
