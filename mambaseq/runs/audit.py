"""`mambaseq data audit`: leaks and shortcuts in the data of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mambaseq.atomic import json_text
from mambaseq.auditing.findings import TOLERANCE, Audit
from mambaseq.auditing.findings import audit as audit_data
from mambaseq.auditing.page import write_audit
from mambaseq.errors import ConfigError, shown
from mambaseq.outputs import output_file, output_target
from mambaseq.runs.naming import config_of
from mambaseq.runs.parsing import parse_config

ENDINGS = (".json", ".html")


def audit(
    config: str, overrides: Sequence[str] = (), *, out: Sequence[str | Path] = (), tolerance: float = TOLERANCE
) -> Audit:
    """Audit the data of a configuration (a name or a file), or of a run's folder.

    overrides: as for `mambaseq fit` (`--data.length`, `4096`). out: files for the result, `.json` or `.html`.
    tolerance: see `mambaseq.auditing.findings.TOLERANCE`.

    Raises ConfigError for another ending, DataError for data that cannot be read or audited.
    """
    check(out, tolerance)
    settings = parse_config(config_of(config), list(overrides))
    data = settings.make_data()
    with settings.naming_data_keys():
        audited = data.audited()
    found = audit_data(audited, settings.settings["data"]["name"], tolerance)
    for path in map(Path, out):
        if path.suffix == ".html":
            write_audit(output_target(path), found)
        else:
            with output_file(path, "w", encoding="utf-8") as file:
                file.write(json_text(found.record(), indent=1) + "\n")
    return found


def check(out: Sequence[str | Path], tolerance: float) -> None:
    """Raise ConfigError for what cannot be used, before anything is read."""
    for path in out:
        if Path(path).suffix not in ENDINGS:
            raise ConfigError(f"--out {shown(path)} must end in {' or '.join(ENDINGS)}.")
        output_target(path)
    if not 0 <= tolerance <= 1:
        raise ConfigError(f"--tolerance must be a share, 0 to 1, not {tolerance}.")
