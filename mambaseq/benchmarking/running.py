"""Runs one benchmark and writes the requested files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambaseq.benchmarking import block, decode, ops, train
from mambaseq.benchmarking.pictures import draw
from mambaseq.benchmarking.report import Report
from mambaseq.benchmarking.timing import on
from mambaseq.reporting.pictures import save_png

_BENCHES: dict[str, Callable[..., Report]] = {
    "ops": ops.run,
    "block": block.run,
    "train": train.run,
    "decode": decode.run,
}


def run(
    bench: str,
    device: torch.device,
    scale: str,
    repeats: int,
    json: Path | None = None,
    picture: Path | None = None,
    **options: Any,
) -> int:
    """Run the benchmark of this name. options: those of `decode.Options` for decode, of their own for ops and train.

    Returns 1 if a result was wrong or ours did not run, otherwise 0.
    """
    with on(device):
        if bench == "decode":
            options = {"options": decode.Options(path=json, **options)}
        report = _BENCHES[bench](device, scale, repeats, **options)
    report.summary()
    if json is not None:
        report.write(json)
        print(f"\n{json}")
    if picture is not None:
        save_png(picture, draw(report))
        print(picture)
    return 1 if report.failed else 0
