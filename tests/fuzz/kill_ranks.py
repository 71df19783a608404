"""Kills ranks of training runs at random moments, one of two or both, resumes the runs, and holds what they end with
against runs that nobody disturbed.

    python tests/fuzz/kill_ranks.py --kills 30 --seed 0 --out faults.json

Two ranks on CPUs, in turn with sequences of their own (ddp), with the halves of each sequence (context parallel), and
with parts of the weights, whose checkpoints both write beside training (fsdp2). A run counts when the other rank ended
by itself and said why, and the resumed run's last, best and exported weights, the optimizer's state, the place in the
data, results and every logged loss equal the undisturbed run's bit for bit, with no temporary file left. Not collected
by pytest: it takes minutes. `tests/tasks/test_processes.py` has one kill.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.kill_runs import faults
from launching import Ranks, start

from mambaseq.atomic import json_text
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.reporting.runs import RunFolder

WAITS = 20  # seconds that a rank waits for another
CONFIG = f"""
seed: 1
metrics: [bits_per_token]
data: {{name: "tiny:TinyTokens", size: 32}}
loader: {{batch_size: 2}}
model:
  d_model: 8
  backbone: {{name: residual, n_layers: 2, dropout: 0.1}}
  mixer: {{name: mamba, d_state: 4, backend: reference}}
optimizer: {{lr: 1.0e-2, warmup_steps: 3}}
checkpoint: {{every_n_steps: 3, monitor: val/loss}}
trainer: {{max_steps: 20, accelerator: cpu, devices: 2, enable_progress_bar: false, val_check_interval: 4,
  log_every_n_steps: 2, limit_val_batches: 2, check_val_every_n_epoch: null, accumulate_grad_batches: 2,
  strategy: {{class_path: DDPStrategy, init_args: {{timeout: "0:00:{WAITS}"}}}}}}
"""
SHARDED = f'--trainer.strategy={{class_path: fsdp2, init_args: {{timeout: "0:00:{WAITS}"}}}}'
KINDS = {"ddp": [], "context parallel": ["--model.backbone.context_parallel=2"], "fsdp2": [SHARDED]}


def begin(folder: Path, more: list[str]) -> Ranks:
    """Begin a run in a folder, or resume without arguments what has begun there."""
    out, config = folder / "run", folder / "c.yaml"
    folder.mkdir(exist_ok=True)
    config.write_text(CONFIG)
    begun = (out / "config.yaml").is_file()
    which = ["--resume", str(out)] if begun else ["--config", str(config), "--out", str(out), *more]
    return start(["fit", "--allow-import", "tiny", *which], folder)


def differences(whole: Path, folder: Path) -> list[str]:
    """What a finished run has otherwise than one that was not disturbed."""
    found = faults(whole / "run", folder / "run", folder / "cache")
    if not found:
        one, other = (read_checkpoint(RunFolder(place / "run").last) for place in (whole, folder))
        for key in ("SequenceDataModule", "optimizer_states", "lr_schedulers"):
            if not same(one[key], other[key]):
                found.append(f"{key} of last.ckpt differ")
        for name in ("train/loss", "val/loss"):
            if RunFolder(whole / "run").curve(name) != RunFolder(folder / "run").curve(name):
                found.append(f"the curve of {name} differs")
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def disturbed(whole: Path, folder: Path, more: list[str], seconds: float, rng: random.Random) -> dict[str, Any]:
    """Begin a run, kill one rank or both, resume: what was done, and what is wrong."""
    killed = rng.choice([(0,), (1,), (0, 1)])
    moment = rng.uniform(0.02, 1.0) * seconds
    ranks = begin(folder, more)
    while (busy := ranks.busy_for(killed[0])) is not None and busy < moment:
        time.sleep(0.005)
    begun = time.monotonic()
    ranks.kill(*killed)
    codes = ranks.wait(WAITS + 20)
    told: dict[str, Any] = {"killed": list(killed), "after": round(moment, 2), "codes": codes}
    told["stopped_after_seconds"] = round(time.monotonic() - begun, 2)
    last = RunFolder(folder / "run").last
    told["checkpoint"] = read_checkpoint(last)["global_step"] if last.is_file() else None
    found = []
    for rank, code in enumerate(codes):
        said = ranks.told(rank)
        if code is None:
            found.append(f"rank {rank} did not stop")
        elif code > 0 and f"process {rank} of 2 stops, because another one" not in said:
            found.append(f"rank {rank} ended with {code}: {said[-500:]}")
    if not found:
        ranks = begin(folder, more)
        codes = ranks.wait(120)
        found = differences(whole, folder) if codes == [0, 0] else [f"the resume ended with {codes}: {ranks.told(0)}"]
    return told | {"wrong": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(".")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the numbers as JSON")
    arguments = parser.parse_args()
    rng, began, runs = random.Random(arguments.seed), time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        place, wholes = Path(name), {}
        for kind in arguments.kinds:
            more = KINDS[kind]
            whole, seconds = place / f"whole-{kind.replace(' ', '-')}", 0.0
            for _ in range(2):  # the first compiles kernels
                shutil.rmtree(whole, ignore_errors=True)
                ranks = begin(whole, more)
                while (busy := ranks.busy_for(0)) is not None:
                    seconds = busy
                    time.sleep(0.01)
                if ranks.wait(120) != [0, 0]:
                    print(ranks.told(0), ranks.told(1))
                    return 1
            wholes[kind] = whole, seconds
            print(f"{kind}: {seconds:.1f} s of processor time a rank", flush=True)
        for number in range(arguments.kills):
            kind = arguments.kinds[number % len(arguments.kinds)]
            whole, seconds = wholes[kind]
            folder = place / f"run{number}"
            told = {"kind": kind, **disturbed(whole, folder, KINDS[kind], seconds, rng)}
            runs.append(told)
            verdict = "; ".join(told["wrong"]) or "identical"
            print(
                f"{number + 1:3} {kind}: killed {told['killed']} at {told['after']} s, checkpoint "
                f"{told['checkpoint']}, all stopped after {told['stopped_after_seconds']} s: {verdict}",
                flush=True,
            )
            shutil.rmtree(folder)
    identical = sum(not run["wrong"] for run in runs)
    waits = [run["stopped_after_seconds"] for run in runs]
    print(
        f"{identical} of {len(runs)} runs ended bit-identical and complete; all ranks had stopped after "
        f"{statistics.median(waits):.2f} s (median), {max(waits):.2f} s at most; {time.monotonic() - began:.0f} s"
    )
    if arguments.out is not None:
        told = {"identical": identical, "kills": len(runs), "runs": runs}
        arguments.out.write_text(json_text(told, indent=1) + "\n", encoding="utf-8")
    return 0 if identical == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
