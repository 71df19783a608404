"""The layers import one way only, and the repository keeps to itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_layers() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


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
    assert total <= 25e6 + 3e6  # data of at most 25 MB, and the code
    data = sum(path.stat().st_size for path in files if "data" in path.relative_to(ROOT).parts)
    assert data <= 25e6
