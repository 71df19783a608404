"""Slow imports run without the garbage collector and without what nobody asked for, and every command's do."""

from __future__ import annotations

import ast
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


# seconds each; none of them is needed to train on text, DNA or audio
HEAVY = (
    "accelerate",
    "datasets",
    "librosa",
    "pandas",
    "peft",
    "scipy",
    "sklearn",
    "tensorflow",
    "torchaudio",
    "torchmetrics.functional",
    "torchvision",
    "transformers",
)
TRAINING = """
import json, sys
from mambaseq.importing import uncollected
with uncollected(for_good=True):
    import mambaseq.runs.training
    import mambaseq.runs.evaluation, mambaseq.runs.generation, mambaseq.runs.prediction
    import mambaseq.metrics.classification, mambaseq.metrics.likelihood, mambaseq.metrics.values
    import mambaseq_text.corpus, mambaseq_dna.species, mambaseq_audio.clips
json.dump([name for name in sys.argv[1:] if name in sys.modules], sys.stdout)
"""
TORCHMETRICS = """
import json, sys
from mambaseq.importing import uncollected
with uncollected():
    import torchmetrics
asked = [hasattr(torchmetrics, name) for name in ("__version__", "__wrapped__", "_logger")]
in_part, metric = "torchmetrics.classification" not in sys.modules, torchmetrics.Metric
from torchmetrics import Accuracy
json.dump({
    "asked": asked,
    "in part": in_part,
    "whole": issubclass(Accuracy, metric) and metric is torchmetrics.Metric,
    "by name": callable(torchmetrics.functional.accuracy),
    "not there": hasattr(torchmetrics, "nothing"),
    "finders": [type(finder).__name__ for finder in sys.meta_path if "mambaseq" in type(finder).__module__],
}, sys.stdout)
"""


def printed(script: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_a_training_imports_nothing_heavy() -> None:
    assert printed(TRAINING, *HEAVY) == []


def test_torchmetrics_is_imported_in_part_until_somebody_asks_for_more() -> None:
    assert printed(TORCHMETRICS) == {
        "asked": [True, False, True],
        "in part": True,
        "whole": True,
        "by name": True,
        "not there": False,
        "finders": [],
    }


def test_torchmetrics_of_another_layout_is_imported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics" / "__init__.py").write_text("Metric = 'another'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with uncollected():
        found = importlib.import_module("torchmetrics")
    monkeypatch.delitem(sys.modules, "torchmetrics")
    assert (found.Metric, "__getattr__" in vars(found)) == ("another", False)
