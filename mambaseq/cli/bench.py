"""`mambaseq bench ops|block|train|decode`: speed next to every installed peer, after a check of correctness."""

from __future__ import annotations

import argparse
from pathlib import Path

from mambaseq.arguments import Arguments
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.importing import uncollected
from mambaseq.outputs import check_picture

BENCHES = {
    "ops": "ops that peers have as well; the scan against attention and convolution by length",
    "block": "a Mamba block, forward and backward",
    "train": "training steps of a language model, next to a Transformer of equal size",
    "decode": "generation throughput, next to peers and to a Transformer with a cache of keys and values",
}
SCALES = ("full", "small", "tiny")


def run(argv: list[str], command: str) -> int:
    listing = "\n".join(f"  {name:<7} {text}" for name, text in BENCHES.items())
    parser = Arguments(
        prog="mambaseq bench",
        usage="mambaseq bench {" + ",".join(BENCHES) + "} [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure speed and memory next to every installed peer (mamba-ssm, causal-conv1d: none is\n"
        "needed). Results are checked first: a wrong one gets no time, and the exit code is 1.\n\n" + listing,
    )
    parser.add_argument("bench", metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--scale", choices=SCALES, default=None, help="size of the shapes; full on a GPU, else small")
    parser.add_argument(
        "--repeats", type=int, default=20, help="measurements of each, at most; the median counts (default 20)"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write rows and ratios")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE.png", help="draw them")
    decode = parser.add_argument_group("decode")
    decode.add_argument(
        "--only", metavar="NAMES", default=None, help='sizes and contenders, such as "1.4B,mambaseq,mamba-ssm"'
    )
    decode.add_argument("--kv-heads", type=int, default=None, metavar="N", help="heads of the Transformer's keys")
    decode.add_argument("--seconds", type=float, default=None, help="begin no further row after so long")
    arguments = parser.parse_args(argv)
    if arguments.bench not in BENCHES:
        raise ConfigError(
            f"there is no benchmark {shown(arguments.bench)}.{did_you_mean(arguments.bench, BENCHES)} Known: "
            f"{', '.join(BENCHES)}."
        )
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {arguments.repeats}.")
    given = {name: getattr(arguments, name) for name in ("only", "kv_heads", "seconds")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and arguments.bench != "decode":
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')} is for decode, not for {arguments.bench}.")
    if "only" in given:
        given["only"] = [name.strip() for name in given["only"].split(",") if name.strip()]
    check_picture(arguments.picture)
    with uncollected(for_good=True):
        from mambaseq.benchmarking.running import run as run_bench
        from mambaseq.runs.devices import choose_device

    device = choose_device(arguments.device)
    scale = arguments.scale or ("full" if device.type == "cuda" else "small")
    return run_bench(arguments.bench, device, scale, arguments.repeats, arguments.json, arguments.picture, **given)
