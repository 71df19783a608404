"""Print the lower bounds of pyproject.toml as pip constraints: `python tests/oldest.py > constraints.txt`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["dev"]]:
    if found := re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement.split(";")[0].strip()):
        print(f"{found[1]}=={found[2]}")
