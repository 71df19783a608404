"""Two processes train as one does: the same data in the same order, the same loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.reporting.runs import RunFolder

CONFIG = """
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens", size: 32}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
optimizer: {lr: 1.0e-2}
finetune: {freeze: [backbone], unfreeze: {backbone.layers.0.mixer: 4}}
ema: {decay: 0.5}
trainer: {max_steps: 10, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
"""


@pytest.mark.slow
def test_two_processes_get_the_loss_of_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    fit = ["fit", "--allow-import", "tiny", "--config", str(tmp_path / "c.yaml")]
    assert main([*fit, "--out", str(tmp_path / "one"), "--loader.batch_size=4"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mambaseq", *fit, "--out", str(tmp_path / "two"), "--loader.batch_size=2"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    saved = [read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two")]
    one, two = ({**checkpoint["state_dict"], **checkpoint["average"]} for checkpoint in saved)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), name
    curves = [RunFolder(tmp_path / name).curve("val/bits_per_token") for name in ("one", "two")]
    assert curves[0]
    for (step, value), (other_step, other) in zip(*curves, strict=True):
        assert step == other_step
        assert value == pytest.approx(other, rel=1e-4)
