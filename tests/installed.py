"""A package as if it were installed, without pip: its entry points are found, and its modules are imported."""

from __future__ import annotations

import contextlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from mambaseq.domain import catalog


@contextlib.contextmanager
def installed(project: Path, site: Path) -> Iterator[None]:
    """project: the folder of a pyproject.toml and its package. site: an empty folder for what pip would write."""
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = site / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in told["entry-points"].items()
    )
    (info / "entry_points.txt").write_text(points)
    paths, modules = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(site), str(project)]
    catalog.cache_clear()
    try:
        yield
    finally:
        sys.path[:] = paths
        own = {path.stem if path.suffix == ".py" else path.name for path in project.iterdir()}
        for name in sys.modules.keys() - modules:
            if name.partition(".")[0] in own:
                del sys.modules[name]
        catalog.cache_clear()
