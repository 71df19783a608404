"""Runs a recipe and writes its report."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from mambaseq import __version__
from mambaseq.atomic import atomic_file, json_text
from mambaseq.domain import catalog
from mambaseq.errors import UserError, shown
from mambaseq.plain import read_json
from mambaseq.reproduction.context import Context, Recipe, Scale
from mambaseq.reproduction.tables import Report
from mambaseq.runs.naming import resolve_config
from mambaseq.runs.settings import read_settings

_FORMAT = "2"  # of trials


def _hardware(device: torch.device) -> str:
    """The hardware, with the software that computes on it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{name} with torch {torch.__version__}"


def _source(recipe: Recipe) -> str:
    """A digest of a recipe's module, or of those that it names, of neighbouring modules that they take functions or
    classes from, and of its configurations: its trials belong to these settings."""
    own = recipe.run.__module__
    modules = [sys.modules[name] for name in recipe.settings or (own,)]
    beside = {getattr(value, "__module__", None) or "" for module in modules for value in vars(module).values()}
    near = (name for name in beside if name.startswith(f"{sys.modules[own].__package__}."))
    names = sorted({*(module.__name__ for module in modules), *near})
    try:
        text = "".join(inspect.getsource(sys.modules[name]) for name in names)
    except (OSError, TypeError):  # without source code
        text = ""
    text += "".join(json_text(read_settings(resolve_config(name))) for name in recipe.configs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _own(folder: Path, mine: dict[str, str]) -> None:
    """Claim the folder for this recipe.

    Raises UserError if it holds results of another recipe, scale or version.
    """
    path = folder / "run.json"
    if not path.exists():
        with atomic_file(path) as file:
            file.write(json_text(mine).encode())
    found = read_json(path, "Remove it if the folder holds nothing that you need, or choose another --out.")
    different = [
        f"{key} {shown(found.get(key))}, not {shown(value)}" for key, value in mine.items() if found.get(key) != value
    ]
    if different:
        raise UserError(f"{folder} holds another run: {'; '.join(different)}. Choose another --out, or remove it.")


def reproduce(
    name: str,
    device: torch.device,
    scale: Scale,
    seeds: list[int] | None,
    only: list[str],
    part: bool,
    folder: Path,
    data: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
) -> int:
    """Run all trials of a recipe that are not finished, with these seeds or its default number.

    part: the report covers only a part. data: the folder of files that users bring. minutes, steps: see `Context`.
    Returns 0. Raises UserError for minutes or steps that mean nothing to the recipe, and for a folder of another one.
    """
    recipe: Recipe = catalog()["recipes"].get(name)
    if minutes is not None and not recipe.by_clock:
        raise UserError(f"{name} does not train by the clock, so that --minutes means nothing to it. Leave it out.")
    if steps is not None and not recipe.by_steps:
        raise UserError(f"{name} has numbers of steps of its own, so that --steps means nothing to it. Leave it out.")
    mine = {"recipe": name, "scale": scale, "version": __version__, "source": _source(recipe), "format": _FORMAT}
    _own(folder, mine)
    numbers = seeds or list(range(1 if scale == "tiny" else recipe.seeds))
    context = Context(device, scale, numbers, folder, only, _hardware(device), data=data, minutes=minutes, steps=steps)
    try:
        tables = recipe.run(context)
    finally:
        if not any(path.name != "run.json" for path in folder.iterdir()):
            (folder / "run.json").unlink()  # nothing was run, so the folder stays free
    for line in (line for table in tables for line in table.lines if scale != "full"):
        line.wanted = ()  # smaller scales prove nothing
    short = name.rpartition("/")[2]
    command = f"mambaseq reproduce {short}"
    command += f" --scale {scale}" if scale != "full" or device.type != "cuda" else ""
    if seeds:
        from_the_first = numbers == list(range(len(numbers)))
        command += f" --seeds {len(seeds)}" if from_the_first else f" --seed {' '.join(map(str, seeds))}"
    command += f" --only {shlex.join(only)}" if only else ""
    command += f" --minutes {minutes:g}" if minutes is not None else ""
    command += f" --steps {steps}" if steps is not None else ""
    command += " --data FOLDER" if data is not None else ""
    report = Report(
        name,
        scale,
        numbers,
        command,
        " and ".join(sorted(context.used)) or context.hardware,
        f"mambaseq {__version__}",
        datetime.date.today().isoformat(),
        context.seconds,
        tables,
    )
    print(report.markdown())
    print(report.write(folder, "part" if part else "report"))
    return 0
