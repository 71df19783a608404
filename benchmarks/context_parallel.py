"""Training over the GPUs of a host: sequences split along time (`mambaseq.parallel`), data parallel, sharded models.

    python benchmarks/context_parallel.py --gpus 1 2 4 8 --out benchmarks/several_devices.json \\
        --picture docs/images/several_devices.svg                                # all of it, for any number of GPUs
    python benchmarks/context_parallel.py --gpus 1 2 --tiny                      # on CPUs, by gloo
    torchrun --nproc_per_node 4 benchmarks/context_parallel.py --one-gpu         # numbers alone, all ranks on one GPU
    python benchmarks/context_parallel.py --table benchmarks/several_devices.json --picture several_devices.svg

Each row is written when it is found, and replaces the one that the file has of its name and count of GPUs. So counts
and parts can be measured one after the other (each count in at most `--seconds`), and what is cut short loses nothing
else. First that the numbers are those of one GPU, then the time and memory of the whole step, the scan and the block,
against one GPU with the whole sequence. Efficiency is the time on one GPU / (ranks x the time on all).
A step is forward, backward and the sum of the gradients over the ranks. States are relayed (a rank is one layer behind
the one before it, which bounds the efficiency of L layers on N ranks by L / (L + N - 1)) or gathered (all ranks run a
layer at once). "ddp x context parallel" is a step in which each pair of ranks has a sequence of its own. "scan x 24" is
as many scans, each of the output of the last. "block" is what a layer adds to a stack: the time of 24 minus that of 12,
over 12. "a chunk, apart" is where a chunk's time goes (see `apart`), by CUDA graphs and, "eager", without. Rows of
chunks tell how often graphs were replayed. "alone" is one GPU as a rank of several that hears
its own messages: what gathering computes, without what ranks wait for. "fit" is `mambaseq fit`, steps captured where it
captures them: data parallel, sharded, and data parallel over pairs of GPUs that share sequences.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_layers import alone, apart, both_ways, groups_of, layers_of, steps_in_chunks, steps_of
from parallel_measures import Measure, ThroughCpu, check
from parallel_report import keep, picture, rows_of, tables
from parallel_training import WAYS, fitted, trained

from mambaseq.atomic import json_text
from mambaseq.parallel import Context

LAYERS = 24
PARTS = ("step", "chunks", "grouped", "apart", "layers", "fsdp2", "large", "ddp", "longest", "ways", "alone", "fit")
IN_CHUNKS = {"chunks", "grouped", "apart", "longest"}


def launch(options: argparse.Namespace, folder: Path) -> int:
    """Measure on each count of GPUs, in processes of their own; what fails or takes too long leaves the rest."""
    out = options.out or folder / "all.json"
    failed = 0
    for count in options.gpus:
        began = time.monotonic()
        parts = [part for part in options.only if part != "fit"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [__file__, "--out", str(out), "--only", *parts]
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
        for way, (_, shared) in WAYS.items() if "fit" in options.only else ():
            left = options.seconds - (time.monotonic() - began)
            if count % shared or left < 5 or way not in options.ways:
                continue
            row = fitted(way, count, folder, options.tiny, left)
            print(json_text(row), flush=True)
            failed += "failed" in row
            keep(out, row)
    print(tables(rows_of(out)))
    if options.picture:
        picture(rows_of(out), options.picture)
    return min(failed, 1)


def measured(measure: Measure, parts: Collection[str]) -> None:
    """The parts that need the processes of this count of GPUs, the most telling first. One that fails leaves the
    others."""
    if measure.tiny:
        length, chunk_length, width = 128, 32, 16
        size = {"vocab_size": 32, "d_model": 16, "n_layers": 4}
        long, longest = 256, 512
        models = {"130 M": (size, 2, 64)}
    else:
        length, chunk_length, width = 2**17, 2**16, 768
        size = {"vocab_size": 50280, "d_model": width, "n_layers": LAYERS}
        long, longest = 2**20, 2**22
        # 9 B in fp32 with AdamW's moments and gradients are 134 GiB
        models = {
            "130 M": (size, 8, 2048),
            "1.4 B": (size | {"d_model": 2048, "n_layers": 48}, 8, 2048),
            "9 B": (size | {"d_model": 4096, "n_layers": 86}, 2, 2048),
        }
    several = measure.context.size > 1
    # groups have communicators of their own, which ranks that are all on one GPU cannot have
    grouped = measure.context.size > 2 and measure.context.size % 2 == 0 and type(measure.context) is Context
    found: dict[str, tuple[bool, Callable[[], Any]]] = {
        "step": (several, lambda: steps_of(measure, length, size)),
        "chunks": (several, lambda: steps_in_chunks(measure, long, size, chunk_length)),
        "apart": (
            several,
            lambda: [apart(measure, long // 2, size, chunk_length, by_graphs) for by_graphs in (True, False)],
        ),
        "grouped": (grouped, lambda: groups_of(measure, (long, longest), size, chunk_length, 2)),
        "layers": (several, lambda: layers_of(measure, length, width, size["n_layers"])),
        "fsdp2": (True, lambda: [trained(measure, n, "fsdp2", *models[n]) for n in ("1.4 B", "130 M") if n in models]),
        "large": (several and "9 B" in models, lambda: trained(measure, "9 B", "fsdp2", *models["9 B"])),
        "ddp": (True, lambda: trained(measure, "130 M", "ddp", *models["130 M"])),
        "longest": (several, lambda: steps_in_chunks(measure, longest, size, chunk_length, with_eager=False)),
        "ways": (several, lambda: both_ways(measure)),
        "alone": (not several, lambda: alone(measure, length, size, (2, 4, 8))),
    }
    for name, (possible, part) in found.items():
        if not possible or name not in parts:
            continue
        try:
            part()
        except RuntimeError as error:  # on all ranks alike, or the others wait until this one has ended
            failed = " ".join(str(error).split())[:300]
            measure.keep({"name": name, "ranks": measure.context.size, "failed": f"{type(error).__name__}: {failed}"})
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exc()
        measure.tidy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file, written after each measurement")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU, by gloo")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="with none, numbers are checked alone")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS), help="those of fit")
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
    # why chunks or steps were not captured, with its traceback
    logging.basicConfig()
    logging.getLogger("mambaseq.backbones.graphed").setLevel(logging.DEBUG)
    device = torch.device("cpu")
    if not options.tiny:
        device = torch.device("cuda", 0 if options.one_gpu else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if options.tiny or options.one_gpu:
        dist.init_process_group("gloo")
    else:
        # bound to a device, as Lightning does it: communicators are made at once, not when they are first used
        dist.init_process_group("nccl", device_id=device)
    splits = not options.unchecked or not {*IN_CHUNKS, "step", "layers", "ways"}.isdisjoint(options.only)
    if options.one_gpu:
        context: Context = ThroughCpu(dist.group.WORLD)
    elif splits or dist.get_world_size() == 1:
        context = Context(dist.group.WORLD)
    else:  # times alone are told
        context = ThroughCpu(dist.new_group(backend="gloo"))
    measure = Measure(context, device, options.out, options.tiny)
    if not options.unchecked:
        check(measure, chunks_alone=bool(options.only) and IN_CHUNKS.issuperset(options.only))
    measured(measure, options.only)
    context.finish()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(any(row.get("failed") or row.get("wrong") for row in measure.rows))


if __name__ == "__main__":
    main()
