"""Which species is a window of DNA from, learned from scratch and after pretraining on the next base.

    python benchmarks/finetuning.py --out /tmp/finetuning

Pretrains a small model on the shipped ENCODE region ENm001 of five mammals, without their names. Its weights are then
what classifiers begin with, trained whole, with everything but the head frozen, with low rates below the head, or by
adapters (where peft is installed), beside one from scratch: all for as many steps and on the same windows. Printed is
the accuracy on windows of ENm002, mean over seeds and standard deviation; chance is 0.20.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import mambaseq as ms
from mambaseq.resources import find

SPECIES = ("human", "galago", "mouse", "cow", "dog")
MODEL = {"d_model": 64, "backbone": {"name": "residual", "n_layers": 2}, "mixer": {"name": "mamba", "d_state": 16}}
PRETRAINED: dict[str, dict[str, Any]] = {
    "whole": {},
    "rates below the head x 0.1": {"finetune.lr_of": {"encoder": 0.1, "backbone": 0.1}},
    "head alone": {"finetune.freeze": ["encoder", "backbone"]},
}


def settings(arguments: argparse.Namespace, steps: int, lr: float) -> dict[str, Any]:
    """Those that all runs share."""
    return {
        "data.length": arguments.length,
        "loader.batch_size": 8,
        "model": MODEL,
        "optimizer": {"lr": lr, "warmup_steps": steps // 10},
        "length_warmup.start": 0,
        "checkpoint": {"every_n_steps": 10**6, "monitor": ""},
        "trainer": {
            "max_steps": steps,
            "accelerator": arguments.accelerator,
            "precision": "32-true",
            "val_check_interval": 10**6,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
    }


def pretrain(arguments: argparse.Namespace) -> str:
    """A run on the next base; its folder."""
    common = settings(arguments, arguments.pretraining_steps, 6e-3)
    files = [str(find(f"mambaseq:data/encode/{name}.ENm001.fa.gz")) for name in SPECIES]
    out = arguments.out / "pretrained"
    ms.fit("dna/genome", out=out, progress=False, settings={**common, "data.fasta": files, "loader.num_workers": 0})
    return str(out)


def classify(arguments: argparse.Namespace, name: str, seed: int, more: dict[str, Any]) -> float:
    """Train a classifier; its accuracy on the test set."""
    common = settings(arguments, arguments.steps, arguments.lr)
    head = {"head": {"name": "classification", "scale": arguments.length**0.5 / 4}, "encoder": {"name": "tokens"}}
    data = {"data.n_validation": 10, "data.n_test": arguments.n_test, "loader.num_workers": 0}
    out = arguments.out / f"{name.replace(' ', '-')}-{seed}"
    run = ms.fit(
        "dna/species",
        out=out,
        progress=False,
        settings={**common, **data, "model": {**MODEL, **head}, "metrics": ["accuracy"], "seed": seed, **more},
    )
    return float(run.evaluate("test")["test/accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-test", type=int, default=300, help="test windows")
    parser.add_argument("--accelerator", default="cpu")
    arguments = parser.parse_args()
    began = time.perf_counter()
    source = pretrain(arguments)
    ways = {"from scratch": {}}
    ways |= {f"pretrained, {name}": {"finetune.init_from": source, **more} for name, more in PRETRAINED.items()}
    if importlib.util.find_spec("peft") is not None:
        ways["pretrained, adapters of rank 8"] = {"finetune.init_from": source, "lora.rank": 8}
    print(
        f"{arguments.pretraining_steps} steps of pretraining, {arguments.steps} of classification, windows of "
        f"{arguments.length} bases, {arguments.seeds} seeds\n\n| begins | accuracy |\n| --- | --- |",
        flush=True,
    )
    for name, more in ways.items():
        found = [classify(arguments, name, seed, more) for seed in range(arguments.seeds)]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"| {name} | {statistics.mean(found):.3f} ± {spread:.3f} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
