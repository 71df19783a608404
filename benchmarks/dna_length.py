"""A training step of the 1.4 M parameter DNA model at 2^10 … 2^20 bases: tokens a second and peak memory.

    python benchmarks/dna_length.py [--json FILE] [--tokens 1048576] [--chunk-length 0] [--lengths 1024 16384]
    python benchmarks/dna_length.py --tiny          the same in seconds on a CPU

The model, optimizer and precision of `configs/dna/hg38.yaml`: forward, backward, clipped gradients, AdamW, as `mambaseq
fit` has them (its CUDA graphs too, where they are the default). Two rows a length: one sequence a step, and as many as
make `--tokens` a step, as in the paper, whose tokens a step are the same at every length. `ratio` is the speed beside
that of 2^14 bases with as many tokens a step. Memory is what the step needs beside weights and optimizer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.atomic import json_text
from mambaseq.benchmarking.timing import attempt, measure, peak_bytes, release
from mambaseq.models import build_model
from mambaseq.runs.config import RunConfig
from mambaseq.runs.parsing import parse_config
from mambaseq.tasks.optimizer import make_optimizer

LENGTHS = [1 << power for power in range(10, 21)]
BESIDE = 1 << 14
UNCOUNTED = 8  # steps that compile, and after which short shapes are captured
TINY = ("--model.d_model=16", "--model.backbone.n_layers=2", "--trainer.precision=32-true")


def make_step(settings: RunConfig, length: int, sequences: int, device: torch.device) -> Callable[[], None]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    data = settings.make_data()
    model = build_model(settings.model_spec(data)).to(device).train()
    optimizer, _ = make_optimizer(model, settings.optimizer(), 10_000)
    ids = torch.randint(0, BaseTokenizer().vocab_size - 1, (sequences, length + 1), device=device)
    half = str(settings.trainer["precision"]).startswith("bf16")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = model(ids[:, :-1], labels=ids[:, 1:], return_logits=False).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def figures(settings: RunConfig, length: int, sequences: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step, tokens a second, and its peak in MiB (None on a CPU)."""
    step = make_step(settings, length, sequences, device)
    for _ in range(UNCOUNTED if device.type == "cuda" else 1):
        step()
    peak = peak_bytes(step, device)
    timing = measure(step, device, repeats, budget_s=5.0, warm_up_s=None)
    return {
        "ms": timing.ms,
        "tokens_per_s": sequences * length / timing.ms * 1e3,
        "peak_mib": None if peak is None else peak / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--lengths", type=int, nargs="+", help="bases a sequence")
    parser.add_argument("--tokens", type=int, help="bases a step, of all its sequences (default: 2^20)")
    parser.add_argument(
        "--chunk-length", type=int, help="model.backbone.chunk_length; 0 for none (default: the file's)"
    )
    parser.add_argument("--override", action="append", default=[], metavar="--KEY=VALUE", help="a setting of the run")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model and short sequences, to try the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    overrides = [*(TINY if arguments.tiny else ()), *arguments.override]
    if arguments.chunk_length is not None:
        overrides.append(f"--model.backbone.chunk_length={arguments.chunk_length or 'null'}")
    settings = parse_config("dna/hg38", overrides)
    lengths = arguments.lengths or ([64, 128, 256] if arguments.tiny else LENGTHS)
    tokens = arguments.tokens or max(lengths)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = build_model(settings.model_spec(settings.make_data())).n_parameters()
    precision = settings.trainer["precision"]
    print(f"{name}, torch {torch.__version__}, {precision}, {parameters / 1e6:.2f} million parameters\n")

    rows: list[dict[str, Any]] = []
    for length in lengths:
        for sequences in sorted({1, max(tokens // length, 1)}):
            run = functools.partial(figures, settings, length, sequences, arguments.repeats, device)
            status, note, found = attempt(run)
            release()
            row = {"length": length, "sequences": sequences, "constant": sequences == max(tokens // length, 1)}
            rows.append(row | {"fits": status == "ok", "note": note} | (found or {}))
            print(f"  {length:,} x {sequences:,}: " + (f"{found['ms']:,.1f} ms" if found else note), flush=True)
    beside = BESIDE if BESIDE in lengths else lengths[0]
    print(f"\n{'bases':>9} {'sequences':>10} {'ms':>9} {'tokens/s':>12} {'peak MiB':>9} {'ratio':>6}")
    for constant in (False, True):
        at = {row["length"]: row for row in rows if (row["constant"] if constant else row["sequences"] == 1)}
        for length, row in at.items():
            if not row["fits"]:
                print(f"{length:>9,} {row['sequences']:>10,} {row['note']}")
                continue
            ratio = row["tokens_per_s"] / at[beside]["tokens_per_s"] if at[beside]["fits"] else None
            row["ratio_of_constant" if constant else "ratio_of_single"] = ratio
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            print(
                f"{length:>9,} {row['sequences']:>10,} {row['ms']:>9.2f} {row['tokens_per_s']:>12,.0f} {peak:>9} "
                f"{'' if ratio is None else format(ratio, '.2f'):>6}"
            )
        print()
    if arguments.json:
        told = {
            "device": name,
            "torch": torch.__version__,
            "precision": precision,
            "parameters": parameters,
            "chunk_length": settings.settings["model"]["backbone"].get("chunk_length"),
            "tokens_a_step": tokens,
            "beside": beside,
            "rows": rows,
        }
        arguments.json.write_text(json_text(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
