"""Where the time of a step goes, by a clock that only moves in parts that are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch.optim import AdamW

from mambaseq.backbones.base import ResidualLayer
from mambaseq.cli.main import main
from mambaseq.encoders import TokenEncoder
from mambaseq.heads.lm import LMHead
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks import parts
from mambaseq.tasks.task import Task

CONFIG = """
metrics: [bits_per_token, bits_by_length]
data: {name: "tiny:TinyTokens"}
model:
  d_model: 8
  backbone: {name: residual, n_layers: 3, pattern: [mamba, mamba, attention], mlp: false, checkpoint: true}
  mixer: {name: mamba, d_state: 4, backend: reference}
loader: {batch_size: 2}
trainer: {max_steps: 7, accelerator: cpu, enable_progress_bar: false, val_check_interval: 2,
  check_val_every_n_epoch: null}
"""
COSTS = {"Mamba": 1.0, "Attention": 10.0}


def test_a_step_is_told_by_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    now = [0.0]
    monkeypatch.setattr(parts, "perf_counter", lambda: now[0])

    def takes(owner: type, name: str, seconds) -> None:
        function = getattr(owner, name)

        def slow(self, *arguments, **options):
            now[0] += seconds(self) if callable(seconds) else seconds
            return function(self, *arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    takes(ResidualLayer, "forward", lambda layer: COSTS[type(layer.mixer).__name__])
    takes(TokenEncoder, "forward", 100.0)
    takes(LMHead, "forward", 1000.0)
    takes(Task, "_count", 0.5)
    takes(AdamW, "step", 0.25)
    takes(Task, "validation_step", 1e6)
    (tmp_path / "c.yaml").write_text(CONFIG)
    fit = ["fit", "--allow-import", "tiny", "--config", str(tmp_path / "c.yaml"), "--out"]
    profiler = '{"class_path": "parts", "init_args": {"steps": 4, "skip": 1}}'
    assert main([*fit, str(tmp_path / "run"), f"--trainer.profiler={profiler}"]) == 0
    run = RunFolder(tmp_path / "run")
    told = json.loads((run.logs / "version_0" / "parts.json").read_text())
    assert told == run.read_parts()
    assert told["batches"] == 4
    milliseconds = {name: value for name, value in told["milliseconds"].items() if value}
    # the layers run again in the backward pass
    assert milliseconds == {
        "encoder": 100_000,
        "Mamba layers": 2_000,
        "Attention layers": 10_000,
        "head and loss": 1_000_000,
        "forward, the rest": 500,
        "backward": 12_000,
        "optimizer": 250,
    }
    assert {"data", "callbacks and logs"} <= told["milliseconds"].keys()
    assert main(["validate", "--allow-import", "tiny", "--checkpoint", str(run.path)]) == 0
    ((length, targets, bits),) = run.read_results()["val/bits_by_length"]
    assert (length, targets) == (16, 96)
    assert bits == pytest.approx(run.read_results()["val/bits_per_token"], rel=1e-5)
    assert "16 tokens or more, 96 targets" in run.report.read_text()
    page = re.sub("<[^>]*>", " ", run.report.read_text()).partition("Where the time of a step goes")[2]
    assert re.match(r"\W*A batch takes 1,124,750 ms, [^.]* \(mean of 4\)\.", page)
    assert re.search(r"head and loss, 89%\W*1,000,000\D* ms", page)
    # those of Lightning say what they found, too
    monkeypatch.undo()
    assert main([*fit, str(tmp_path / "simple"), "--trainer.profiler=simple", "--trainer.max_steps=1"]) == 0
    assert "run_training_batch" in caplog.text
    assert RunFolder(tmp_path / "simple").read_parts() == {}
    caplog.clear()
    assert main([*fit, str(tmp_path / "short"), "--trainer.profiler=parts", "--trainer.max_steps=2"]) == 0
    assert "too few batches (2)" in caplog.text
    assert "give at least 6 steps, or 25 to time 20" in caplog.text
