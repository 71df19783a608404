"""`mambaseq bench ops|block|train|decode`: speed next to every installed peer, after a check of correctness."""

from __future__ import annotations

import argparse
from pathlib import Path

from mambaseq.arguments import Arguments
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.importing import uncollected
from mambaseq.outputs import check_picture

BENCHES = {
    "ops": "every op; the scan against attention and convolution by length",
    "block": "a Mamba block, forward and backward",
    "train": "training steps of a language model of any mixer, next to a Transformer of equal size",
    "decode": "generation throughput, next to peers and to a Transformer with a cache of keys and values",
}
SCALES = ("full", "small", "tiny")
# those of some benchmarks alone
OPTIONS = {"only": ("ops", "decode"), "mixer": ("train",), "kv_heads": ("decode",), "seconds": ("decode",)}


def run(argv: list[str], command: str) -> int:
    listing = "\n".join(f"  {name:<7} {text}" for name, text in BENCHES.items())
    parser = Arguments(
        prog="mambaseq bench",
        usage="mambaseq bench {" + ",".join(BENCHES) + "} [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure speed and memory next to every installed peer (mamba-ssm, causal-conv1d, fla: none\n"
        "is needed). Results are checked first: a wrong one gets no time, and the exit code is 1.\n\n" + listing,
    )
    parser.add_argument("bench", metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--scale", choices=SCALES, default=None, help="size of the shapes; full on a GPU, else small")
    parser.add_argument(
        "--repeats", type=int, default=20, help="measurements of each, at most; the median counts (default 20)"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write rows and ratios")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE.png", help="draw them")
    parser.add_argument(
        "--only", metavar="NAMES", help='ops: "lti_scan,kda"; decode: sizes and contenders, "1.4B,mambaseq,mamba-ssm"'
    )
    train = parser.add_argument_group("train")
    train.add_argument("--mixer", metavar="NAME", help="of our model (see `mambaseq list mixers`; default mamba)")
    add_allow_import(train)
    decode = parser.add_argument_group("decode")
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
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    for name in given:
        if arguments.bench not in OPTIONS[name]:
            meant = " and ".join(OPTIONS[name])
            raise ConfigError(f"--{name.replace('_', '-')} is for {meant}, not for {arguments.bench}.")
    if "only" in given:
        given["only"] = [name.strip() for name in given["only"].split(",") if name.strip()]
        if not given["only"]:
            raise ConfigError("--only names nothing. Leave it out for all.")
    check_picture(arguments.picture)
    with uncollected(for_good=True):
        from mambaseq.benchmarking.running import run as run_bench
        from mambaseq.runs.devices import choose_device

    device = choose_device(arguments.device)
    scale = arguments.scale or ("full" if device.type == "cuda" else "small")
    return run_bench(arguments.bench, device, scale, arguments.repeats, arguments.json, arguments.picture, **given)
