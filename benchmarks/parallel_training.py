"""Training over the GPUs of a host, see `context_parallel.py`: steps of a sharded model whose weights are made on the
GPUs, and runs of `mambaseq fit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from parallel_measures import Measure, data, model_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.atomic import json_text
from mambaseq.cards import card
from mambaseq.models import causal_lm
from mambaseq.tasks.sharding import shard_over


def trained(measure: Measure, name: str, how: str, size: dict[str, int], batch: int, length: int) -> None:
    """Training steps with sequences of a rank's own (batch x length): tokens a second of all, MFU, memory. how: ddp or
    fsdp2, whose weights are made on the GPUs, random ones."""
    device, ranks = measure.device, measure.context.size
    model: Any
    if how == "ddp":
        model = model_of(device, size)
        count = model.n_parameters()
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        with torch.device("meta"):
            model = causal_lm(**size, checkpoint=size["d_model"] > 2048, cuda_graph=False)
        count = model.n_parameters()
        shard_over(model, init_device_mesh(device.type, (ranks,)))
        model.to_empty(device=device)
        for key, parameter in model.named_parameters():
            local: Any = parameter.to_local()  # type: ignore[attr-defined]
            with torch.no_grad():
                if local.dim() > 1 and not key.endswith("A_log"):
                    local.normal_(std=0.02)
                else:
                    local.fill_(-4.0 if key.endswith("dt_proj.bias") else 0.0 if "bias" in key else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    tokens, labels = data(length, size["vocab_size"], device, batch)
    losses: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            loss = model(tokens, labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    row: dict[str, Any] = {
        "name": f"{how}, {name}",
        "ranks": ranks,
        "parameters": count,
        "batch": batch,
        "length": length,
    }
    found = measure.timed(step, repeats=5 if count < 5e8 else 3, warm_up=2)
    row["step_s"] = None
    if found:
        row["step_s"], row["gib"] = found
        row["tokens_per_s"] = ranks * batch * length / row["step_s"]
        row["losses"] = [float(loss) for loss in losses[:: max(1, len(losses) - 1)]]
        if device.type == "cuda" and (known := card(torch.cuda.get_device_name(device))):
            row["mfu"] = 6 * count * row["tokens_per_s"] / (known.flops * ranks)
    measure.keep(row)


WAYS: dict[str, tuple[str, int]] = {"ddp": ("ddp", 1), "fsdp2": ("fsdp2", 1), "ddp x context parallel": ("ddp", 2)}
"""Of `mambaseq fit`: the strategy, and how many GPUs share a sequence."""


def fitted(way: str, gpus: int, folder: Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """A row: training by `mambaseq fit`, as many tokens a GPU whatever the way: 8 x 2,048 of 130 M parameters.

    Tokens are random. Steps are captured where each process has whole weights and sequences. The rate is that of the
    second half of the steps. Of one that fails, the row has the end of what it said."""
    strategy, shared = WAYS[way]
    length, vocabulary = (16, 32) if tiny else (2048, 50280)
    model: dict[str, Any] = {"d_model": 16 if tiny else 768, "mixer": {"name": "mamba"}}
    model["backbone"] = {"name": "residual", "n_layers": 2 if tiny else 24, "context_parallel": shared}
    model["backbone"]["cuda_graph"] = way == "ddp"
    strategy = "auto" if way == "ddp" and gpus == 1 else strategy
    steps = 8 if tiny else 200
    config = {
        "data": {"name": "parallel_data:RandomTokens", "vocab_size": vocabulary, "length": length * shared},
        "model": model,
        "loader": {"batch_size": 2 if tiny else 8, "num_workers": 0 if tiny else 2},
        "checkpoint": {"every_n_steps": 10 * steps},
        "trainer": {
            **{"accelerator": "cpu" if tiny else "gpu", "devices": gpus, "strategy": strategy, "max_steps": steps},
            **{"precision": "32-true" if tiny else "bf16-mixed", "enable_progress_bar": False, "limit_val_batches": 0},
            "log_every_n_steps": 2 if tiny else 10,
        },
    }
    (folder / "c.yaml").write_text(json_text(config))  # which is YAML
    row: dict[str, Any] = {"name": f"fit, {way}", "ranks": gpus, "batch": config["loader"]["batch_size"]}  # type: ignore[index]
    row["length"] = length * shared
    out = folder / f"{way.replace(' ', '-')}-{gpus}"
    command = [sys.executable, "-m", "mambaseq", "fit", "--allow-import", "parallel_data"]
    command += ["--config", str(folder / "c.yaml"), "--out", str(out)]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        failed = " ".join(done.stderr.split())[-300:] if done.returncode else ""
        if failed:
            print(done.stderr[-6000:], flush=True)
    except subprocess.TimeoutExpired:
        failed = f"not done after {seconds:.0f} s"
    if failed:
        return {**row, "failed": failed}
    results = json.loads((out / "results.json").read_text())
    lines = next((out / "logs").glob("*/metrics.csv")).read_text().splitlines()
    names = lines[0].split(",")

    def told(name: str) -> list[tuple[int, float]]:
        """What is logged, with the steps before it."""
        at = {key: names.index(key) for key in ("step", name) if key in names}
        cells = [line.split(",") for line in lines[1:]]
        return [(int(c[at["step"]]), float(c[at[name]])) for c in cells if name in at and c[at[name]]]

    rates = [(step, rate) for step, rate in told("train/tokens_per_second") if step]
    (half, early), (last, late) = rates[len(rates) // 2 - 1], rates[-1]
    # rates are of all steps but the first, so that their times are steps / rate
    row |= {"parameters": results["parameters"], "tokens_per_s": (last - half) / (last / late - half / early)}
    for key, name in (("gib", "train/memory_gib"), ("mfu", "train/mfu")):
        if found := told(name):
            row[key] = found[-1][1] * (row["tokens_per_s"] / late if key == "mfu" else 1)
    return row
