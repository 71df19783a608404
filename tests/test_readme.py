"""Every command and every Python block of the READMEs runs, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mambaseq.cli.main import main

ROOT = Path(__file__).parents[1]
# make demo and make test are run by the CI script itself; the others set up environments or need a GPU
NOT_HERE = ("make ", "git ", "cd ", "pip ", "python benchmarks/")


def blocks(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(sh|python)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    names: dict = {}
    ran = 0
    for language, text in blocks(ROOT / "README.md"):
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
            ran += 1
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if not command or line.startswith(NOT_HERE):
                continue
            assert command[0] == "mambaseq", f"README.md has a command that no test runs: {line}"
            assert main(command[1:]) == 0, line
            ran += 1
    assert ran >= 8


def test_readme_pictures_and_links_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "docs/design.md"):
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{name} links to {target}"
