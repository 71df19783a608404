"""What `mambaseq new` writes: the package of a new domain, which installs, trains and passes its tests."""

from __future__ import annotations

import importlib.util
import keyword
import math
import random
import re
from pathlib import Path
from string import Template

from mambaseq.atomic import atomic_folder
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, shown

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LONGEST = 40
_ROWS = 60
_TEMPLATES, _ENDING = Path(__file__).parent / "domain", ".template"


def check_name(name: str) -> None:
    """Raise ConfigError for an invalid domain name, or one that is taken."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > _LONGEST:
        raise ConfigError(
            f"A domain's name is a Python name of small letters, digits and _, such as 'protein', of at most "
            f"{_LONGEST} characters, not {shown(name)}: its package is mambaseq_NAME."
        )
    if name in catalog().domains:
        origin = catalog().domains[name][1]
        raise ConfigError(f"A domain is named {shown(name)} already (from {origin}). Choose another name.")
    if importlib.util.find_spec(f"mambaseq_{name}") is not None:
        raise ConfigError(f"A package mambaseq_{name} is installed already. Choose another name than {shown(name)}.")


def new_domain(name: str, out: Path | None = None) -> Path:
    """Write the package `mambaseq-NAME` of a new domain, with a small sample of made-up data. Returns its folder.

    out: the folder, which must not exist; None takes `mambaseq-NAME` in the working folder.
    Raises ConfigError for a name that is invalid or taken, UserError for a folder that exists or cannot be written.
    """
    check_name(name)
    folder = Path(f"mambaseq-{name}") if out is None else out
    try:
        with atomic_folder(folder, replace=False) as new:
            if folder.exists() or folder.is_symlink():  # an empty folder would be replaced
                raise FileExistsError(folder)
            for path in sorted(_TEMPLATES.rglob(f"*{_ENDING}")):
                inner = str(path.relative_to(_TEMPLATES)).removesuffix(_ENDING)
                inner = inner.replace("package", f"mambaseq_{name}").replace("NAME", name)
                target = new / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                text = Template(path.read_text(encoding="utf-8")).substitute(name=name)
                target.write_text(text, encoding="utf-8")
            (new / f"mambaseq_{name}" / "sample.csv").write_text(_sample(), encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{folder} exists and is not overwritten. Give another --out, or move it.") from error
    return folder


def _sample() -> str:
    """Slow and fast waves of different lengths with noise, one for each line: label,values."""
    draw = random.Random(0)
    lines = ["label,values"]
    for row in range(_ROWS):
        label = ("slow", "fast")[row % 2]
        period, phase = draw.uniform(*{"slow": (16, 24), "fast": (5, 8)}[label]), draw.uniform(0, 2 * math.pi)
        values = (math.sin(2 * math.pi * t / period + phase) + draw.gauss(0, 0.3) for t in range(draw.randint(16, 32)))
        lines.append(f"{label},{' '.join(f'{value:.2f}' for value in values)}")
    return "\n".join(lines) + "\n"
