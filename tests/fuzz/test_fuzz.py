"""Some of the fuzzer's cases. `python tests/fuzz/run.py --cases 10000 --jobs 2` is the whole of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"


@pytest.mark.slow
def test_mutated_inputs_are_refused_in_a_paragraph_or_read_right() -> None:
    command = [sys.executable, str(RUN), "--quick", "--cases", "250", "--runs", "dna_lm", "text", "audio"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "failures: 0" in done.stdout
