"""Slow imports run without the garbage collector, and every command's do."""

from __future__ import annotations

import ast
import gc
import importlib
import sys
from pathlib import Path

import pytest

import mambaseq.cli
from mambaseq.importing import uncollected

SLOW = ("mambaseq.runs", "mambaseq.benchmarking", "mambaseq.checking", "mambaseq.reproduction")
# import no PyTorch, as tests/cli/test_told_at_once.py makes sure
QUICK = tuple(f"mambaseq.runs.{name}" for name in ("naming", "settings", "tables", "trials"))


def test_the_collector_stands_still_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gc.isenabled()
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("mambaseq.no_module_of_ours")
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with uncollected(for_good=True):
        pass
    assert gc.get_freeze_count() == before, "PyTorch was there already"
    torch = sys.modules["torch"] if "torch" in sys.modules else object()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    try:
        with uncollected(for_good=True):
            monkeypatch.setitem(sys.modules, "torch", torch)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
        gc.freeze()  # as it is between tests


def test_commands_import_what_is_slow_without_it() -> None:
    found = []
    for path in Path(mambaseq.cli.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        quick = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "uncollected" in ast.unparse(block.items[0])
            for node in block.body
        }
        slow = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(SLOW)]
        slow = [node for node in slow if node.module not in QUICK]
        found += [f"{path.name}:{node.lineno}" for node in slow if node not in quick]
    assert not found
