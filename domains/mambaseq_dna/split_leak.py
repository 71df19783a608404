"""`mambaseq dna/split-leak`: how much training windows read of the validation and test intervals, as published."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from mambaseq.arguments import Arguments
from mambaseq.data.cache import locate
from mambaseq.errors import ConfigError, shown
from mambaseq_dna.split_intervals import PUBLISHED, SplitIntervals

LENGTHS = [1 << power for power in range(10, 21)]
_LONGEST = 1 << 31
_ABOUT = (
    "How much of the validation and test intervals training windows read, where windows that are longer than an "
    "interval read on into what is beside it. hyenadna: its loader gives each interval one window, with as much on "
    "both sides; mamba: the paper's gives two, one that begins and one that ends with it. With data.extend none or "
    "within, no base is read by two splits."
)


def _length(text: str) -> int:
    if (found := re.fullmatch(r"(\d{1,10})(?:\^(\d{1,2}))?", text)) is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a length; write 1024 or 2^10")
    length = int(found[1]) ** int(found[2] or 1)
    if not 1 <= length <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not between 1 and 2^31")
    return length


def _intervals(name: str) -> Path:
    """The BED file that a command line names, or the configuration there."""
    if name.endswith((".yaml", ".yml")) or (not Path(name).exists() and "/" in name and ":" not in name):
        from mambaseq.runs.parsing import parse_config

        rules = getattr(parse_config(name, []).make_data(), "rules", None)
        listed = getattr(rules, "intervals", None)
        if listed is None:
            raise ConfigError(f"{name} sets no data.intervals. Name a configuration that does, or the BED file itself.")
        name = str(listed)
    paths = locate(name)
    if len(paths) > 1:
        raise ConfigError(f"{shown(name)} stands for {len(paths)} files. Name one.")
    return paths[0]


def run(argv: list[str]) -> int:
    """The command. Prints a row a length and split."""
    parser = Arguments("mambaseq dna/split-leak", description=_ABOUT)
    parser.add_argument("intervals", metavar="CONFIG_OR_BED", help="a BED file with the split in column 4, or a run's")
    parser.add_argument(
        "--lengths", type=_length, nargs="+", default=LENGTHS, help="bases a window (default: 2^10 to 2^20, doubling)"
    )
    parser.add_argument("--rules", choices=PUBLISHED, nargs="+", default=PUBLISHED, help="data.extend (default: both)")
    arguments = parser.parse_args(argv)
    path = _intervals(arguments.intervals)
    found = SplitIntervals.read(path)
    train = int((found.table[:, 0] == 0).sum())
    print(f"{path}: {train:,} training intervals, {len(found.table) - train:,} others\n")
    row = "{:>10} {:<9} {:<10} {:>15} {:>15} {:>7} {:>9} {:>9} {:>7}"
    print(row.format("length", "rule", "split", "bases", "in training", "share", "windows", "touched", "share"))
    for length, rule in itertools.product(arguments.lengths, arguments.rules):
        for leak in found.leaks(length, rule):
            share, touched = f"{leak.leaked / leak.bases:.2%}", f"{leak.touched / leak.windows:.1%}"
            bases, leaked, windows, hit = (f"{n:,}" for n in (leak.bases, leak.leaked, leak.windows, leak.touched))
            print(row.format(f"{length:,}", rule, leak.split, bases, leaked, share, windows, hit, touched))
    print(
        "\nbases: of the split's intervals; in training: of these, in a training window. windows: of the split, as "
        "long as those of training; touched: with a base that a training window has."
    )
    return 0
