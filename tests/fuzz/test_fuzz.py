"""Some of the fuzzer's cases. `python tests/fuzz/run.py --cases 10000 --jobs 2` is the whole of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = HERE / "run.py"


@pytest.mark.slow
def test_mutated_inputs_are_refused_in_a_paragraph_or_read_right() -> None:
    command = [sys.executable, str(RUN), "--quick", "--cases", "250", "--runs", "dna_lm", "text", "audio"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "failures: 0" in done.stdout


def test_odd_values_are_given_to_configurations_whose_data_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a step of each can be taken before the first case."""
    monkeypatch.syspath_prepend(HERE)
    odd_values = importlib.import_module("odd_values")
    names = odd_values.names_of_configs()
    assert {"audio/demo", "dna/finetune", "synthetic/listops", "text/mamba3"} <= set(names)
    assert not {"audio/sc09", "audio/youtubemix", "audio/youtubemix_s4", "dna/hg38", "text/pile"} & set(names)
    for name in names:
        assert "init_from" not in odd_values.small(name).get("finetune", {})
