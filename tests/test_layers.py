"""The layers import one way only, and the repository keeps to itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_layers() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    examples = sorted(str(path) for path in (ROOT / "examples").iterdir() if path.is_dir())
    path = os.pathsep.join([*examples, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_is_linted() -> None:
    """A package under examples/ is held against the same rules as the others."""
    told, make = tomllib.loads((ROOT / "pyproject.toml").read_text()), (ROOT / "Makefile").read_text()
    for project in (ROOT / "examples").iterdir():
        (package,) = (path.name for path in project.glob("mambaseq_*"))
        assert package in told["tool"]["mypy"]["packages"]
        assert f"examples/{project.name}" in told["tool"]["mypy"]["mypy_path"]
        assert package in told["tool"]["importlinter"]["root_packages"]
        for contract in told["tool"]["importlinter"]["contracts"]:
            named = [
                name for key in ("source_modules", "forbidden_modules", "modules") for name in contract.get(key, [])
            ]
            assert contract["type"] == "layers" or package in named, contract["name"]
        assert f"error:::{package}" in told["tool"]["pytest"]["ini_options"]["filterwarnings"]
        assert f"examples/{project.name}" in make
    assert "/examples" in told["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_nothing_reaches_outside_of_the_repository() -> None:
    outside = re.compile(r"\.\./shar" + r"ed|/wo" + r"rk/")
    found = []
    for path in tracked():
        if path.suffix in {".py", ".toml", ".yaml", ".md", ".sh", ".cfg"} or path.name in {"Makefile", "run"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if outside.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found


def test_sizes_of_what_ships() -> None:
    files = [path for path in tracked() if path.exists()]
    total = sum(path.stat().st_size for path in files)
    assert total <= 25e6 + 8e6  # data of at most 25 MB, and the code with its tests, pages and kept figures
    data = sum(path.stat().st_size for path in files if "data" in path.relative_to(ROOT).parts)
    assert data <= 25e6
