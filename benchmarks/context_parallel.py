"""Training over the GPUs of a host: sequences split along time (`mambaseq.parallel`), data parallel, sharded models.

    python benchmarks/context_parallel.py --gpus 1 2 4 8 --out benchmarks/several_devices.json \\
        --picture docs/images/several_devices.svg                                # all of it, for any number of GPUs
    python benchmarks/context_parallel.py --gpus 1 2 --tiny                      # on CPUs, by gloo
    torchrun --nproc_per_node 4 benchmarks/context_parallel.py --one-gpu         # numbers alone, all ranks on one GPU
    python benchmarks/context_parallel.py --table benchmarks/several_devices.json --picture several_devices.svg

Rows of each count of GPUs replace those that the file has of it, so counts can be measured one after the other, each in
at most `--seconds`. First that the numbers are those of one GPU, then the time and memory of the scan, the block and
the whole step, against one GPU with the whole sequence. Efficiency is the time on one GPU / (ranks x the time on all).
A step is forward, backward and the sum of the gradients over the ranks. States are relayed (a rank is one layer behind
the one before it, which bounds the efficiency of L layers on N ranks by L / (L + N - 1)) or gathered (all ranks run a
layer at once). "scan x 24" is as many scans, each of the output of the last. "block" is what a layer adds to a stack:
the time of 24 minus that of 12, over 12. "alone" is one GPU as a rank of several that hears its own messages: what
gathering computes, without what ranks wait for. "fit" is `mambaseq fit`, steps captured where it captures them: data
parallel, sharded, and data parallel over pairs of GPUs that share sequences.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_layers import alone, both_ways, layers_of, steps_of
from parallel_measures import Measure, ThroughCpu, check
from parallel_report import merged, picture, tables
from parallel_training import WAYS, fitted, trained

from mambaseq.atomic import json_text
from mambaseq.parallel import Context

LAYERS = 24
PARTS = ("alone", "layers", "step", "chunks", "ways", "ddp", "fsdp2", "large", "fit")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def keep(path: Path, rows: list[dict[str, Any]], found: Path) -> None:
    """Write rows, with what the file `found` says of the machine, or else what `path` said of it."""
    told = {"bench": "context_parallel", "gpu": None, "torch": torch.__version__}
    for file in (path, found):
        if file.is_file():
            told |= {key: value for key, value in json.loads(file.read_text()).items() if value is not None}
    told["rows"] = rows
    path.write_text(json_text(told, indent=2) + "\n")


def launch(options: argparse.Namespace, folder: Path) -> int:
    """Measure on each count of GPUs, in processes of their own; what fails or takes too long leaves the rest."""
    out = options.out or folder / "all.json"
    failed = 0
    for count in options.gpus:
        began, found = time.monotonic(), folder / f"{count}.json"
        parts = [part for part in options.only if part != "fit"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [__file__, "--out", str(found), "--longest", str(options.longest), "--only", *parts]
        command += [f"--{name}" for name in ("tiny", "unchecked") if getattr(options, name)]
        if parts or not options.unchecked:
            process = subprocess.Popen(command)
            try:
                failed += process.wait(options.seconds) != 0
            except subprocess.TimeoutExpired:
                print(f"{count} GPUs: not done after {options.seconds} s; the rest can be had by --only", flush=True)
                process.terminate()  # torchrun ends its processes
                process.wait()
                failed += 1
        keep(out, merged(rows_of(out), rows_of(found)), found)
        for way, (_, shared) in WAYS.items() if "fit" in options.only else ():
            left = options.seconds - (time.monotonic() - began)
            if count % shared or left < 5:
                continue
            row = fitted(way, count, folder, options.tiny, left)
            print(json_text(row), flush=True)
            failed += "failed" in row
            keep(out, merged(rows_of(out), [row]), found)
    print(tables(rows_of(out)))
    if options.picture:
        picture(rows_of(out), options.picture)
    return min(failed, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file, written after each measurement")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU, by gloo")
    parser.add_argument("--longest", type=int, default=22, help="log2 of the longest sequence in chunks (from 20)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="with none, numbers are checked alone")
    parser.add_argument("--gpus", nargs="+", type=int, help="start the processes of each of these counts")
    parser.add_argument("--seconds", type=float, default=560, help="the most that one count may take")
    parser.add_argument("--unchecked", action="store_true", help="do not check the numbers first")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on one GPU, by gloo: for checks")
    parser.add_argument("--table", nargs="+", type=Path, help="print these files, and measure nothing")
    parser.add_argument("--picture", type=Path, help="where they are drawn")
    options = parser.parse_args()
    if options.table:
        rows = [row for path in options.table for row in rows_of(path)]
        print(tables(rows))
        if options.picture:
            picture(rows, options.picture)
        return
    if options.gpus:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(launch(options, Path(folder)))
    device = torch.device("cpu")
    if not options.tiny:
        device = torch.device("cuda", 0 if options.one_gpu else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.tiny or options.one_gpu else "nccl")
    context = (ThroughCpu if options.one_gpu else Context)(dist.group.WORLD)
    measure = Measure(context, device, options.out, options.tiny)
    if not options.unchecked:
        check(measure)
    if options.tiny:
        length, chunk_length, width = 128, 32, 16
        size = {"vocab_size": 32, "d_model": 16, "n_layers": 4}
        lengths = [256]
        models = {"130 M": (size, 2, 64)}
    else:
        length, chunk_length, width = 2**17, 2**16, 768
        size = {"vocab_size": 50280, "d_model": width, "n_layers": LAYERS}
        lengths = [2**n for n in range(20, options.longest + 1, 2)]
        # 9 B in fp32 with AdamW's moments and gradients are 134 GiB
        models = {
            "130 M": (size, 8, 2048),
            "1.4 B": (size | {"d_model": 2048, "n_layers": 48}, 4, 2048),
            "9 B": (size | {"d_model": 4096, "n_layers": 86}, 2, 2048),
        }
    if "alone" in options.only and not context.rank and context.size == 1:
        alone(measure, length, size, (2, 4, 8))
    if "layers" in options.only and context.size > 1:
        layers_of(measure, length, width, size["n_layers"])
    if "step" in options.only and context.size > 1:
        steps_of(measure, length, size, None, repeats=3)
    if "ddp" in options.only:
        trained(measure, "130 M", "ddp", *models["130 M"])
    if "fsdp2" in options.only:
        for name in ("130 M", "1.4 B"):
            if name in models:
                trained(measure, name, "fsdp2", *models[name])
    if "large" in options.only and "9 B" in models and context.size > 1:
        trained(measure, "9 B", "fsdp2", *models["9 B"])
    if "chunks" in options.only and context.size > 1:
        for long in lengths:
            steps_of(measure, long, size, chunk_length, repeats=2 if long == lengths[0] else 1)
    if "ways" in options.only and context.size > 1:
        both_ways(measure)
    context.finish()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
