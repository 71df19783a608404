"""Blocks of code in pages of the documentation, to be run as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def blocks(path: Path) -> list[tuple[str, str, int]]:
    """The sh and python blocks of a page: language, text, and the number of the line before its first."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(block[1], block[2], text.count("\n", 0, block.start(2))) for block in found]


def run_cell(text: str, path: Path, line: int, names: dict[str, Any]) -> None:
    """Run a cell in the namespace of those before it. An error's traceback has the page's name and line."""
    exec(compile("\n" * line + text, path.name, "exec"), names)
