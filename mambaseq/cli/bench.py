"""`mambaseq bench ops|block|train|decode`: speed beside every peer that is installed, correctness first."""

from __future__ import annotations

import argparse
from pathlib import Path

from mambaseq.cli.arguments import Arguments
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.importing import uncollected

BENCHES = {
    "ops": "each op with kernels for a GPU; the scan against attention and convolution by length",
    "block": "a Mamba block, forward and backward",
    "train": "training steps of a language model, beside a Transformer of equal size",
    "decode": "generation throughput, beside a Transformer with a cache of keys and values",
}
SCALES = ("full", "small", "tiny")


def run(argv: list[str], command: str) -> int:
    listing = "\n".join(f"  {name:<7} {text}" for name, text in BENCHES.items())
    parser = Arguments(
        prog="mambaseq bench",
        usage="mambaseq bench {" + ",".join(BENCHES) + "} [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure speed and memory beside every peer that is installed (mamba-ssm, causal-conv1d: none is\n"
        "needed). Results are checked first: what is wrong gets no time, and the exit code is 1.\n\n" + listing,
    )
    parser.add_argument("bench", metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--scale", choices=SCALES, default=None, help="size of the shapes; full on a GPU, else small")
    parser.add_argument("--repeats", type=int, default=20, help="samples that a median is of, at most (default 20)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write rows and ratios")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE.png", help="draw them")
    arguments = parser.parse_args(argv)
    if arguments.bench not in BENCHES:
        raise ConfigError(
            f"nothing is measured by the name {shown(arguments.bench)}.{did_you_mean(arguments.bench, BENCHES)} "
            f"Known: {', '.join(BENCHES)}."
        )
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {arguments.repeats}.")
    if arguments.picture is not None and arguments.picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture writes PNG files; {arguments.picture} is not named so.")

    with uncollected(for_good=True):
        from mambaseq.benchmarking.running import run as run_bench
        from mambaseq.runs.devices import choose_device

    device = choose_device(arguments.device)
    scale = arguments.scale or ("full" if device.type == "cuda" else "small")
    return run_bench(arguments.bench, device, scale, arguments.repeats, arguments.json, arguments.picture)
