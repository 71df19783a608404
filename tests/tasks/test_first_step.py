"""What the wait for a run's first step was for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambaseq.cli.main import main
from mambaseq.reporting.runs import RunFolder

CONFIG = """
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens"}
model:
  d_model: 8
  backbone: {name: residual, n_layers: 1}
  mixer: {name: mamba, d_state: 4, backend: reference}
loader: {batch_size: 2}
checkpoint: {every_n_steps: 2}
trainer: {max_steps: 3, accelerator: cpu, limit_val_batches: 0}
"""
PHASES = ["imports", "settings", "data", "model", "processes", "placing", "first batch", "first step"]


def test_each_start_of_a_run_tells_its_phases(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    run = RunFolder(tmp_path / "run")
    allowed = ["--allow-import", "tiny"]
    assert main(["fit", *allowed, "--config", str(tmp_path / "c.yaml"), "--out", str(run.path)]) == 0
    assert main(["fit", *allowed, "--resume", str(run.path), "--trainer.max_steps", "5"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "first step after" in line]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        told = json.loads((run.logs / f"version_{number}" / "first_step.json").read_text())
        assert list(told) == ["all", *PHASES, "compiling kernels"]
        assert abs(told["all"] - sum(told[name] for name in PHASES)) < 0.01
        assert 0 < told["first step"] < told["all"]
        begins, _, after = line.partition(": first step after ")
        assert begins == str(run.path)
        assert abs(float(after.partition(" s: ")[0]) - told["all"]) < 0.06
    assert len(run.starts()) == 2
