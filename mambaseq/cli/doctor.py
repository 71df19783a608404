"""`mambaseq doctor`: which backend each op would use on this machine, whether each is right, and how fast."""

from __future__ import annotations

from mambaseq.cli.arguments import Arguments
from mambaseq.importing import uncollected


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq doctor",
        description="List, for each op, its backends, which one would run here, why the others would not, and the "
        "error of each against the reference in float64 (relative RMS, outputs and gradients), and its speed.",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    arguments = parser.parse_args(argv)
    with uncollected(for_good=True):
        from mambaseq.benchmarking.diagnosis import diagnose

    return diagnose(arguments.device)
